"""Settings of `adflows liver ablate`: variants of one liver configuration, trained and evaluated with several seeds.

The settings of every variant are validated when the file is read. A misspelt key then ends the command at once, not
after days of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medad.base.errors import ConfigError
from medad.base.private import is_private, type_at
from medad.base.settings import MACHINE_FIELDS, MachineSettings, RunName, Settings, load_settings, parse_settings
from medad.config.liver import LiverChanges, LiverSettings
from medad.config.liver import load as load_liver

ShortId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
Percent = Annotated[float, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=0)]
ROWS, CURVE, BASELINE = "rows", "curve", "baseline"
"""Names of the other groups of variants. A sweep's group has the sweep's name."""
EPOCHS_KEY, SNAPSHOT_KEY = "train.segmentation.epochs", "train.snapshot_epochs"


class PublishedFigures(Settings):
    """Figures from a paper, in percent. Tables show them next to our results, with their source. No statistical test
    uses them."""

    dice_percent: Percent | None = None
    """Dice, in percent."""
    dice_sd: Percent | None = None
    """Standard deviation of the Dice, in percentage points."""
    auroc_percent: Percent | None = None
    """AUROC of slices, in percent, as in the thesis's tables 3.3 and A.1."""
    auroc_sd: Percent | None = None
    """Standard deviation of the AUROC, in percentage points."""
    source: Annotated[str, Field(min_length=1)]
    """Source of the figures, for example `thesis, table 3.2`."""


class PublishedRow(PublishedFigures):
    """Published figures of another system, which no row of the ablation reproduces."""

    label: Annotated[str, Field(min_length=1)]
    """Name of the system in tables."""


class RowSettings(Settings):
    """One row of the table: the base configuration with some values changed."""

    name: ShortId
    """Short name of the row, for files and options."""
    label: Annotated[str, Field(min_length=1)]
    """Name of the row in tables."""
    set: Annotated[LiverChanges, Field(default_factory=dict)]
    """Changes of the base configuration, by dotted key."""
    published: PublishedFigures | None = None
    """Published figures to show next to our results."""

    @field_validator("set", mode="after")
    @classmethod
    def _flatten_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        return dict(flatten_changes(values))


class SweepSettings(Settings):
    """A sweep: one setting is varied over several values."""

    name: ShortId
    """Short name of the sweep, for files and options."""
    label: Annotated[str, Field(min_length=1)]
    """Name of the sweep in tables."""
    key: Annotated[str, Field(min_length=1)]
    """Dotted key of the setting to vary."""
    values: Annotated[tuple[Any, ...], Field(min_length=1)]
    """Values of the setting."""
    row: ShortId | None = None
    """Row to start from. None: the base configuration."""
    published: tuple[PublishedFigures | None, ...] = ()
    """Published figures, one entry per value in the same order. Empty if nothing was published."""

    @model_validator(mode="after")
    def _published_fits(self) -> SweepSettings:
        if self.published and len(self.published) != len(self.values):
            raise ValueError(f"published contains {len(self.published)} entries for {len(self.values)} values")
        if len({str(value) for value in self.values}) != len(self.values):
            raise ValueError("values must not contain a value twice")
        if is_private(type_at(LiverSettings, self.key)):  # the values become names in tables and files
            raise ValueError(f"{self.key} is private and cannot be swept; write one row per value instead")
        return self


class CurveSettings(Settings):
    """Curve over the length of phase two (figure 3.6): one long training with regular snapshots, all evaluated."""

    row: ShortId | None = None
    """Row to train for longer. None: the base configuration."""
    epochs: Annotated[int, Field(ge=1)] = 200
    """Number of epochs of phase two."""
    every: Annotated[int, Field(ge=1)] = 5
    """Number of epochs between two snapshots. Each snapshot is evaluated."""


@dataclass(frozen=True)
class Variant:
    """One configuration to train and evaluate."""

    group: str
    """Group of the variant: `rows`, `curve`, or a sweep's name."""
    name: str
    """Name of the variant, unique within its group."""
    label: str
    settings: LiverSettings

    @property
    def id(self) -> str:
        """Return an id that is unique in the ablation, for logs and failures."""
        return self.name if self.group == ROWS else f"{self.group} {self.name}".strip()


class AblationSettings(MachineSettings):
    """All settings of one ablation."""

    name: RunName
    """Name of the run and of its folder."""
    base: LiverSettings
    """Liver configuration that all rows change, given by its name, its file or its settings. The ablation uses its own
    name and seeds, not those of the base. If the ablation has machine settings, they also replace those of the base."""
    set: Annotated[LiverChanges, Field(default_factory=dict)]
    """Changes of the base configuration for all rows, by dotted key."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of the trainings. Each row is trained with each seed."""
    rows: tuple[RowSettings, ...] = ()
    """Rows of the table."""
    reference: ShortId | None = None
    """Row that all other rows are compared with in statistical tests. None: the row with the best mean micro Dice."""
    sweeps: tuple[SweepSettings, ...] = ()
    """Sweeps. Each varies one setting."""
    curve: CurveSettings | None = None
    """Curve over the length of phase two (figure 3.6). None: no curve."""
    panels: Annotated[int, Field(ge=0, le=20)] = 3
    """Number of test slices, and of synthesised slices, that the report shows for each row."""
    embedding: bool = True
    """Projection of tumour slices, healthy slices and synthesised slices by features of the restoration network (figure
    3.1 C)."""
    baseline: bool = True
    """Baseline row without training: the smoothed difference from the liver's median HU."""
    baseline_sigma_mm: Annotated[float, Field(gt=0)] = 3.0
    """Standard deviation of the Gaussian that smooths the baseline, in mm."""
    published_rows: tuple[PublishedRow, ...] = ()
    """Published figures of other systems."""
    only: tuple[str, ...] | None = None
    """Parts to compute: names of rows or sweeps, `curve`, `baseline`. None: all parts."""

    @field_validator("set", mode="after")
    @classmethod
    def _flatten_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        return dict(flatten_changes(values))

    @model_validator(mode="after")
    def _names_fit_and_variants_load(self) -> AblationSettings:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must not contain a seed twice")
        rows = [row.name for row in self.rows]
        names = [*rows, *(sweep.name for sweep in self.sweeps), ROWS, CURVE, BASELINE]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rows and sweeps: the name {twice[0]!r} is used twice or is reserved")
        users = {"reference": self.reference, "curve.row": None if self.curve is None else self.curve.row}
        users |= {f"sweeps.{sweep.name}.row": sweep.row for sweep in self.sweeps}
        for user, row in users.items():
            if row is not None and row not in rows:
                raise ValueError(f"{user}: no row {row!r}; rows has {', '.join(rows) or 'none'}")
        if not self._all_variants():
            raise ValueError("nothing to train: give rows, sweeps or a curve")
        return self

    @property
    def main_row(self) -> str | None:
        """Return the row that pictures show if only one row fits: the reference, else the last selected row.

        None: no row is selected.
        """
        names = [row.name for row in self.selected_rows]
        if self.reference in names:
            return self.reference
        return names[-1] if names else None

    def variants(self) -> tuple[Variant, ...]:
        """Return all selected variants, rows first. Raises ValueError, which names the row and the wrong key."""
        return tuple(
            one for one in self._all_variants() if self.is_selected(one.name if one.group == ROWS else one.group)
        )

    def _all_variants(self) -> tuple[Variant, ...]:
        found = [Variant(ROWS, row.name, row.label, self._settings(f"rows.{row.name}", row.set)) for row in self.rows]
        for sweep in self.sweeps:
            changes = self._row_changes(sweep.row)
            for value in sweep.values:
                where = f"sweeps.{sweep.name}={value}"
                found.append(
                    Variant(sweep.name, str(value), f"{value}", self._settings(where, changes | {sweep.key: value}))
                )
        if self.curve is not None:
            long_phase = {EPOCHS_KEY: self.curve.epochs, SNAPSHOT_KEY: self.curve.every}
            settings = self._settings("curve", self._row_changes(self.curve.row) | long_phase)
            found.append(Variant(CURVE, "", "Length of phase two", settings))
        return tuple(found)

    def base_settings(self) -> LiverSettings:
        """Return the base configuration with the changes of `set`."""
        return self._settings("set", {})

    def _row_changes(self, row: str | None) -> dict[str, Any]:
        return next((one.set for one in self.rows if one.name == row), {})

    def _settings(self, where: str, changes: Mapping[str, Any]) -> LiverSettings:
        values = self.base.model_dump(exclude=set(MACHINE_FIELDS))
        values["name"] = self.name
        try:
            apply_changes(values, self.set | dict(changes))
            return LiverSettings.model_validate(values | self.machine.model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}") from error
        except ConfigError as error:
            raise ValueError(f"{where}: {error}") from error

    def select_parts(self, names: str) -> AblationSettings:
        """Return these settings with only some parts selected.

        `names` is a list of rows, sweeps, `curve` and `baseline`, separated by commas. Raises ConfigError for an
        unknown name.
        """
        wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        available = [row.name for row in self.rows] + [sweep.name for sweep in self.sweeps]
        available += [CURVE] * (self.curve is not None) + [BASELINE] * self.baseline
        if not wanted or (unknown := [name for name in wanted if name not in available]):
            problem = f"{unknown[0]}: no such row" if wanted else "is empty"
            raise ConfigError(f"--rows {problem}; the configuration has {', '.join(available)}")
        return self.model_copy(update={"only": wanted})

    def is_selected(self, name: str) -> bool:
        """Return whether a row, a sweep, the curve or the baseline is selected."""
        return self.only is None or name in self.only

    @property
    def selected_rows(self) -> tuple[RowSettings, ...]:
        return tuple(row for row in self.rows if self.is_selected(row.name))

    @property
    def selected_sweeps(self) -> tuple[SweepSettings, ...]:
        return tuple(sweep for sweep in self.sweeps if self.is_selected(sweep.name))


def parse(values: Mapping[str, Any], *, source: str) -> AblationSettings:
    """Validate settings that were already read. `source` names them in the error. Raises ConfigError."""
    return parse_settings(AblationSettings, values, source=source)


def load(
    path: Path, overrides: Mapping[str, Any] | None = None, find: Callable[[str], Path] | None = None
) -> AblationSettings:
    """Read a YAML configuration and its base configuration.

    Parameters
    ----------
    path
        The YAML file. Its `base` is a liver configuration: a path relative to this file, the name of a file in the same
        folder, a name that `find` knows, or the settings themselves.
    overrides
        Values by dotted key. Keys of the ablation's settings override the file's values. All other keys override the
        base configuration, for all rows.
    find
        Function that returns the file of a named liver configuration. It raises ConfigError for an unknown name.

    Raises
    ------
    ConfigError
        A file is missing or breaks a rule, or a row's settings are wrong: one line with the file, the row, the key and
        the rule.
    """
    given = dict(overrides or {})
    ablation_overrides = {
        key: value for key, value in given.items() if key.partition(".")[0] in AblationSettings.model_fields
    }
    values = dict(
        load_settings(_RawValues, path, {k: v for k, v in ablation_overrides.items() if not k.startswith("base.")})
    )
    base_overrides = {key: value for key, value in given.items() if key not in ablation_overrides}
    base_overrides |= {
        key.removeprefix("base."): value for key, value in ablation_overrides.items() if key.startswith("base.")
    }
    if isinstance(values.get("set", {}), Mapping):
        values["set"] = dict(flatten_changes(values.get("set") or {})) | base_overrides
    if isinstance(base := values.get("base"), str):
        values["base"] = load_liver(_base_file(path, base, find)).model_dump()
    if isinstance(values.get("base"), Mapping):
        for field in MACHINE_FIELDS & values["base"].keys():
            values.setdefault(field, values["base"][field])
    return parse(values, source=str(path))


class _RawValues(BaseModel):
    """Values of a YAML file, not yet validated."""

    model_config = ConfigDict(extra="allow")


def _base_file(path: Path, base: str, find: Callable[[str], Path] | None) -> Path:
    exact = path.parent / base
    named = exact.with_name(f"{exact.name}.yaml")
    for file in (exact, named):
        if file.is_file():
            return file
    if find is not None and not Path(base).suffix and len(Path(base).parts) == 1:
        return find(base)
    raise ConfigError(f"{path}: base: no file {base} in the same folder")


def flatten_changes(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf of nested settings. An empty mapping is a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_changes(value, f"{parent}{key}.")
        else:
            yield f"{parent}{key}", value


def apply_changes(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change nested settings in place, by dotted key. Raises ConfigError if a parent is not a group of settings."""
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {parent} is not a group of settings")
        place[leaf] = value
