"""Settings of the liver flow: frozen, typed, units in the names. The defaults are the thesis's (000, chapter 3).

A configuration file holds values only; `load` names the file, the key and the rule when one is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from medad.base.private import DataRoot, PrivateCases, PrivateExpression, PrivatePattern, changes_of
from medad.base.settings import MachineSettings, RunName, Settings, load_settings, parse_settings
from medad.config.anomalies import AugmentationSettings, SynthesisSettings


class InsertSettings(Settings):
    """Lesions of known shape and contrast, inserted in HU into a healthy liver before preprocessing."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sizes, shapes and places."""
    count: Annotated[int, Field(ge=1, le=50)] = 4
    """Number of lesions."""
    diameter_mm: tuple[float, float] = (12.0, 40.0)
    """Range of the longest axis."""
    contrast_hu: tuple[float, float] = (-60.0, -40.0)
    """Range of the added contrast. A negative one is darker than liver, as in the portal venous phase."""
    edge_mm: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the Gaussian that softens a lesion's edge."""
    kind: Literal["uniform", "mixed"] = "uniform"
    """Kind of lesion. `mixed`: the contrast in an irregular core and its opposite in the rim, as in treated tumours
    and HCC."""
    place: Literal["inside", "rim"] = "inside"
    """Place of a lesion. `inside`: clear of the liver's surface. `rim`: touching or crossing it; only the part
    inside the liver counts."""
    fit: Literal["error", "fewer"] = "error"
    """Reaction where the liver has no room for all lesions: an error, or fewer lesions."""
    diameter_distribution: Literal["uniform", "log_uniform"] = "uniform"
    """Distribution of sizes within their range."""

    @model_validator(mode="after")
    def _sizes(self) -> InsertSettings:
        if not 0 < self.diameter_mm[0] <= self.diameter_mm[1]:
            raise ValueError("diameter_mm must be (low, high) with 0 < low <= high")
        return self


class DatasetSettings(Settings):
    """The cases: their folder and the layout of their files.

    `layout="btcv"`: img/img0001.nii.gz + label/label0001.nii.gz, liver = 6.
    `layout="lits"`: volume-N.nii[.gz] + segmentation-N.nii[.gz], liver = 1, tumour = 2.
    `layout="folder"`: `images` and `labels` are glob patterns below `root`, each with one `*` that stands for the
    case; a folder matched by `images` is read as a DICOM series.
    """

    root: DataRoot
    """Folder of the data set; `samples:NAME` is a folder of the sample data (`adflows samples`)."""
    layout: Literal["btcv", "lits", "folder"]
    """Layout of the files, see above."""
    images: PrivatePattern | None = None
    """Pattern of the scans, layout `folder` alone."""
    labels: PrivatePattern | None = None
    """Pattern of the label files, layout `folder` alone. None: there are no labels."""
    liver_labels: tuple[int, ...] | None = None
    """Label values that make up the liver. None: the layout's own (btcv 6; lits 1 and 2)."""
    tumour_label: int | None = None
    """Label value of tumour, used by evaluation alone. None: the layout's own (lits 2)."""
    cases: PrivateCases | None = None
    """Cases to use, by id or by the name that the file gives. None: all."""
    patients: PrivateExpression | None = None
    """Regular expression, its one group the patient, for several scans of one patient. It is searched for in a
    case's name (`btcv-0001`, `lits-17`; in layout `folder` the text that `*` stands for). One text is one patient,
    in both data sets. A DICOM series' own PatientID has precedence. None: each scan is a patient."""
    affine_mismatch: Literal["error", "warn"] = "error"
    """Reaction to a label of the scan's shape with another affine (LiTS 28 to 47 have identity affines)."""
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    """NIfTI affine that counts. `agree` refuses a file whose sform and qform differ."""
    pseudonyms: bool = False
    """Pseudonyms as case ids, for file names that may hold patient data. DICOM series always have them."""
    insert: InsertSettings | None = None
    """Lesions to insert into the scans, test data alone. None: no lesion is inserted."""

    @model_validator(mode="after")
    def _folder_has_patterns(self) -> DatasetSettings:
        if self.layout == "folder":
            if self.images is None or self.images.count("*") != 1:
                raise ValueError("layout folder needs `images`, a pattern with exactly one *")
            if self.labels is not None and self.labels.count("*") != 1:
                raise ValueError("`labels` must be a pattern with exactly one *")
            if self.labels is not None and self.liver_labels is None:
                raise ValueError("layout folder with `labels` needs `liver_labels`")
        elif self.images is not None or self.labels is not None:
            raise ValueError(f"`images` and `labels` belong to layout folder, not {self.layout}")
        tumour = self.tumour_label if self.tumour_label is not None else (2 if self.layout == "lits" else None)
        if tumour is not None and self.liver_labels is not None and tumour not in self.liver_labels:
            raise ValueError(
                f"liver_labels {list(self.liver_labels)} leave out tumour ({tumour}), which lies in the liver"
            )
        return self

    @field_validator("patients")
    @classmethod
    def _one_group(cls, patients: str | None) -> str | None:
        if patients is not None:
            try:
                groups = re.compile(patients).groups
            except re.error as error:
                raise ValueError(f"`patients` is no regular expression ({error})") from error
            if groups != 1:
                raise ValueError(f"`patients` needs exactly one group, which is the patient; found {groups}")
        return patients


class PreprocessSettings(Settings):
    """HU -> grey -> liver ROI -> axial slices -> histogram equalisation (section 3.4.1)."""

    window_hu: tuple[float, float] = (-200.0, 250.0)
    """HU that become grey 0 and grey 255."""
    slice_px: Annotated[int, Field(ge=32, le=1024, multiple_of=16)] = 256
    """Side of a slice."""
    equalise: bool = True
    """Histogram equalisation of each slice."""
    lift_dark: bool = True
    """Shift of equalised values 1..149 to 30..150, so that dark liver never merges with the background."""
    min_liver_px: Annotated[int, Field(ge=1)] = 1
    """Smallest number of liver pixels in a slice, on the slice grid. Slices with fewer are left out."""
    standardise: Literal["none", "median"] = "none"
    """Origin of the HU. `median`: HU and `window_hu` count from the median of the volume's liver."""
    resolution_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Standard deviation of the point spread to which the liver is smoothed, axis by axis. Voxels of every size, and
    their noise, become alike. The surroundings of the liver are not used. 0: as scanned."""
    background: Literal["zero", "median"] = "zero"
    """Grey value outside the liver. `median`: that of the liver's median, so that the rim is not an edge."""
    frame_mm: Annotated[float, Field(ge=50, le=600)] | None = None
    """Side of the square around the liver that slices show, at least the liver's extent. None: whole planes."""

    @model_validator(mode="after")
    def _ranges(self) -> PreprocessSettings:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu must be (low, high) with low < high")
        if self.background == "median" and (self.equalise or self.standardise != "median"):
            raise ValueError("background median needs standardise: median and equalise: false")
        return self


class NetSettings(Settings):
    """A MONAI U-Net with two 3x3 convolutions per block; or DRAEM's auto-encoder."""

    architecture: Literal["unet", "autoencoder"] = "unet"
    """Architecture. `autoencoder`: DRAEM's, without skip connections, for the restoration network alone."""
    widths: Annotated[tuple[int, ...], Field(min_length=3, max_length=7)] = (64, 128, 256, 512)
    """Channels of each level."""
    groups: Annotated[int, Field(ge=1)] = 8
    """Groups of the group norm. The number divides every width."""

    @model_validator(mode="after")
    def _divides(self) -> NetSettings:
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups = {self.groups} must divide every width in {self.widths}")
        return self


class PhaseSettings(Settings):
    """One training phase with Adam."""

    epochs: Annotated[int, Field(ge=1)]
    """Epochs of training."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Slices per batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of Adam."""
    rate: Literal["constant", "one_cycle"] = "constant"
    """Course of the learning rate. `one_cycle`: from a 25th of it up over three tenths of the steps, then down to
    zero, along cosines. A short training ends settled (Smith and Topin, 2019)."""


class FocalSettings(Settings):
    """The focal loss."""

    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Factor alpha of the focal loss."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """Exponent gamma of the focal loss."""


class TrainSettings(Settings):
    """The trainings of both networks."""

    restoration: PhaseSettings = PhaseSettings(epochs=200)
    """Training of the restoration network."""
    segmentation: PhaseSettings = PhaseSettings(epochs=1)
    """Training of the segmentation network."""
    focal: FocalSettings = FocalSettings()
    """Focal loss of the segmentation network."""
    schedule: Literal["two_phase", "joint"] = "two_phase"
    """Order of the trainings. `two_phase`: the restoration network, then the segmentation network with the first one
    frozen (the thesis). `joint`: both at once, by the sum of their losses (DRAEM), with the values of `restoration`."""
    restoration_loss: Literal["l1", "l2_ssim"] = "l1"
    """Loss of the restoration network. `l1`: eq. 3.2. `l2_ssim`: DRAEM's, squared error + 1 - SSIM with a window of
    11 px."""
    snapshot_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs between stored networks of phase two. 0: only the trained one is stored."""
    augmentation: AugmentationSettings | None = None
    """Augmentation of healthy slices. None: slices as they are (the thesis)."""
    flip: bool = False
    """Random flips of slices, left-right and front-back."""
    mixed_precision: bool = True
    """bfloat16 autocast on a GPU; never on a CPU."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """Minutes between checkpoints."""

    @model_validator(mode="after")
    def _snapshots_are_phase_twos(self) -> TrainSettings:
        if self.snapshot_epochs and self.schedule == "joint":
            raise ValueError("snapshot_epochs belongs to schedule two_phase: joint training has no phase two")
        if self.snapshot_epochs and self.segmentation.rate != "constant":
            raise ValueError("snapshot_epochs needs segmentation.rate constant: else a snapshot is no shorter training")
        return self


class PostprocessSettings(Settings):
    """From probabilities to lesions."""

    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = 0.5
    """Probability from which a voxel is tumour. `auto`: the triangle method's threshold inside this scan's liver,
    kept within `auto_range`; it needs no label."""
    auto_range: tuple[float, float] = (0.35, 0.5)
    """Range of the threshold `auto`."""
    min_lesion_mm3: Annotated[float, Field(ge=0)] = 0.0
    """Smallest volume of a lesion. Smaller ones are removed."""

    @model_validator(mode="after")
    def _range_rises(self) -> PostprocessSettings:
        if not 0 < self.auto_range[0] <= self.auto_range[1] < 1:
            raise ValueError("auto_range must be (low, high) with 0 < low <= high < 1")
        return self


class EvaluationSettings(Settings):
    """Comparison of lesions with the labels."""

    lesion_overlap: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of a true lesion's voxels in the predicted mask from which the lesion counts as found."""


class CombineSettings(Settings):
    """Weights of the maps that make up the probability; they must add up to one."""

    segmentation: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of the segmentation network's map."""
    residual: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the distance between restoration and query."""
    deviation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the query's distance from the usual grey value of this liver, which needs no network."""
    scale_mm: Annotated[float, Field(gt=0, le=30)] = 5.0
    """Standard deviation of the Gaussian neighbourhoods over which residual and deviation are averaged."""
    centre_z: Annotated[float, Field(gt=0)] = 3.0
    """Robust standard deviations above the liver's median at which both become probability 1/2."""

    @model_validator(mode="after")
    def _weights(self) -> CombineSettings:
        if abs(self.segmentation + self.residual + self.deviation - 1) > 1e-6:
            raise ValueError("segmentation, residual and deviation must add up to 1")
        return self


class InferenceSettings(Settings):
    """From slices to probabilities."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Slices per batch."""
    flips: bool = False
    """Mean over the slice and its flips: left-right, front-back and both."""
    combine: CombineSettings = CombineSettings()
    """Weights of the maps that make up the probability."""
    smooth_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Standard deviation of a Gaussian over the probabilities of neighbouring liver pixels, planes included. 0:
    none."""


class FoldSettings(Settings):
    """Cross-validation by patient: one fold is tested, the others train."""

    count: Annotated[int, Field(ge=2)]
    """Number of folds."""
    index: Annotated[int, Field(ge=0)]
    """Fold that is tested, from 0."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed that assigns patients to folds. It differs from the training's seed, so that seeds compare on one fold."""

    @model_validator(mode="after")
    def _index_is_one_of_them(self) -> FoldSettings:
        if self.index >= self.count:
            raise ValueError(f"folds.index = {self.index}, but {self.count} folds are counted from 0")
        return self


class LiverSettings(MachineSettings):
    """Everything one run of the liver flow depends on."""

    name: RunName
    """Name of the run and its folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the training."""
    train_data: DatasetSettings
    """Data set of healthy livers that trains."""
    test_data: DatasetSettings
    """Data set that is segmented and evaluated."""
    folds: FoldSettings | None = None
    """Cross-validation by patient. None: all of `train_data` trains, all of `test_data` is tested."""
    preprocess: PreprocessSettings = PreprocessSettings()
    """Steps from scan to slices."""
    synthesis: SynthesisSettings = SynthesisSettings()
    """Pseudo anomalies of the training."""
    restoration: NetSettings = NetSettings()
    """Restoration network."""
    segmentation: NetSettings = NetSettings()
    """Segmentation network."""
    train: TrainSettings = TrainSettings()
    """Training of both networks."""
    inference: InferenceSettings = InferenceSettings()
    """Probabilities from the networks."""
    postprocess: PostprocessSettings = PostprocessSettings()
    """Mask from the probabilities."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Comparison with the labels."""

    @model_validator(mode="after")
    def _train_data_is_healthy(self) -> LiverSettings:
        if self.train_data.insert is not None:
            raise ValueError("train_data.insert: lesions are inserted into test scans only")
        in_hu = self.synthesis.kind == "lesions" or self.train.augmentation is not None
        if in_hu and self.preprocess.equalise:
            raise ValueError("synthesis.kind lesions and train.augmentation need preprocess.equalise: false")
        return self

    @model_validator(mode="after")
    def _only_restoration_may_lack_skips(self) -> LiverSettings:
        if self.segmentation.architecture != "unet":
            raise ValueError("segmentation.architecture: the segmentation network is always a U-Net (unet)")
        return self


LiverChanges = Annotated[dict[str, Any], changes_of(LiverSettings)]
"""Values by dotted key, put over settings of the liver flow."""


def flatten_keys(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted key, however deep."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten_keys(value, f"{parent}{key}.")
        else:
            yield f"{parent}{key}", value


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> LiverSettings:
    """Read a YAML configuration, with values by dotted key put over the file's. Raises ConfigError."""
    return load_settings(LiverSettings, path, overrides)


def parse(values: Mapping[str, Any], *, source: str) -> LiverSettings:
    """Validate settings already read; `source` names them in the error. Raises ConfigError."""
    return parse_settings(LiverSettings, values, source=source)
