"""Settings of the liver flow: frozen, typed, units in the names. The defaults are the thesis's (000, chapter 3).

A configuration file holds values only; `load` names the file, the key and the rule when one is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medad.settings import MachineSettings, RunName, Settings, load_settings, parse_settings


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

    root: str
    """A folder; `samples:NAME` is a folder of the sample data (`adflows samples`)."""
    layout: Literal["btcv", "lits", "folder"]
    images: str | None = None
    labels: str | None = None
    liver_labels: tuple[int, ...] | None = None
    """Label values that make up the liver ROI. None: the layout's own (btcv 6; lits 1 and 2)."""
    tumour_label: int | None = None
    """Label value of tumour, used by evaluation alone. None: the layout's own (lits 2)."""
    cases: tuple[str, ...] | None = None
    """Case ids to use, or what the files' names make of them. None: all."""
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


class PreprocessSettings(Settings):
    """HU -> grey -> liver ROI -> axial slices -> histogram equalisation (section 3.4.1)."""

    window_hu: tuple[float, float] = (-200.0, 250.0)
    slice_px: Annotated[int, Field(ge=32, le=1024, multiple_of=16)] = 256
    equalise: bool = True
    lift_dark: bool = True
    """Move equalised values 1..149 to 30..150, so that dark liver never merges with the background."""
    min_liver_px: Annotated[int, Field(ge=1)] = 1
    """Slices with fewer liver pixels than this, on the slice grid, are left out."""

    @model_validator(mode="after")
    def _window_rises(self) -> PreprocessSettings:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu must be (low, high) with low < high")
        return self


class SynthesisSettings(Settings):
    """Algorithm 1 and the meant eq. 3.1."""

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
    """A MONAI U-Net: one width a level, two 3x3 convolutions a block."""

    widths: Annotated[tuple[int, ...], Field(min_length=3, max_length=7)] = (64, 128, 256, 512)
    groups: Annotated[int, Field(ge=1)] = 8
    """Groups of the group norm; divides every width."""

    @model_validator(mode="after")
    def _divides(self) -> NetSettings:
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups = {self.groups} must divide every width in {self.widths}")
        return self


class PhaseSettings(Settings):
    """One training phase: Adam, constant rate."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class FocalSettings(Settings):
    alpha: Annotated[float, Field(gt=0)] = 1.0
    gamma: Annotated[float, Field(ge=0)] = 2.0


class TrainSettings(Settings):
    restoration: PhaseSettings = PhaseSettings(epochs=200)
    segmentation: PhaseSettings = PhaseSettings(epochs=1)
    focal: FocalSettings = FocalSettings()
    mixed_precision: bool = True
    """bfloat16 autocast on GPU; never on CPU."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0


class PostprocessSettings(Settings):
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    min_lesion_mm3: Annotated[float, Field(ge=0)] = 0.0


class EvaluationSettings(Settings):
    lesion_overlap: Annotated[float, Field(gt=0, le=1)] = 0.1
    """A true lesion counts as found when at least this fraction of its voxels is in the predicted mask."""


class InferenceSettings(Settings):
    batch_size: Annotated[int, Field(ge=1)] = 8


class LiverSettings(MachineSettings):
    """Everything one run of the liver flow depends on."""

    name: RunName
    seed: Annotated[int, Field(ge=0)] = 0
    train_data: DatasetSettings
    test_data: DatasetSettings
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
        return self


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
    inbox: str
    """Folder that is looked into and never written to."""
    out: str
    """Folder of results: one folder a case, `failed/`, and the overview."""
    model: str
    """Folder of a run with trained networks."""
    scans: str
    livers: str
    liver_labels: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    """Values of liver in the masks."""
    settle_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """A scan is read once none of its files has changed for so long: until then it may still be arriving."""
    affine_mismatch: Literal["error", "warn"] = "error"
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    settings: Annotated[dict[str, Any], Field(default_factory=dict)]
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
