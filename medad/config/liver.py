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
from medad.config.anomalies import SynthesisSettings, VariationSettings


class PlantSettings(Settings):
    """Lesions of known shape and contrast, planted in HU into a healthy liver before preprocessing."""

    seed: Annotated[int, Field(ge=0)] = 0
    count: Annotated[int, Field(ge=1, le=50)] = 4
    diameter_mm: tuple[float, float] = (12.0, 40.0)
    contrast_hu: tuple[float, float] = (-60.0, -40.0)
    """Range of the added contrast; negative is darker than liver, as in the portal venous phase."""
    edge_mm: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the Gaussian that softens the lesion's edge."""
    kind: Literal["uniform", "mixed"] = "uniform"
    """`mixed`: the contrast in an irregular core, its opposite in the rim around it, as in treated tumours and HCC."""
    place: Literal["inside", "rim"] = "inside"
    """`inside`: clear of the liver's surface. `rim`: touching or crossing it; only what is inside the liver counts."""
    fit: Literal["error", "fewer"] = "error"
    """When the liver has no room for all lesions."""
    diameter_distribution: Literal["uniform", "log_uniform"] = "uniform"
    """How sizes are drawn from their range."""

    @model_validator(mode="after")
    def _sizes(self) -> PlantSettings:
        if not 0 < self.diameter_mm[0] <= self.diameter_mm[1]:
            raise ValueError("diameter_mm must be (low, high) with 0 < low <= high")
        return self


class DatasetSettings(Settings):
    """Where the cases are and how they are laid out.

    `layout="btcv"`: img/img0001.nii.gz + label/label0001.nii.gz, liver = 6.
    `layout="lits"`: volume-N.nii[.gz] + segmentation-N.nii[.gz], liver = 1, tumour = 2.
    `layout="folder"`: `images` and `labels` are glob patterns below `root`, each with one `*` that stands for the
    case; a folder matched by `images` is read as a DICOM series.
    """

    root: DataRoot
    """A folder; `samples:NAME` is a folder of the sample data (`adflows samples`)."""
    layout: Literal["btcv", "lits", "folder"]
    images: PrivatePattern | None = None
    labels: PrivatePattern | None = None
    liver_labels: tuple[int, ...] | None = None
    """Label values that make up the liver ROI. None: the layout's own (btcv 6; lits 1 and 2)."""
    tumour_label: int | None = None
    """Label value of tumour, used by evaluation alone. None: the layout's own (lits 2)."""
    cases: PrivateCases | None = None
    """Case ids to use, or what the files' names make of them. None: all."""
    patients: PrivateExpression | None = None
    """Regular expression whose one group is the patient, where several scans are of one: it is searched for in a case's
    name (`btcv-0001`, `lits-17`, in layout folder what `*` stands for). The same text is the same patient in both data
    sets. A DICOM series' own PatientID goes before. None: each scan is a patient of its own."""
    affine_mismatch: Literal["error", "warn"] = "error"
    """What to do when scan and label have one shape but different affines (LiTS 28-47 have identity affines)."""
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    """Which NIfTI affine counts. `agree` refuses a file whose sform and qform differ."""
    opaque_ids: bool = False
    """Name cases by an opaque id instead of by file name, where file names may hold patient data. DICOM series always
    are."""
    plant: PlantSettings | None = None

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
    slice_px: Annotated[int, Field(ge=32, le=1024, multiple_of=16)] = 256
    equalise: bool = True
    lift_dark: bool = True
    """Move equalised values 1..149 to 30..150, so that dark liver never merges with the background."""
    min_liver_px: Annotated[int, Field(ge=1)] = 1
    """Slices with fewer liver pixels than this, on the slice grid, are left out."""
    standardise: Literal["none", "median"] = "none"
    """`median`: HU are taken from the median of the volume's liver, and so is `window_hu`."""
    resolution_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Smooth the liver, axis by axis, until the point spread's standard deviation is at least this: voxels of every
    size, and their noise, become alike. What lies outside the liver has no part in it. 0: as scanned."""
    background: Literal["zero", "median"] = "zero"
    """Grey value outside the liver. `median`: that of the liver's median, so that the rim is no edge."""
    frame_mm: Annotated[float, Field(ge=50, le=600)] | None = None
    """Side of the square about the liver that slices show, at least the liver's extent. None: whole planes."""

    @model_validator(mode="after")
    def _ranges(self) -> PreprocessSettings:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu must be (low, high) with low < high")
        if self.background == "median" and (self.equalise or self.standardise != "median"):
            raise ValueError("background median needs standardise: median and equalise: false")
        return self


class NetSettings(Settings):
    """A MONAI U-Net: one width a level, two 3x3 convolutions a block; or DRAEM's auto-encoder."""

    architecture: Literal["unet", "autoencoder"] = "unet"
    """`autoencoder`, for the restoration network alone: DRAEM's, which has no skip connections."""
    widths: Annotated[tuple[int, ...], Field(min_length=3, max_length=7)] = (64, 128, 256, 512)
    groups: Annotated[int, Field(ge=1)] = 8
    """Groups of the group norm; divides every width."""

    @model_validator(mode="after")
    def _divides(self) -> NetSettings:
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups = {self.groups} must divide every width in {self.widths}")
        return self


class PhaseSettings(Settings):
    """One training phase: Adam."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    rate: Literal["constant", "one_cycle"] = "constant"
    """`one_cycle`: from a 25th of `learning_rate` up to it over the first three tenths, then down to nothing, along
    cosines: a short training ends settled (Smith and Topin, 2019)."""


class FocalSettings(Settings):
    alpha: Annotated[float, Field(gt=0)] = 1.0
    gamma: Annotated[float, Field(ge=0)] = 2.0


class TrainSettings(Settings):
    restoration: PhaseSettings = PhaseSettings(epochs=200)
    segmentation: PhaseSettings = PhaseSettings(epochs=1)
    focal: FocalSettings = FocalSettings()
    schedule: Literal["two_phase", "joint"] = "two_phase"
    """`two_phase`: the restoration network, then, with it frozen, the segmentation network (the thesis). `joint`: both
    at once, by the sum of their losses (DRAEM); epochs, batch size and learning rate are those of `restoration`."""
    restoration_loss: Literal["l1", "l2_ssim"] = "l1"
    """`l1`: eq. 3.2. `l2_ssim`: DRAEM's, squared error + 1 - SSIM with a window of 11 px."""
    snapshot_epochs: Annotated[int, Field(ge=0)] = 0
    """Phase two also writes its network every so many epochs and after the last; 0: only the trained one."""
    variation: VariationSettings | None = None
    """Normal variation painted into healthy slices. None: slices as they are (the thesis)."""
    mirror: bool = False
    """Slices are turned over at random, left-right and front-back."""
    mixed_precision: bool = True
    """bfloat16 autocast on GPU; never on CPU."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0

    @model_validator(mode="after")
    def _snapshots_are_phase_twos(self) -> TrainSettings:
        if self.snapshot_epochs and self.schedule == "joint":
            raise ValueError("snapshot_epochs belongs to schedule two_phase: joint training has no phase two")
        if self.snapshot_epochs and self.segmentation.rate != "constant":
            raise ValueError("snapshot_epochs needs segmentation.rate constant: else a snapshot is no shorter training")
        return self


class PostprocessSettings(Settings):
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = 0.5
    """`auto`: the triangle method's threshold of the probabilities inside this scan's liver, kept within `auto_range`;
    no label is needed."""
    auto_range: tuple[float, float] = (0.35, 0.5)
    min_lesion_mm3: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _range_rises(self) -> PostprocessSettings:
        if not 0 < self.auto_range[0] <= self.auto_range[1] < 1:
            raise ValueError("auto_range must be (low, high) with 0 < low <= high < 1")
        return self


class EvaluationSettings(Settings):
    lesion_overlap: Annotated[float, Field(gt=0, le=1)] = 0.1
    """A true lesion counts as found when at least this fraction of its voxels is in the predicted mask."""


class CombineSettings(Settings):
    """Weights of the maps that make up the probability; they must add up to one."""

    segmentation: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The segmentation network's."""
    residual: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the restoration is from the query."""
    deviation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the query is from the grey value of most of this liver: no network."""
    scale_mm: Annotated[float, Field(gt=0, le=30)] = 5.0
    """Residual and deviation are means over Gaussian neighbourhoods of this standard deviation."""
    centre_z: Annotated[float, Field(gt=0)] = 3.0
    """They become probability 1/2 where they are so many robust standard deviations above the liver's median."""

    @model_validator(mode="after")
    def _weights(self) -> CombineSettings:
        if abs(self.segmentation + self.residual + self.deviation - 1) > 1e-6:
            raise ValueError("segmentation, residual and deviation must add up to 1")
        return self


class InferenceSettings(Settings):
    batch_size: Annotated[int, Field(ge=1)] = 8
    flips: bool = False
    """Mean over the slice and its mirror images, left-right, front-back and both."""
    combine: CombineSettings = CombineSettings()
    smooth_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Standard deviation of a Gaussian over the probabilities of neighbouring liver pixels, planes included: a tumour
    is a body, not a run of slices. 0: none."""


class FoldSettings(Settings):
    """Cross-validation by patient: one fold is tested, the others train."""

    count: Annotated[int, Field(ge=2)]
    index: Annotated[int, Field(ge=0)]
    """Which fold is tested, from 0."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Deals the patients; another one than the training's, so that seeds of training compare on one fold."""

    @model_validator(mode="after")
    def _index_is_one_of_them(self) -> FoldSettings:
        if self.index >= self.count:
            raise ValueError(f"folds.index = {self.index}, but {self.count} folds are counted from 0")
        return self


class LiverSettings(MachineSettings):
    """Everything one run of the liver flow depends on."""

    name: RunName
    seed: Annotated[int, Field(ge=0)] = 0
    train_data: DatasetSettings
    test_data: DatasetSettings
    folds: FoldSettings | None = None
    """None: all of `train_data` trains, all of `test_data` is tested."""
    preprocess: PreprocessSettings = PreprocessSettings()
    synthesis: SynthesisSettings = SynthesisSettings()
    restoration: NetSettings = NetSettings()
    segmentation: NetSettings = NetSettings()
    train: TrainSettings = TrainSettings()
    inference: InferenceSettings = InferenceSettings()
    postprocess: PostprocessSettings = PostprocessSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _train_data_is_healthy(self) -> LiverSettings:
        if self.train_data.plant is not None:
            raise ValueError("train_data.plant: lesions are planted into test scans only")
        in_hu = self.synthesis.kind == "lesions" or self.train.variation is not None
        if in_hu and self.preprocess.equalise:
            raise ValueError("synthesis.kind lesions and train.variation need preprocess.equalise: false")
        return self

    @model_validator(mode="after")
    def _only_restoration_may_lack_skips(self) -> LiverSettings:
        if self.segmentation.architecture != "unet":
            raise ValueError("segmentation.architecture: the segmentation network is always a U-Net (unet)")
        return self


LiverChanges = Annotated[dict[str, Any], changes_of(LiverSettings)]
"""Values by dotted key, put over settings of the liver flow."""


def by_key(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted key, however deep."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from by_key(value, f"{parent}{key}.")
        else:
            yield f"{parent}{key}", value


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> LiverSettings:
    """Read a YAML configuration, with values by dotted key put over the file's. Raises ConfigError."""
    return load_settings(LiverSettings, path, overrides)


def parse(values: Mapping[str, Any], *, source: str) -> LiverSettings:
    """Validate settings already read; `source` names them in the error. Raises ConfigError."""
    return parse_settings(LiverSettings, values, source=source)
