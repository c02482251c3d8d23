"""A trained model in a run folder of the liver flow, and the layout of its files.

model/restoration/, segmentation/, classifier/    one member
model/member-1/restoration/, ...                  several members
model/calibration.json                            the calibrated threshold, if there is one
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from medad.base.errors import ConfigError
from medad.base.manifest import MANIFEST, read_manifest
from medad.config.liver import LiverSettings
from medad.steps.results import Member, Model

F = TypeVar("F")

MODEL_FOLDER = "model"
RESTORATION, SEGMENTATION, CLASSIFIER, CALIBRATION = "restoration", "segmentation", "classifier", "calibration"
NETS = (RESTORATION, SEGMENTATION)
FILES = {
    RESTORATION: "model.safetensors",
    SEGMENTATION: "model.safetensors",
    CLASSIFIER: "classifier.txt",
    CALIBRATION: "calibration.json",
}
"""File of each kind of part, in the part's folder."""
_MEMBER = re.compile(r"member-([1-9][0-9]*)")


@dataclass(frozen=True)
class Part(Generic[F]):
    """A part of a model: a network, a classifier or the calibration."""

    name: str
    """Name in the model, such as `restoration`, `member-2/classifier` or `calibration`."""
    folder: F
    """Folder of the part's file."""

    @property
    def kind(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def file(self) -> str:
        """Return the name of the part's file in its folder."""
        return FILES[self.kind]

    @property
    def place(self) -> str:
        """Return the part's folder below the folder `model` of a run. Empty: that folder itself."""
        return "" if self.kind == CALIBRATION else self.name


def parts_of(model: Model[F]) -> list[Part[F]]:
    """Return all parts of a model, member by member, and the calibration last."""
    found = []
    for number, member in enumerate(model.members, start=1):
        prefix = f"member-{number}/" if len(model.members) > 1 else ""
        found += [Part(f"{prefix}{name}", getattr(member, name)) for name in NETS]
        if member.classifier is not None:
            found.append(Part(f"{prefix}{CLASSIFIER}", member.classifier))
    if model.calibration is not None:
        found.append(Part(CALIBRATION, model.calibration))
    return found


def model_of(folders: Mapping[str, F]) -> Model[F]:
    """Return the model with these parts: folder by the part's name, as `parts_of` names them."""
    prefixes = dict.fromkeys(name.removesuffix(RESTORATION) for name in folders if name.endswith(RESTORATION))
    members = tuple(
        Member(
            folders[f"{prefix}{RESTORATION}"],
            folders[f"{prefix}{SEGMENTATION}"],
            folders.get(f"{prefix}{CLASSIFIER}"),
        )
        for prefix in prefixes
    )
    return Model(members, folders.get(CALIBRATION))


def has_model(run: Path) -> bool:
    """Return whether a run folder contains a trained model."""
    return bool(_member_folders(run / MODEL_FOLDER))


def _member_folders(folder: Path) -> list[Path]:
    """Return the folders of the members: the folder itself, or its sub-folders in order of their numbers."""
    if (folder / SEGMENTATION / FILES[SEGMENTATION]).is_file():
        return [folder]
    found = {int(match[1]): path for path in folder.glob("member-*") if (match := _MEMBER.fullmatch(path.name))}
    return [found[number] for number in sorted(found)]


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and the settings of the run that trained it."""

    settings: LiverSettings
    model: Model[Path]

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files of the model's parts."""
        return tuple(part.folder / part.file for part in parts_of(self.model))

    @classmethod
    def of_run(cls, run: Path) -> TrainedModel:
        """Find the model of a run folder. Raises ConfigError if it is not a run folder or its model is incomplete."""
        try:
            settings = LiverSettings.model_validate(read_manifest(run)["settings"])
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{run}: not the run folder of a liver run ({MANIFEST} has other settings)") from error
        folder = run / MODEL_FOLDER
        members = []
        wanted = [*NETS, *([CLASSIFIER] if settings.classifier is not None else [])]
        for number, place in enumerate(_member_folders(folder) or [folder], start=1):
            if place != folder and place.name != f"member-{number}":
                raise ConfigError(f"{run}: this run's model lacks member-{number}")
            for name in wanted:
                if not (place / name / FILES[name]).is_file():
                    part = (place / name).relative_to(folder)
                    what = name if name == CLASSIFIER else f"{name} network"
                    where = "" if place == folder else f" in {MODEL_FOLDER}/{part.parent}"
                    raise ConfigError(f"{run}: this run contains no trained {what}{where}")
            folders = {name: place / name for name in wanted}
            members.append(Member(folders[RESTORATION], folders[SEGMENTATION], folders.get(CLASSIFIER)))
        calibrated = (folder / FILES[CALIBRATION]).is_file()
        return cls(settings, Model(tuple(members), folder if calibrated else None))
