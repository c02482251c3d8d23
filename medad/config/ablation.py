"""Settings of `adflows liver ablate`: variants of one liver configuration, trained and evaluated over seeds.

Values only. Every variant's settings are validated when the file is read, so that a misspelt key ends the command and
not the third night of training.
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
"""Groups of variants beside the sweeps, which go by their own names."""
EPOCHS_KEY, SNAPSHOT_KEY = "train.segmentation.epochs", "train.snapshot_epochs"


class PublishedFigures(Settings):
    """What a paper prints, in percent. Shown beside ours and labelled with its source; never part of a test."""

    dice_percent: Percent | None = None
    """Dice."""
    dice_sd: Percent | None = None
    """Standard deviation of the Dice."""
    auroc_percent: Percent | None = None
    """AUROC of slices, as in the thesis's tables 3.3 and A.1."""
    auroc_sd: Percent | None = None
    """Standard deviation of the AUROC."""
    source: Annotated[str, Field(min_length=1)]
    """Source of the figures, as `thesis, table 3.2`."""


class PublishedRow(PublishedFigures):
    """Another system's figures, which no row here stands for."""

    label: Annotated[str, Field(min_length=1)]
    """Name of the system in tables."""


class RowSettings(Settings):
    """One row of the table: the base with some values changed."""

    name: ShortId
    """Name of the row."""
    label: Annotated[str, Field(min_length=1)]
    """Name of the row in tables."""
    set: Annotated[LiverChanges, Field(default_factory=dict)]
    """Changes of the base by dotted key."""
    published: PublishedFigures | None = None
    """Published figures beside ours."""

    @field_validator("set", mode="after")
    @classmethod
    def _flatten_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        return dict(flatten_changes(values))


class SweepSettings(Settings):
    """One key varied over several values."""

    name: ShortId
    """Name of the sweep."""
    label: Annotated[str, Field(min_length=1)]
    """Name of the sweep in tables."""
    key: Annotated[str, Field(min_length=1)]
    """Dotted key that is varied."""
    values: Annotated[tuple[Any, ...], Field(min_length=1)]
    """Values of the key."""
    row: ShortId | None = None
    """Row that is varied. None: the base."""
    published: tuple[PublishedFigures | None, ...] = ()
    """Published figures of each value, in their order, or none at all."""

    @model_validator(mode="after")
    def _published_fits(self) -> SweepSettings:
        if self.published and len(self.published) != len(self.values):
            raise ValueError(f"published holds {len(self.published)} entries for {len(self.values)} values")
        if len({str(value) for value in self.values}) != len(self.values):
            raise ValueError("values name one twice")
        if is_private(type_at(LiverSettings, self.key)):  # values name what is shown everywhere
            raise ValueError(f"{self.key} cannot be swept over; give each of its values a row")
        return self


class CurveSettings(Settings):
    """Figure 3.6: one long phase two, of which every snapshot is segmented with and evaluated."""

    row: ShortId | None = None
    """Row whose phase two is prolonged. None: the base."""
    epochs: Annotated[int, Field(ge=1)] = 200
    """Epochs of phase two."""
    every: Annotated[int, Field(ge=1)] = 5
    """Epochs between the networks that are evaluated."""


@dataclass(frozen=True)
class Variant:
    """One thing to train and evaluate."""

    group: str
    """`rows`, `curve`, or a sweep's name."""
    name: str
    """Unique within its group."""
    label: str
    settings: LiverSettings

    @property
    def id(self) -> str:
        """Unique in the ablation, for logs and failures."""
        return self.name if self.group == ROWS else f"{self.group} {self.name}".strip()


class AblationSettings(MachineSettings):
    """Everything one ablation depends on."""

    name: RunName
    """Name of the run and its folder."""
    base: LiverSettings
    """Liver configuration that all rows change: its name, its file, or its settings. Its name, seed and machine count
    only where none is given here."""
    set: Annotated[LiverChanges, Field(default_factory=dict)]
    """Changes of the base by dotted key, for all rows."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds; each row is trained with each of them."""
    rows: tuple[RowSettings, ...] = ()
    """Rows of the table."""
    reference: ShortId | None = None
    """Row that all others are tested against. None: the one with the best mean micro Dice."""
    sweeps: tuple[SweepSettings, ...] = ()
    """Sweeps, each over the values of one key."""
    curve: CurveSettings | None = None
    """Figures by length of phase two (figure 3.6). None: no such curve."""
    panels: Annotated[int, Field(ge=0, le=20)] = 3
    """Number of test slices, and of synthesised ones, that are shown as each row sees them."""
    embedding: bool = True
    """Projection of real tumour slices, healthy ones and synthesised ones by features of the restoration (figure 3.1
    C)."""
    baseline: bool = True
    """Baseline row without any training: smoothed distance from the liver's median HU."""
    baseline_sigma_mm: Annotated[float, Field(gt=0)] = 3.0
    """Standard deviation of the Gaussian that smooths the baseline."""
    published_rows: tuple[PublishedRow, ...] = ()
    """Other systems' published figures."""
    only: tuple[str, ...] | None = None
    """Parts to compute: names of rows or sweeps, `curve`, `baseline`. None: all."""

    @field_validator("set", mode="after")
    @classmethod
    def _flatten_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        return dict(flatten_changes(values))

    @model_validator(mode="after")
    def _names_fit_and_variants_load(self) -> AblationSettings:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name one twice")
        rows = [row.name for row in self.rows]
        names = [*rows, *(sweep.name for sweep in self.sweeps), ROWS, CURVE, BASELINE]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rows and sweeps: two are called {twice[0]!r}, or it is a reserved name")
        users = {"reference": self.reference, "curve.row": None if self.curve is None else self.curve.row}
        users |= {f"sweeps.{sweep.name}.row": sweep.row for sweep in self.sweeps}
        for user, row in users.items():
            if row is not None and row not in rows:
                raise ValueError(f"{user}: no row {row!r} in rows, which has {', '.join(rows) or 'none'}")
        if not self._all_variants():
            raise ValueError("nothing to train: neither rows nor sweeps nor a curve")
        return self

    @property
    def main_row(self) -> str | None:
        """The row that pictures show where one must do: the reference, else the last chosen. None without rows."""
        names = [row.name for row in self.selected_rows]
        if self.reference in names:
            return self.reference
        return names[-1] if names else None

    def variants(self) -> tuple[Variant, ...]:
        """All that is trained, rows first. Raises ValueError naming the row and the key that does not load."""
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
        """The base with `set` over it."""
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
        """These settings with some parts alone: names of rows or sweeps, `curve`, `baseline`, with commas between.

        Raises ConfigError for an unknown name.
        """
        wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        available = [row.name for row in self.rows] + [sweep.name for sweep in self.sweeps]
        available += [CURVE] * (self.curve is not None) + [BASELINE] * self.baseline
        if not wanted or (unknown := [name for name in wanted if name not in available]):
            problem = f"{unknown[0]}: no such row" if wanted else "none given"
            raise ConfigError(f"--rows {problem}; the configuration has {', '.join(available)}")
        return self.model_copy(update={"only": wanted})

    def is_selected(self, name: str) -> bool:
        """Whether a row, a sweep, the curve or the baseline is among the chosen."""
        return self.only is None or name in self.only

    @property
    def selected_rows(self) -> tuple[RowSettings, ...]:
        return tuple(row for row in self.rows if self.is_selected(row.name))

    @property
    def selected_sweeps(self) -> tuple[SweepSettings, ...]:
        return tuple(sweep for sweep in self.sweeps if self.is_selected(sweep.name))


def parse(values: Mapping[str, Any], *, source: str) -> AblationSettings:
    """Validate settings already read; `source` names them in the error. Raises ConfigError."""
    return parse_settings(AblationSettings, values, source=source)


def load(
    path: Path, overrides: Mapping[str, Any] | None = None, find: Callable[[str], Path] | None = None
) -> AblationSettings:
    """Read a YAML configuration, its base included.

    Parameters
    ----------
    path
        The YAML file. Its `base` is a liver configuration: a path, relative to this file; the name of one beside it; a
        name that `find` knows; or the settings themselves.
    overrides
        Values by dotted key. Those of this schema go over the file's, all others over the base, for all rows.
    find
        Name of a liver configuration -> its file; raises ConfigError for one that it does not know.

    Raises
    ------
    ConfigError
        A file is missing or breaks a rule, or a row's settings do not load: one line with the file, the row, the key
        and the rule.
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
    """A YAML file's values, whatever they are."""

    model_config = ConfigDict(extra="allow")


def _base_file(path: Path, base: str, find: Callable[[str], Path] | None) -> Path:
    exact = path.parent / base
    named = exact.with_name(f"{exact.name}.yaml")
    for file in (exact, named):
        if file.is_file():
            return file
    if find is not None and not Path(base).suffix and len(Path(base).parts) == 1:
        return find(base)
    raise ConfigError(f"{path}: base: no file {base} beside it")


def flatten_changes(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by dotted key; an empty mapping is a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_changes(value, f"{parent}{key}.")
        else:
            yield f"{parent}{key}", value


def apply_changes(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put values by dotted key over nested settings, in place. Raises ConfigError where a value has no keys below."""
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {parent} holds no further keys")
        place[leaf] = value
