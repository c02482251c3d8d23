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

MOST_SCALE_EXPONENT = 8
"""2^8 lattice cells a side: one a pixel at the thesis's 256 px."""


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


class LesionSettings(Settings):
    """Pseudo lesions in HU (`medad.anomalies.lesions`); slices must be linear in HU (`preprocess.equalise: false`)."""

    most: Annotated[int, Field(ge=1, le=8)] = 3
    """Lesions in a slice, 1 to so many."""
    empty_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of slices that stay healthy."""
    diameter_mm: tuple[float, float] = (4.0, 100.0)
    """Longest axis of the cut, log-uniform."""
    shortest_axis: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least ratio of the two axes."""
    contrast_hu: tuple[float, float] = (12.0, 120.0)
    """Size of the contrast, log-uniform."""
    bright_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    mixed_share: Annotated[float, Field(ge=0, le=1)] = 0.35
    edge_mm: tuple[float, float] = (0.5, 4.0)
    """Standard deviation of the Gaussian that softens the outline."""
    unevenness: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Standard deviation, at most, of the outline's relative distance from the ellipse."""
    outline_px: tuple[float, float] = (2.0, 8.0)
    """Over how many pixels outline and texture change, in small and in large lesions."""
    texture_hu: tuple[float, float] = (0.0, 15.0)


class VariationSettings(Settings):
    """Normal variation painted into healthy slices (`medad.anomalies.augment`); slices must be linear in HU."""

    offset_hu: Annotated[float, Field(ge=0)] = 8.0
    gain_log: Annotated[float, Field(ge=0)] = 0.2
    """Contrast within the liver is multiplied by exp of up to this, either way."""
    field_hu: Annotated[float, Field(ge=0)] = 8.0
    """Standard deviation, at most, of a slow inhomogeneity."""
    field_px: Annotated[float, Field(gt=0)] = 16.0
    shade_hu: tuple[float, float] = (-40.0, 25.0)
    """How much one side of a slice differs from the other: hardened beams, arms in the field, uneven fat."""
    shade_mm: tuple[float, float] = (6.0, 60.0)
    """Over how many mm that sets in, log-uniform."""
    vessels: Annotated[int, Field(ge=0, le=16)] = 6
    """At most so many painted vessels."""
    vessel_mm: tuple[float, float] = (3.0, 14.0)
    vessel_length: tuple[float, float] = (2.0, 16.0)
    """Half a vessel's length, in radii."""
    vessel_hu: tuple[float, float] = (-40.0, 90.0)
    rim_px: Annotated[float, Field(ge=0)] = 2.0
    rim_hu: tuple[float, float] = (-60.0, 30.0)
    noise_hu: tuple[float, float] = (0.0, 20.0)
    grain_px: Annotated[float, Field(gt=0)] = 1.0


class TextureSettings(Settings):
    """DRAEM's pseudo anomalies: a texture laid, half transparent, over a Perlin mask (Zavrtanik et al., 2021)."""

    folder: DataRoot | None = None
    """A folder of pictures (such as DTD), read as grey. None: textures are generated."""
    opacity: tuple[float, float] = (0.2, 1.0)
    """Range of the texture's opacity, drawn evenly: DRAEM's 1 - beta, beta ~ U(0, 0.8)."""
    scale_exponents: tuple[int, int] = (0, 5)
    """A mask's noise has 2^U{low..high} lattice cells along each axis, each axis by itself."""
    rotation_deg: tuple[float, float] = (-90.0, 90.0)
    threshold: float = 0.5
    """Noise, about -1..1, above this is anomalous. Lower gives larger anomalies."""
    clean_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of slices that stay as they are, with an empty mask; DRAEM's public code: one half."""

    @model_validator(mode="after")
    def _ranges(self) -> TextureSettings:
        if not 0 <= self.opacity[0] <= self.opacity[1] <= 1:
            raise ValueError("opacity must be (low, high) with 0 <= low <= high <= 1")
        if not 0 <= self.scale_exponents[0] <= self.scale_exponents[1] <= MOST_SCALE_EXPONENT:
            raise ValueError(f"scale_exponents must be (low, high) with 0 <= low <= high <= {MOST_SCALE_EXPONENT}")
        if self.rotation_deg[0] > self.rotation_deg[1]:
            raise ValueError("rotation_deg must be (low, high) with low <= high")
        return self


class SynthesisSettings(Settings):
    """Algorithm 1 and the meant eq. 3.1; DRAEM's Perlin masks and textures; or lesions in HU."""

    kind: Literal["blobs", "perlin_texture", "lesions"] = "blobs"
    """`blobs`: one grey shift in blobs of blurred noise, by the settings below (the thesis). `perlin_texture`: a
    texture in Perlin masks, by the group `texture` alone (DRAEM, the thesis's baseline). `lesions`: by the group
    `lesions` alone."""
    texture: TextureSettings = TextureSettings()
    lesions: LesionSettings = LesionSettings()
    blur_sigma_px: Annotated[float, Field(gt=0)] = 15.0
    threshold_grey: Annotated[float, Field(gt=0, lt=255)] = 200.0
    ellipse_px: Annotated[int, Field(ge=1, le=63)] = 9
    """Side of the elliptical structuring element; odd."""
    shift_grey: tuple[float, float] = (60.0, 100.0)
    """Range of |C|, the constant added inside the mask; the sign is drawn with it."""
    shift_distribution: Literal["uniform", "normal"] = "uniform"
    """`normal`: zero mean, sd = half the upper limit, truncated to the range."""

    @model_validator(mode="after")
    def _ranges(self) -> SynthesisSettings:
        if not 0 <= self.shift_grey[0] < self.shift_grey[1] <= 255:
            raise ValueError("shift_grey must be (low, high) with 0 <= low < high <= 255")
        if self.ellipse_px % 2 == 0:
            raise ValueError("ellipse_px must be odd")
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


class InboxSettings(Settings):
    """A folder into which scans are dropped, and where each goes once it is segmented.

    `scans` and `livers` are patterns below `inbox` as in `DatasetSettings`' layout folder: one `*` each, which stands
    for the case.
    """

    name: RunName
    inbox: DataRoot
    """Folder that is looked into and never written to."""
    out: DataRoot
    """Folder of results: one folder a case, `failed/`, and the overview."""
    model: DataRoot
    """Folder of a run with trained networks."""
    scans: PrivatePattern
    livers: PrivatePattern
    liver_labels: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    """Values of liver in the masks."""
    settle_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """A scan is read once none of its files has changed for so long: until then it may still be arriving."""
    affine_mismatch: Literal["error", "warn"] = "error"
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    settings: LiverChanges = Field(default_factory=dict)
    """Values put over those of the model's run, by dotted key: where it computes, `postprocess.threshold`."""

    @model_validator(mode="after")
    def _patterns_and_folders(self) -> InboxSettings:
        for name in ("scans", "livers"):
            pattern = getattr(self, name)
            if pattern.count("*") != 1:
                raise ValueError(f"`{name}` must be a pattern with exactly one *, which stands for the case")
            if pattern.startswith("/") or ".." in Path(pattern).parts:
                raise ValueError(f"`{name}` must be a pattern below the inbox")
        if self.scans == self.livers:
            raise ValueError("`scans` and `livers` are the same pattern")
        inbox, out, model = (folder.resolve() for folder in (self.inbox_folder, self.out_folder, self.model_folder))
        if inbox == out or inbox in out.parents or out in inbox.parents:
            raise ValueError("`inbox` and `out` must be two folders, neither inside the other")
        if model == out:
            raise ValueError("`out` is the model's folder; results need one of their own")
        return self

    @property
    def inbox_folder(self) -> Path:
        return Path(self.inbox).expanduser().absolute()

    @property
    def out_folder(self) -> Path:
        return Path(self.out).expanduser().absolute()

    @property
    def model_folder(self) -> Path:
        return Path(self.model).expanduser().absolute()

    @property
    def settings_by_key(self) -> dict[str, Any]:
        """`settings` by dotted key, however deep they were nested."""
        return dict(by_key(self.settings))

    def data(self, root: str) -> DatasetSettings:
        """The inbox as a data set, at `root`; file names name no case."""
        return DatasetSettings(
            root=root,
            layout="folder",
            images=self.scans,
            labels=self.livers,
            liver_labels=self.liver_labels,
            affine_mismatch=self.affine_mismatch,
            affine_from=self.affine_from,
            opaque_ids=True,
        )


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> LiverSettings:
    """Read a YAML configuration, with values by dotted key put over the file's. Raises ConfigError."""
    return load_settings(LiverSettings, path, overrides)


def load_inbox(path: Path, overrides: Mapping[str, Any] | None = None) -> InboxSettings:
    """As `load`, for an inbox. Raises ConfigError."""
    return load_settings(InboxSettings, path, overrides)


def parse(values: Mapping[str, Any], *, source: str) -> LiverSettings:
    """Validate settings already read; `source` names them in the error. Raises ConfigError."""
    return parse_settings(LiverSettings, values, source=source)
