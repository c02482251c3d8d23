"""The files of a liver run folder: which ones the flow writes, and reading them back.

masks/<case>.nii.gz, probabilities/<case>.nii.gz    on each scan's own grid.
lesions/<case>.json                                 each lesion: volume, diameter, HU, place, probability.
cases/<case>.html                                   page to scroll through the scan, unless `viewer` is false.
statistics.csv                                      one row per case.
liver_masks/<case>.nii.gz                           if the liver was found.
inserted/<case>/scan.nii.gz, label.nii.gz            if lesions were inserted.
model/                  parts of the model, see `medad.steps.trained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.liver.mask_steps import LIVER_FILE
from flows.liver.split import liver_digest
from flows.runs.run_folder import FileCopy, copies_of
from flows.store.artifacts import ArtifactStore
from flows.store.references import Ref
from medad.base.errors import ConfigError
from medad.cohort.datasets import INSERTED_FILES
from medad.config.liver import LiverSettings, parse
from medad.steps.adopt import CURVE
from medad.steps.results import PAGE_FILE, PAGES, CaseResult, Model
from medad.steps.trained import MODEL_FOLDER, NETS, TrainedModel, parts_of

CASE_FILES = {
    "mask.nii.gz": "masks/{}.nii.gz",
    "probability.nii.gz": "probabilities/{}.nii.gz",
    "lesions.json": "lesions/{}.json",
}
"""Files of a segmented case -> their names in the run folder."""
LIVER_MASK_FILE = "liver_masks/{}.nii.gz"


@dataclass(frozen=True)
class UsedCase:
    """A used case, and the artifact whose key contains the digests of its files."""

    use: Literal["train", "test"]
    case_id: str
    ref: Ref
    patient: str | None = None
    """Digest of the patient, keyed with the machine's secret. None if no text names the patient."""


def copies(
    report: Ref | None,
    results: Sequence[CaseResult[Ref]],
    model: Model[Ref] | None,
    names: Mapping[str, str] | None = None,
) -> tuple[FileCopy, ...]:
    """Return all files of a liver run, each with the artifact that it is copied from.

    `names` has names for the files of cases. A case without one has its id.
    """
    found = copies_of(report, "report.html", "report.json", "preview.png")
    for each in results:
        assert each.segmented is not None, "a finished case is segmented"
        name = (names or {}).get(each.case_id, each.case_id)
        found += [FileCopy(each.segmented, file, target.format(name)) for file, target in CASE_FILES.items()]
        if each.inserted is not None:
            found += [FileCopy(each.inserted, file, f"inserted/{name}/{file}") for file in INSERTED_FILES]
    found += page_copies(results)
    for part in parts_of(model) if model is not None else []:
        folder = Path(MODEL_FOLDER, part.place)
        found.append(FileCopy(part.folder, part.file, (folder / part.file).as_posix()))
        if part.kind in NETS:
            found.append(FileCopy(part.folder, CURVE, (folder / CURVE).as_posix()))
    return tuple(found)


def page_copies(results: Iterable[CaseResult[Ref]]) -> list[FileCopy]:
    """Return the pages of cases. They have the cases' ids as names, because the report links to them."""
    return [FileCopy(each.page, PAGE_FILE, f"{PAGES}/{each.case_id}.html") for each in results if each.page is not None]


def mask_copies(masks: Mapping[str, Ref], names: Mapping[str, str] | None = None) -> tuple[FileCopy, ...]:
    """Return the liver masks that were found automatically, by case, each with its artifact."""
    found = {(names or {}).get(case_id, case_id): ref for case_id, ref in masks.items()}
    return tuple(FileCopy(ref, LIVER_FILE, LIVER_MASK_FILE.format(name)) for name, ref in found.items())


def manifest(
    used: Iterable[UsedCase], model: Model[Ref] | None, trained: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the manifest's entries: digests of the inputs, and the parts of the resulting model.

    `trained` lists the training cases of a model that another run trained.
    """
    store = ArtifactStore()
    inputs = [dict(row) for row in trained]
    for each in used:
        made_from = store.sidecar(each.ref).parts["inputs"]["case"]
        digests = {name: made_from[name] for name in ("scan", "label")} | {"liver": liver_digest(each.ref)}
        inputs.append({"use": each.use, "case": each.case_id, "sha256": digests, "patient": each.patient})
    refs: dict[str, Ref | None] = dict.fromkeys(NETS)
    if model is not None:
        refs = {part.name: part.folder for part in parts_of(model)}
    return {
        "inputs": inputs,
        "models": {name: None if ref is None else {"key": ref.key, "digest": ref.digest} for name, ref in refs.items()},
    }


def settings_of_run(folder: Path) -> LiverSettings:
    """Read the settings of a run folder. Raises ConfigError if it is not a run folder or has no model."""
    return TrainedModel.of_run(folder).settings


def require_same_model(settings: LiverSettings, base: Path, *, source: str) -> None:
    """Check that a training with these settings can start from the model in the run folder `base`.

    Raises ConfigError with `source` as the name of the settings: networks or `preprocess` differ, or both networks are
    to be trained jointly.
    """
    trained = TrainedModel.of_run(base)
    for name in ("preprocess", *NETS):
        if getattr(settings, name) != getattr(trained.settings, name):
            raise ConfigError(f"{source}: `{name}` differs from what the model in {base} was trained with")
    if settings.train.schedule == "joint":
        raise ConfigError(f"{source}: train.schedule joint cannot start from another model; use two_phase")


def require_evaluable(settings: LiverSettings, model: Path, *, source: str) -> None:
    """Check that the model in the run folder `model` can be evaluated with these settings.

    Raises ConfigError with `source` as the name of the settings: `preprocess` differs, or the settings use a classifier
    that the model lacks.
    """
    of_model = settings_of_run(model)
    if settings.preprocess != of_model.preprocess:
        raise ConfigError(f"{source}: `preprocess` differs from what the model in {model} was trained with")
    if settings.inference.combine.classifier > 0 and of_model.classifier is None:
        raise ConfigError(f"{source}: inference.combine.classifier needs a classifier; the model in {model} has none")


def settings_with_changes(
    of_model: LiverSettings, values: Mapping[str, Any], *, model: Path, source: str
) -> LiverSettings:
    """Return the settings of a model's run with some values changed, by dotted key.

    Errors refer to `source`.

    Raises
    ------
    ConfigError
        A setting does not exist, a value breaks a rule, or `preprocess` differs from the training of the model in
        folder `model`.
    """
    changed = of_model.model_dump()
    for key, value in values.items():
        *parents, leaf = key.split(".")
        place: Any = changed
        for parent in parents:
            place = place.get(parent)
            if not isinstance(place, dict):
                raise ConfigError(f"{source} {key}: no such setting")
        place[leaf] = value
    settings = parse(changed, source=source)
    if settings.preprocess != of_model.preprocess:
        raise ConfigError(f"{source}: `preprocess` differs from what the model in {model} was trained with")
    return settings
