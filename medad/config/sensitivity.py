"""Settings of `adflows liver sensitivity`: the lesions to insert, and the rule for a found lesion."""

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
    """A contrast of inserted lesions. A plain pair of numbers is the range of a uniform lesion's contrast."""

    hu: tuple[float, float]
    """Range of the lesion's contrast to the surrounding liver, in HU. For a mixed lesion it is the core's contrast."""
    kind: LesionKind = "uniform"
    """Kind of lesion. `mixed`: the rim has the opposite contrast of the core."""

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
        """Return the contrast as tables show it."""
        low, high = (f"{value:+g}".replace("-", "−") for value in self.hu)
        return f"{'mixed, core ' if self.kind == 'mixed' else ''}{low} to {high} HU"


class SensitivitySettings(MachineSettings):
    """All settings of one study of inserted lesions, except the model."""

    name: RunName = "sensitivity"
    """Name of the study."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the lesions' sizes, shapes and places."""
    healthy: DatasetSettings
    """Data set of healthy scans. They must not have trained the model."""
    diameters_mm: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2)] = (
        5.0, 8.0, 12.0, 20.0, 30.0, 45.0, 60.0,
    )  # fmt: skip
    """Edges of the size bins, in mm, for a lesion's longest axis. Sizes are log-uniform within a bin."""
    contrasts_hu: Annotated[tuple[ContrastSettings, ...], Field(min_length=1)] = (
        ContrastSettings(hu=(-80.0, -50.0)),
        ContrastSettings(hu=(-50.0, -30.0)),
        ContrastSettings(hu=(-30.0, -15.0)),
        ContrastSettings(hu=(15.0, 30.0)),
        ContrastSettings(hu=(30.0, 50.0)),
        ContrastSettings(hu=(50.0, 80.0)),
        ContrastSettings(hu=(-60.0, -30.0), kind="mixed"),
    )
    """Contrasts of the lesions, in HU. A pair of numbers is the range of a uniform lesion's contrast."""
    places: Annotated[tuple[LesionPlace, ...], Field(min_length=1)] = ("inside", "rim")
    """Places of the lesions. `inside`: away from the liver's surface. `rim`: at the surface or across it."""
    repeats: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of lesions per scan, size, contrast and place."""
    lesions_per_volume: Annotated[int, Field(ge=1, le=20)] = 3
    """Largest number of lesions in one copy of a scan, each from a different size bin. A larger number saves time, but
    the lesions then lie closer together."""
    edge_mm: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the Gaussian that softens a lesion's edge, in mm."""
    false_positive_ml: Annotated[float, Field(gt=0)] = 5.0
    """Volume that may be marked in the liver before lesions are inserted, in ml. It sets the threshold of each scan."""
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of a lesion's voxels that must be marked for the lesion to count as found."""
    surroundings_mm: Annotated[float, Field(gt=0)] = 10.0
    """Distance from a lesion, in mm, within which marked voxels count in its Dice."""
    settings: LiverChanges = Field(default_factory=dict)
    """Changes of the model's settings by dotted key, such as `inference.batch_size`."""

    @model_validator(mode="after")
    def _bins(self) -> SensitivitySettings:
        if any(low >= high for low, high in self.bins):
            raise ValueError("diameters_mm must be in ascending order")
        if len(set(self.places)) < len(self.places) or len({one.label for one in self.contrasts_hu}) < len(
            self.contrasts_hu
        ):
            raise ValueError("places and contrasts_hu must not contain an entry twice")
        if self.healthy.insert is not None:
            raise ValueError("healthy.insert: the study inserts its own lesions")
        if wrong := [key for key in self.settings if key.split(".")[0] in ("train_data", "test_data")]:
            raise ValueError(f"settings.{wrong[0]}: the study's scans are those of `healthy`")
        return self

    @property
    def settings_by_key(self) -> dict[str, Any]:
        """Return `settings` as a flat mapping of dotted keys."""
        return dict(flatten_keys(self.settings))

    @property
    def bins(self) -> list[tuple[float, float]]:
        """Return the size bins, each (from, to) in mm."""
        return list(zip(self.diameters_mm, self.diameters_mm[1:], strict=False))

    @property
    def measure_settings(self) -> MeasureSettings:
        """Return the settings that decide how an inserted volume is measured."""
        return MeasureSettings(
            false_positive_ml=self.false_positive_ml, overlap=self.overlap, surroundings_mm=self.surroundings_mm
        )

    def volumes(self) -> list[InsertionSettings]:
        """Return the volumes to make from each scan. Sizes within one volume differ as much as possible."""
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
    """The rules that decide whether a lesion is found; see `SensitivitySettings`."""

    false_positive_ml: float
    """Volume that may be marked in the liver before lesions are inserted, in ml."""
    overlap: float
    """Fraction of a lesion's voxels that must be marked for the lesion to count as found."""
    surroundings_mm: float
    """Distance from a lesion, in mm, within which marked voxels count in its Dice."""


class InsertionSettings(Settings):
    """The lesions of one volume: one lesion per size bin, all with one contrast and place."""

    seed: int
    repeat: int
    group: int
    bins_mm: tuple[tuple[float, float], ...]
    contrast: ContrastSettings
    place: LesionPlace
    edge_mm: float

    @property
    def label(self) -> str:
        """Return a short text for a task's name."""
        low, high = self.contrast.hu
        return f"{self.contrast.kind} {low:g} to {high:g} HU, {self.place}, {self.repeat + 1}.{self.group + 1}"

    def insert_settings(self, bin_mm: tuple[float, float]) -> InsertSettings:
        """Return the insertion's settings for lesions of one size bin. Lesions that do not fit are left out."""
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
    """Read a study's YAML configuration and apply overrides by dotted key. Raises ConfigError."""
    return load_settings(SensitivitySettings, path, overrides)


def parse_sensitivity(values: Mapping[str, Any], *, source: str) -> SensitivitySettings:
    """Validate settings that were already read. `source` names them in the error. Raises ConfigError."""
    return parse_settings(SensitivitySettings, values, source=source)
