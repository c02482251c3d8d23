"""What Prefect stores in clear (parameters, logs, states) and where a patient's name could slip in.

Cases go by their id. Paths travel as `PrivatePath`, which shows as a placeholder wherever it is written down; what is
said in logs, warnings and states goes through a filter that knows the names of the inputs and lets no other path by.
`docs/privacy.md` says what holds and what does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, PlainSerializer, SerializerFunctionWrapHandler, model_serializer
from pydantic_core.core_schema import SerializationInfo

from flows.privacy.log_filter import (
    ORDINARY,
    PLACEHOLDER,
    PathFilter,
    confined,
    install,
    learn_call,
    learn_data,
    path_filter,
)
from medad.config.ablation import AblationSettings
from medad.config.liver import LiverSettings
from medad.config.sensitivity import SensitivitySettings
from zsad.config.compare import CompareSettings
from zsad.config.run import ZsadSettings

__all__ = [
    "PLACEHOLDER",
    "PathFilter",
    "PrivateAblation",
    "PrivateCompare",
    "PrivateLiver",
    "PrivatePath",
    "PrivateSensitivity",
    "PrivateZsad",
    "Withholding",
    "confined",
    "install",
    "learn_call",
    "learn_data",
    "path_filter",
]

PrivatePath = Annotated[Path, PlainSerializer(lambda _: PLACEHOLDER, return_type=str, when_used="json")]
"""A path whose JSON is a placeholder, as a field of a model. (Prefect encodes parameters by value, not by annotation:
on a bare parameter this does nothing.)"""


def _hidden_folder(text: str) -> str:
    return text if text.startswith("samples:") else PLACEHOLDER


def _hidden_model(text: str) -> str:
    return f"local-dir:{PLACEHOLDER}" if text.startswith("local-dir:") else text


def _hidden_file(text: str) -> str:
    return f"{PLACEHOLDER}/{PurePath(text).name}"


_PATTERN_WORDS = ORDINARY | {"ct", "gz", "img", "mask", "mha", "mhd", "nhdr", "nii", "nrrd", "seg", "vol"}
_PLAIN_ID = re.compile(r"(case|ct|btcv|lits)-[0-9a-f]+(-\d+)?")


def _hidden_pattern(text: str) -> str:
    """A pattern's words may be a folder of one patient's."""
    words = re.findall(r"[^\W_]+", text.lower())
    return text if _PATTERN_WORDS.issuperset(words) else f"{PLACEHOLDER}/*"


def _hidden_expression(text: str) -> str:
    """A regular expression's words and numbers may be a patient's; what is shown in its place is one as well."""
    words = re.findall(r"[^\W_]+", re.sub(r"\\[dDwWsSbB]", " ", text.lower()))
    return text if _PATTERN_WORDS.issuperset(words) else PLACEHOLDER


def _hidden_cases(names: Sequence[str]) -> list[str]:
    """Cases may be asked for by their files' names."""
    return [name if _PLAIN_ID.fullmatch(name) else PLACEHOLDER for name in names]


def _hide(values: Any, key: Sequence[str], hide: Callable[[Any], Any]) -> None:
    """Put what may be shown in the place of each value at a key; what was excluded, or is None, has nothing to hide."""
    name, *rest = key
    if name == "*":
        for entry in values.values() if isinstance(values, dict) else values:
            _hide(entry, rest, hide)
    elif (found := values.get(name)) is not None:
        if rest:
            _hide(found, rest, hide)
        else:
            values[name] = hide(found)


class Withholding(BaseModel):
    """Settings whose JSON withholds paths: as a flow's parameter, in the manifest, in the report."""

    withheld: ClassVar[Mapping[str, Callable[[Any], Any]]]
    """Dotted key -> what is shown of its value; `*` stands for every entry of a list or mapping."""

    @model_serializer(mode="wrap")
    def _withhold(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if info.mode == "json":
            for key, hide in self.withheld.items():
                _hide(values, key.split("."), hide)
        return values

    @classmethod
    def of(cls, settings: BaseModel) -> Self:
        """The same settings, kept private. Raises pydantic's ValidationError for those of another flow."""
        return cls.model_validate(settings.model_dump())


_OF_SCANS: Mapping[str, Callable[[Any], Any]] = {
    "root": _hidden_folder,
    "images": _hidden_pattern,
    "labels": _hidden_pattern,
    "cases": _hidden_cases,
    "patients": _hidden_expression,
}


class PrivateLiver(Withholding, LiverSettings):
    """The liver flow's, without the folders of data and textures and the names of files in them."""

    withheld = {"synthesis.texture.folder": _hidden_folder} | {
        f"{use}.{key}": hide for use in ("train_data", "test_data") for key, hide in _OF_SCANS.items()
    }


class PrivateSensitivity(Withholding, SensitivitySettings):
    """Those of a study of planted lesions, likewise."""

    withheld = {f"healthy.{key}": hide for key, hide in _OF_SCANS.items()}


def _hidden_changes(values: dict[str, Any]) -> dict[str, Any]:
    """Changes by dotted key, withheld as the settings that they are put over."""
    hide = PrivateLiver.withheld
    return {key: hide[key](value) if key in hide and value is not None else value for key, value in values.items()}


class PrivateAblation(Withholding, AblationSettings):
    """The ablation's, without the data folders and the names of files in them, wherever they are set. Its sweeps hold
    none: their schema refuses them."""

    withheld = {
        **{f"base.{key}": hide for key, hide in PrivateLiver.withheld.items()},
        "set": _hidden_changes,
        "rows.*.set": _hidden_changes,
    }


class PrivateZsad(Withholding, ZsadSettings):
    """The flow zsad's, without folders; of a file of weights the name is left."""

    withheld = {
        "data.root": _hidden_folder,
        "data.masks": _hidden_folder,
        "encoder.model": _hidden_model,
        "encoder.weights": _hidden_file,
        "adapt.textures": _hidden_folder,
    }


class PrivateCompare(Withholding, CompareSettings):
    """The comparison's, without folders; of a file of weights the name is left."""

    withheld = {
        **{f"{use}.{key}": _hidden_folder for use in ("data", "auxiliary") for key in ("root", "masks")},
        "encoders.*.model": _hidden_model,
        "encoders.*.weights": _hidden_file,
        **{f"systems.*.{key}": _hidden_file for key in ("checkpoint", "clipseg", "sam", "salient")},
        "systems.*.adapt.textures": _hidden_folder,
    }
