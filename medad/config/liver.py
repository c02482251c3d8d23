"""Settings of the liver flow. The defaults are the values of the thesis (chapter 3).

The thesis is Zhang, Enhancing Visual Anomaly Detection with Auxiliary Information, University of Alberta, 2024.

The settings are frozen and typed, and names carry their units. If a value is wrong, `load` names the file, the key and
the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from medad.base.private import DataRoot, PrivateCases, PrivateExpression, PrivatePattern, changes_of
from medad.base.settings import MachineSettings, RunName, Settings, load_settings, parse_settings
from medad.config.anomalies import SynthesisSettings
from medad.config.header import HeaderSettings
from medad.config.series import SeriesSettings
from medad.config.training import ClassifierSettings, TrainSettings


class InsertSettings(Settings):
    """Lesions of known shape and contrast, inserted in HU into a healthy liver before preprocessing."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the lesions' sizes, shapes and places."""
    count: Annotated[int, Field(ge=1, le=50)] = 4
    """Number of lesions in each scan."""
    diameter_mm: tuple[float, float] = (12.0, 40.0)
    """Range of the longest axis, in mm."""
    contrast_hu: tuple[float, float] = (-60.0, -40.0)
    """Range of the HU added to the liver. Negative values make a lesion darker than liver, for example in the portal
    venous phase."""
    edge_mm: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the Gaussian that softens a lesion's edge, in mm."""
    kind: Literal["uniform", "mixed"] = "uniform"
    """Kind of lesion. `uniform`: one contrast everywhere. `mixed`: the contrast in an irregular core and the opposite
    contrast in the rim, for example in treated tumours and HCC."""
    place: Literal["inside", "rim"] = "inside"
    """Place of a lesion. `inside`: away from the liver's surface. `rim`: the lesion touches or crosses the surface;
    only its part inside the liver counts."""
    fit: Literal["error", "fewer"] = "error"
    """Reaction if the liver has no room for all lesions. `error`: the case fails. `fewer`: insert as many as fit."""
    diameter_distribution: Literal["uniform", "log_uniform"] = "uniform"
    """Distribution of the lesions' diameters within their range."""

    @model_validator(mode="after")
    def _sizes(self) -> InsertSettings:
        if not 0 < self.diameter_mm[0] <= self.diameter_mm[1]:
            raise ValueError("diameter_mm must be (low, high) with 0 < low <= high")
        return self


class DatasetSettings(HeaderSettings):
    """A data set: its folder and the layout of its files.

    `layout="btcv"`: img/img0001.nii.gz + label/label0001.nii.gz, liver = 6.
    `layout="lits"`: volume-N.nii[.gz] + segmentation-N.nii[.gz], liver = 1, tumour = 2.
    `layout="folder"`: `images` and `labels` are glob patterns below `root`. Each has one `*`, which matches the
    name of the case. A folder that matches `images` is read as a DICOM series.
    """

    root: DataRoot
    """Folder of the data set. `samples:NAME` is a folder of the sample data (`adflows samples`)."""
    layout: Literal["btcv", "lits", "folder"]
    """Layout of the files: `btcv`, `lits` or `folder`, as described above."""
    images: PrivatePattern | None = None
    """Pattern of the scans, for layout `folder` only."""
    labels: PrivatePattern | None = None
    """Pattern of the label files, for layout `folder` only. None: the data set has no labels."""
    liver_labels: tuple[int, ...] | None = None
    """Label values that make up the liver. None: the layout's own values (btcv 6; lits 1 and 2).
    Empty: the label's only value, which must be 1."""
    tumour_label: int | None = None
    """Label value of tumour. Only the evaluation uses it. None: the layout's own value (lits 2)."""
    cases: PrivateCases | None = None
    """Cases to use, each by its id or by the name in its file name. None: all cases."""
    patients: PrivateExpression | None = None
    """Regular expression that finds the patient in a case's name, for data with several scans per patient. It has one
    group, which matches the patient. A case's name is `btcv-0001`, `lits-17` or, in layout `folder`, the text that `*`
    matches. Cases with the same match belong to the same patient, also across both data sets. For a DICOM series the
    PatientID is used instead, if it has one. None: each scan is its own patient."""
    series: SeriesSettings | None = None
    """Choice between several CT series of a DICOM folder. None: the one on the grid of the label; else the case
    fails."""
    fill_cavities: bool = False
    """Filling of closed cavities of liver masks, in which a tumour may have been left out. Scans given by hand and
    inboxes always do this."""
    pseudonyms: bool = False
    """Use of pseudonyms as case ids, for file names that may contain patient data. DICOM series always get
    pseudonyms."""
    insert: InsertSettings | None = None
    """Lesions to insert into the scans, for test data only. None: no lesion is inserted."""

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
                f"liver_labels {list(self.liver_labels)} must include the tumour's value ({tumour}): it is liver too"
            )
        return self

    @field_validator("patients")
    @classmethod
    def _one_group(cls, patients: str | None) -> str | None:
        if patients is not None:
            try:
                groups = re.compile(patients).groups
            except re.error as error:
                raise ValueError(f"`patients` is not a regular expression ({error})") from error
            if groups != 1:
                raise ValueError(f"`patients` needs exactly one group, which is the patient; found {groups}")
        return patients


class PreprocessSettings(Settings):
    """Preprocessing of a scan: HU -> grey -> liver ROI -> axial slices -> histogram equalisation (section 3.4.1)."""

    window_hu: tuple[float, float] = (-200.0, 250.0)
    """HU values that become grey 0 and grey 255."""
    slice_px: Annotated[int, Field(ge=32, le=1024, multiple_of=16)] = 256
    """Side of a slice, in pixels."""
    equalise: bool = True
    """Histogram equalisation of each slice."""
    lift_dark: bool = True
    """Shift of equalised values 0..149 to 30..150, so that dark liver never merges with the background."""
    min_liver_px: Annotated[int, Field(ge=1)] = 1
    """Smallest number of liver pixels in a slice. Slices with fewer liver pixels are left out."""
    standardise: Literal["none", "median"] = "none"
    """Origin of the HU scale. `median`: HU and `window_hu` are relative to the median HU of the scan's liver."""
    resolution_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Standard deviation of the point spread to which the liver is smoothed along each axis, in mm. Scans with
    different voxel sizes then look alike, also in their noise. Only voxels of the liver are used. 0: no smoothing."""
    background: Literal["zero", "median"] = "zero"
    """Grey value outside the liver. `median`: the grey value of the liver's median, so that the rim is not an edge."""
    frame_mm: Annotated[float, Field(ge=50, le=600)] | None = None
    """Side of the square around the liver that slices show, in mm. A larger liver makes the square larger. None: slices
    show whole planes."""

    @model_validator(mode="after")
    def _ranges(self) -> PreprocessSettings:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu must be (low, high) with low < high")
        if self.background == "median" and (self.equalise or self.standardise != "median"):
            raise ValueError("background median needs standardise: median and equalise: false")
        return self


class NetSettings(Settings):
    """A network: a MONAI U-Net with two 3x3 convolutions per block, or DRAEM's auto-encoder."""

    architecture: Literal["unet", "autoencoder"] = "unet"
    """Architecture of the network. `autoencoder`: DRAEM's network without skip connections, for the restoration
    network only."""
    widths: Annotated[tuple[int, ...], Field(min_length=3, max_length=7)] = (64, 128, 256, 512)
    """Numbers of channels, one per level."""
    groups: Annotated[int, Field(ge=1)] = 8
    """Number of groups of the group norm. It must divide every width."""

    @model_validator(mode="after")
    def _divides(self) -> NetSettings:
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups = {self.groups} must divide every width in {self.widths}")
        return self


class PostprocessSettings(Settings):
    """Postprocessing: from probabilities to lesions."""

    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["auto", "calibrated"] = 0.5
    """Probability from which a voxel is tumour. `auto`: a threshold for each scan by the triangle method, computed in
    the liver and limited to `auto_range`. It needs no label. `calibrated`: the threshold that was calibrated at the end
    of the training on healthy scans that were left out. It needs `train.members` of at least 2."""
    false_positive_ml: Annotated[float, Field(gt=0)] = 5.0
    """Mean volume that may reach the threshold in a healthy liver, in ml. It limits the `calibrated` threshold."""
    outline_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the threshold down to which a lesion is outlined. A lesion is a connected part with at least this share
    of the threshold everywhere, and with the threshold itself somewhere. 1: the threshold decides the outline, too."""
    auto_range: tuple[float, float] = (0.35, 0.5)
    """Range of thresholds that `auto` may choose."""
    min_lesion_mm3: Annotated[float, Field(ge=0)] = 0.0
    """Smallest volume of a lesion, in mm³. Smaller lesions are removed."""

    @model_validator(mode="after")
    def _range_rises(self) -> PostprocessSettings:
        if not 0 < self.auto_range[0] <= self.auto_range[1] < 1:
            raise ValueError("auto_range must be (low, high) with 0 < low <= high < 1")
        return self


class EvaluationSettings(Settings):
    """Comparison of lesions with the labels."""

    lesion_overlap: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of a true lesion's voxels that the predicted mask must contain for the lesion to count as found."""


class CombineSettings(Settings):
    """Weights of the maps that make up the probability. The four weights must add up to one."""

    scale: Literal["probability", "logit"] = "probability"
    """Scale on which the weighted mean is computed. `logit`: a map that is very sure then counts more."""

    segmentation: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of the segmentation network's map."""
    residual: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the difference between the slice and its restoration."""
    deviation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the slice's difference from the median grey value of this liver. This map needs no network."""
    classifier: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the voxel classifier's map. It needs `classifier` settings."""
    scale_mm: Annotated[float, Field(gt=0, le=30)] = 5.0
    """Standard deviation of the Gaussian that smooths residual and deviation, in mm."""
    centre_z: Annotated[float, Field(gt=0)] = 3.0
    """Number of robust standard deviations above the map's median in the liver at which residual and deviation become
    probability 1/2."""

    @model_validator(mode="after")
    def _weights(self) -> CombineSettings:
        if abs(self.segmentation + self.residual + self.deviation + self.classifier - 1) > 1e-6:
            raise ValueError("segmentation, residual, deviation and classifier must add up to 1")
        return self


class InferenceSettings(Settings):
    """Inference: from a liver to probabilities."""

    exclude: tuple[Literal["fat", "vessels"], ...] = ()
    """Tissue that is removed from the liver mask of a scan to segment. `vessels`: thick bright tissue that lies mostly
    outside the mask, such as the vena cava, the portal vein's trunk or a kidney. `fat`: larger pieces of fat, as in
    fissures and the gallbladder bed. Training livers keep both, so that they are learned as healthy."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Number of slices per batch."""
    flips: bool = False
    """Averaging over four versions of a slice: as it is, flipped left-right, flipped front-back, and flipped both
    ways. The members of a model divide the versions among them."""
    combine: CombineSettings = CombineSettings()
    """Weights of the maps that make up the probability."""
    smooth_mm: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Standard deviation of the Gaussian that smooths the probabilities in the liver in all three dimensions, in mm.
    0: no smoothing."""


class FoldSettings(Settings):
    """Cross-validation by patient: one fold is tested, and the others train."""

    count: Annotated[int, Field(ge=2)]
    """Number of folds."""
    index: Annotated[int, Field(ge=0)]
    """Index of the fold that is tested, counted from 0."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed that assigns patients to folds. It is separate from the training's seed, so that trainings with different
    seeds use the same folds."""

    @model_validator(mode="after")
    def _index_is_one_of_them(self) -> FoldSettings:
        if self.index >= self.count:
            raise ValueError(f"folds.index = {self.index}, but it must be below folds.count = {self.count}")
        return self


class LiverSettings(MachineSettings):
    """All settings of one run of the liver flow."""

    name: RunName
    """Name of the run and of its folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the training."""
    train_data: DatasetSettings
    """Data set of healthy livers for training."""
    test_data: DatasetSettings
    """Data set to segment and evaluate."""
    folds: FoldSettings | None = None
    """Cross-validation by patient. None: all cases of `train_data` train, and all cases of `test_data` are tested."""
    preprocess: PreprocessSettings = PreprocessSettings()
    """Preprocessing: from scan to slices."""
    synthesis: SynthesisSettings = SynthesisSettings()
    """Pseudo anomalies for the training."""
    restoration: NetSettings = NetSettings()
    """Restoration network."""
    segmentation: NetSettings = NetSettings()
    """Segmentation network."""
    classifier: ClassifierSettings | None = None
    """Voxel classifier. None: the model has only the two networks."""
    train: TrainSettings = TrainSettings()
    """Training of both networks."""
    inference: InferenceSettings = InferenceSettings()
    """Inference: from slices to probabilities."""
    postprocess: PostprocessSettings = PostprocessSettings()
    """Postprocessing: from probabilities to the mask."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Comparison of the results with the labels."""
    viewer: bool = True
    """Pages to scroll through the scan of each case."""

    @model_validator(mode="after")
    def _train_data_is_healthy(self) -> LiverSettings:
        if self.train_data.insert is not None:
            raise ValueError("train_data.insert: lesions are inserted into test scans only")
        in_hu = self.needs_solid_lesions or self.synthesis.kind == "lesions" or self.train.augmentation is not None
        if in_hu and self.preprocess.equalise:
            raise ValueError("lesions in HU, classifier and train.augmentation need preprocess.equalise: false")
        return self

    @model_validator(mode="after")
    def _members_and_maps(self) -> LiverSettings:
        if self.inference.combine.classifier > 0 and self.classifier is None:
            raise ValueError("inference.combine.classifier needs `classifier` settings")
        if self.postprocess.threshold == "calibrated" and self.train.members < 2:
            raise ValueError("postprocess.threshold calibrated needs train.members of at least 2")
        if self.postprocess.threshold == "calibrated" and self.preprocess.equalise:
            raise ValueError("postprocess.threshold calibrated needs preprocess.equalise: false")
        if self.train.members > 1 and (self.train.schedule == "joint" or self.train.snapshot_epochs):
            raise ValueError("train.members above 1 needs schedule two_phase and no snapshots")
        return self

    @property
    def needs_solid_lesions(self) -> bool:
        """Return whether the training uses copies of the scans with lesions in three dimensions."""
        return self.synthesis.kind == "solid_lesions" or self.classifier is not None

    @model_validator(mode="after")
    def _only_restoration_may_lack_skips(self) -> LiverSettings:
        if self.segmentation.architecture != "unet":
            raise ValueError("segmentation.architecture: the segmentation network is always a U-Net (unet)")
        return self


LiverChanges = Annotated[dict[str, Any], changes_of(LiverSettings)]
"""Changes of liver settings: new value by dotted key."""


def flatten_keys(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf of nested settings."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten_keys(value, f"{parent}{key}.")
        else:
            yield f"{parent}{key}", value


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> LiverSettings:
    """Read a YAML configuration and apply overrides by dotted key. Raises ConfigError."""
    return load_settings(LiverSettings, path, overrides)


def parse(values: Mapping[str, Any], *, source: str) -> LiverSettings:
    """Validate settings that were already read. `source` names them in the error. Raises ConfigError."""
    return parse_settings(LiverSettings, values, source=source)
