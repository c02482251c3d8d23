"""Settings of `adflows liver sensitivity`: which lesions are inserted, and what counts as found. Frozen, typed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medad.base.settings import MachineSettings, RunName, Settings, load_settings, parse_settings
from medad.config.liver import DatasetSettings, InsertSettings, LiverChanges, flatten_keys

LesionPlace = Literal["inside", "rim"]
LesionKind = Literal["uniform", "mixed"]


class ContrastSettings(Settings):
    """One contrast of lesions. A pair of numbers alone is the range of a uniform one."""

    hu: tuple[float, float]
    """Range of the contrast against the surrounding liver; for a mixed lesion, of its core."""
    kind: LesionKind = "uniform"
    """Kind of lesion."""

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return {"hu": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_sign(self) -> ContrastSettings:
        low, high = self.hu
        if not (low <= high and low * high > 0):
            raise ValueError("hu must be (low, high) with low <= high, both below 0 or both above 0")
        return self

    @property
    def label(self) -> str:
        """As tables show it."""
        low, high = (f"{value:+g}".replace("-", "−") for value in self.hu)
        return f"{'mixed, core ' if self.kind == 'mixed' else ''}{low} to {high} HU"


class SensitivitySettings(MachineSettings):
    """Everything one study of inserted lesions depends on, beside the model."""

    name: RunName = "sensitivity"
    """Name of the study."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sizes, shapes and places."""
    healthy: DatasetSettings
    """Healthy scans that did not train the model."""
    diameters_mm: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2)] = (
        5.0, 8.0, 12.0, 20.0, 30.0, 45.0, 60.0,
    )  # fmt: skip
    """Edges of the size bins, for the longest axis. Sizes are log-uniform within a bin."""
    contrasts_hu: Annotated[tuple[ContrastSettings, ...], Field(min_length=1)] = (
        ContrastSettings(hu=(-80.0, -50.0)),
        ContrastSettings(hu=(-50.0, -30.0)),
        ContrastSettings(hu=(-30.0, -15.0)),
        ContrastSettings(hu=(15.0, 30.0)),
        ContrastSettings(hu=(30.0, 50.0)),
        ContrastSettings(hu=(50.0, 80.0)),
        ContrastSettings(hu=(-60.0, -30.0), kind="mixed"),
    )
    """Contrasts. A pair of numbers is the range of a uniform one."""
    places: Annotated[tuple[LesionPlace, ...], Field(min_length=1)] = ("inside", "rim")
    """Places of the lesions."""
    repeats: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of lesions per scan, size, contrast and place."""
    lesions_per_volume: Annotated[int, Field(ge=1, le=20)] = 3
    """Largest number of lesions inserted at a time, each of another size. More save time, but share their
    surroundings."""
    edge_mm: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the Gaussian that softens a lesion's edge."""
    false_positive_ml: Annotated[float, Field(gt=0)] = 5.0
    """Volume that may be marked in the liver without lesions. It fixes the threshold of each scan."""
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of a lesion's voxels that must be marked for the lesion to count as found."""
    surroundings_mm: Annotated[float, Field(gt=0)] = 10.0
    """Distance from a lesion within which marked voxels count in its Dice."""
    settings: LiverChanges = Field(default_factory=dict)
    """Changes of the model run's settings by dotted key, as `inference.batch_size`."""

    @model_validator(mode="after")
    def _bins(self) -> SensitivitySettings:
        if any(low >= high for low, high in self.bins):
            raise ValueError("diameters_mm must rise")
        if len(set(self.places)) < len(self.places) or len({one.label for one in self.contrasts_hu}) < len(
            self.contrasts_hu
        ):
            raise ValueError("places and contrasts_hu must name each once")
        if self.healthy.insert is not None:
            raise ValueError("healthy.insert: the study inserts its own lesions")
        if wrong := [key for key in self.settings if key.split(".")[0] in ("train_data", "test_data")]:
            raise ValueError(f"settings.{wrong[0]}: the study's scans are those of `healthy`")
        return self

    @property
    def settings_by_key(self) -> dict[str, Any]:
        """`settings` by dotted key, however deep they were nested."""
        return dict(flatten_keys(self.settings))

    @property
    def bins(self) -> list[tuple[float, float]]:
        """Size bins, (from, to) in mm."""
        return list(zip(self.diameters_mm, self.diameters_mm[1:], strict=False))

    @property
    def measure_settings(self) -> MeasureSettings:
        """What decides an inserted volume's figures, beside its lesions."""
        return MeasureSettings(
            false_positive_ml=self.false_positive_ml, overlap=self.overlap, surroundings_mm=self.surroundings_mm
        )

    def volumes(self) -> list[InsertionSettings]:
        """The volumes to insert in each scan: sizes dealt out so that those of one volume differ as far as they can."""
        groups = -(-len(self.bins) // self.lesions_per_volume)
        return [
            InsertionSettings(
                seed=self.seed,
                repeat=repeat,
                group=group,
                bins_mm=tuple(self.bins[group::groups]),
                contrast=contrast,
                place=place,
                edge_mm=self.edge_mm,
            )
            for place in self.places
            for contrast in self.contrasts_hu
            for repeat in range(self.repeats)
            for group in range(groups)
        ]


class MeasureSettings(Settings):
    """What counts as found; see `SensitivitySettings`."""

    false_positive_ml: float
    """Volume that may be marked in the liver without lesions."""
    overlap: float
    """Fraction of a found lesion's voxels that are marked."""
    surroundings_mm: float
    """Distance from a lesion within which marked voxels count."""


class InsertionSettings(Settings):
    """The lesions of one volume: one a size bin, all of one contrast and place."""

    seed: int
    repeat: int
    group: int
    bins_mm: tuple[tuple[float, float], ...]
    contrast: ContrastSettings
    place: LesionPlace
    edge_mm: float

    @property
    def label(self) -> str:
        """For a task's name."""
        low, high = self.contrast.hu
        return f"{self.contrast.kind} {low:g} to {high:g} HU, {self.place}, {self.repeat + 1}.{self.group + 1}"

    def insert_settings(self, bin_mm: tuple[float, float]) -> InsertSettings:
        """As insertion takes them, for lesions of one size bin; what does not fit is left out."""
        return InsertSettings(
            diameter_mm=bin_mm,
            contrast_hu=self.contrast.hu,
            edge_mm=self.edge_mm,
            kind=self.contrast.kind,
            place=self.place,
            fit="fewer",
            diameter_distribution="log_uniform",
        )


def load_sensitivity(path: Path, overrides: Mapping[str, Any] | None = None) -> SensitivitySettings:
    """Read a YAML configuration of a study, with values by dotted key put over the file's. Raises ConfigError."""
    return load_settings(SensitivitySettings, path, overrides)


def parse_sensitivity(values: Mapping[str, Any], *, source: str) -> SensitivitySettings:
    """Validate settings already read; `source` names them in the error. Raises ConfigError."""
    return parse_settings(SensitivitySettings, values, source=source)
