"""What the liver flow puts into a run folder, and what it reads back from one.

masks/<case>.nii.gz, probabilities/<case>.nii.gz    on each scan's own grid
inserted/<case>/scan.nii.gz, label.nii.gz            where lesions were inserted
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
    """A file of phase two's folder to segment with. Empty: the network that phase two ended with."""

    def each(self) -> dict[str, Ref]:
        return {name: getattr(self, name) for name in NETS}


@dataclass(frozen=True)
class UsedCase:
    """A case, and the artifact whose key holds its files' digests."""

    use: Literal["train", "test"]
    case_id: str
    ref: Ref
    patient: str | None = None
    """A digest under the machine's secret, where the patient is known by a text."""


def copies(report: Ref | None, results: Iterable[CaseResult[Ref]], models: Models | None) -> tuple[FileCopy, ...]:
    """All files of a liver run."""
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


def manifest(
    used: Iterable[UsedCase], models: Models | None, trained: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Digests of what went in, and which networks came out.

    `trained` holds the rows of the cases that trained them, where another run did that.
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
    """Whether a run folder holds trained networks."""
    return (folder / "model" / "segmentation" / "model.safetensors").is_file()


def settings_of_run(folder: Path) -> LiverSettings:
    """The settings of a run folder. Raises ConfigError where it is none, or holds no model."""
    return TrainedModel.of_run(folder).settings


def settings_over(of_model: LiverSettings, values: Mapping[str, Any], *, model: Path, source: str) -> LiverSettings:
    """A model run's settings with some values changed, by dotted key; `source` names them in errors.

    Raises
    ------
    ConfigError
        No such setting, a value that breaks a rule, or a change of what the model in folder `model` was trained with.
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
