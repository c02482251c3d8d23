"""The files of a liver run folder: which ones the flow writes, and reading them back.

masks/<case>.nii.gz, probabilities/<case>.nii.gz    on each scan's own grid
liver_masks/<case>.nii.gz                           if the liver was found
inserted/<case>/scan.nii.gz, label.nii.gz            if lesions were inserted
model/restoration/, model/segmentation/             weights and training curve
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.liver.split import liver_digest
from flows.runs.run_folder import FileCopy, copies_of
from flows.store.artifacts import ArtifactStore
from flows.store.references import Ref
from medad.base.errors import ConfigError
from medad.cohort.datasets import INSERTED_FILES
from medad.config.liver import LiverSettings, parse
from medad.config.trained import TrainedModel
from medad.steps.results import CaseResult

NETS = ("restoration", "segmentation")


@dataclass(frozen=True)
class Models:
    """Both trained networks."""

    restoration: Ref
    segmentation: Ref
    snapshot: str = ""
    """File in phase two's folder to segment with. If empty, the final network of phase two is used."""

    def each(self) -> dict[str, Ref]:
        return {name: getattr(self, name) for name in NETS}


@dataclass(frozen=True)
class UsedCase:
    """A used case, and the artifact whose key contains the digests of its files."""

    use: Literal["train", "test"]
    case_id: str
    ref: Ref
    patient: str | None = None
    """Digest of the patient, keyed with the machine's secret. None if no text names the patient."""


def copies(report: Ref | None, results: Iterable[CaseResult[Ref]], models: Models | None) -> tuple[FileCopy, ...]:
    """Return all files of a liver run, each with the artifact that it is copied from."""
    found = copies_of(report, "report.html", "report.json", "preview.png")
    for each in results:
        assert each.segmented is not None, "a finished case is segmented"
        found.append(FileCopy(each.segmented, "mask.nii.gz", f"masks/{each.case_id}.nii.gz"))
        found.append(FileCopy(each.segmented, "probability.nii.gz", f"probabilities/{each.case_id}.nii.gz"))
        if each.inserted is not None:
            found += [FileCopy(each.inserted, name, f"inserted/{each.case_id}/{name}") for name in INSERTED_FILES]
    for net, ref in (models.each() if models is not None else {}).items():
        found += [FileCopy(ref, name, f"model/{net}/{name}") for name in ("model.safetensors", "curve.json")]
    return tuple(found)


def mask_copies(masks: Mapping[str, Ref]) -> tuple[FileCopy, ...]:
    """Return the liver masks that were found automatically, by case, each with its artifact."""
    return tuple(FileCopy(ref, "liver.nii.gz", f"liver_masks/{case_id}.nii.gz") for case_id, ref in masks.items())


def manifest(
    used: Iterable[UsedCase], models: Models | None, trained: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the manifest's entries: digests of the inputs, and the resulting networks.

    `trained` lists the training cases of networks that another run trained.
    """
    store = ArtifactStore()
    inputs = [dict(row) for row in trained]
    for each in used:
        made_from = store.sidecar(each.ref).parts["inputs"]["case"]
        digests = {name: made_from[name] for name in ("scan", "label")} | {"liver": liver_digest(each.ref)}
        inputs.append({"use": each.use, "case": each.case_id, "sha256": digests, "patient": each.patient})
    refs: dict[str, Ref | None] = dict.fromkeys(NETS) | (models.each() if models is not None else {})
    return {
        "inputs": inputs,
        "models": {net: None if ref is None else {"key": ref.key, "digest": ref.digest} for net, ref in refs.items()},
    }


def has_model(folder: Path) -> bool:
    """Return whether a run folder contains trained networks."""
    return (folder / "model" / "segmentation" / "model.safetensors").is_file()


def settings_of_run(folder: Path) -> LiverSettings:
    """Read the settings of a run folder. Raises ConfigError if it is not a run folder or has no model."""
    return TrainedModel.of_run(folder).settings


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
