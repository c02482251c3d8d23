"""LEAF: types of settings fields that may name a patient, and the part of them that may be shown. zsad uses it too.

Prefect, manifests and reports store JSON. The JSON that pydantic makes therefore contains only what may be shown. The
settings objects and `model_dump()` in python mode keep the true values.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, cast, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema, to_jsonable_python

from medad.base.text import PLACEHOLDER

SAMPLES_PREFIX = "samples:"
LOCAL_MODEL_PREFIX = "local-dir:"

# fmt: off
ORDINARY = frozenset((
    "abdomen", "anonymized", "anonymous", "axial", "btcv", "case", "cases", "data", "dataset", "datasets", "dicom",
    "false", "female", "home", "image", "images", "imagestr", "input", "inputs", "label", "labels", "labelstr",
    "lits", "liver", "male", "mask", "masks", "media", "name", "nifti", "none", "output", "patient", "patients",
    "research", "runs", "samples", "scan", "scans", "segmentation", "series", "share", "shared", "slice", "slices",
    "study", "test", "train", "true", "tumor", "tumour", "unknown", "volume", "volumes",
))
# fmt: on
"""Words that are common in folder names and headers and identify no patient. Hiding them would garble messages."""

_PATTERN_WORDS = ORDINARY | {"ct", "gz", "img", "mask", "mha", "mhd", "nhdr", "nii", "nrrd", "seg", "vol"}
_PLAIN_ID = re.compile(r"(case|ct|btcv|lits)-[0-9a-f]+(-\d+)?")


@dataclass(frozen=True)
class Private:
    """Marker of a private field type. JSON contains `shown(value)` instead of the value."""

    shown: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        serialization = core_schema.plain_serializer_function_ser_schema(self.shown, when_used="json")
        return cast("CoreSchema", {**handler(source), "serialization": serialization})


def _hidden_path(_: Path) -> str:
    return PLACEHOLDER


def _hidden_folder(text: str) -> str:
    return text if text.startswith(SAMPLES_PREFIX) else PLACEHOLDER


def _hidden_model(text: str) -> str:
    return f"{LOCAL_MODEL_PREFIX}{PLACEHOLDER}" if text.startswith(LOCAL_MODEL_PREFIX) else text


def _hidden_file(text: str) -> str:
    return f"{PLACEHOLDER}/{PurePath(text).name}"


def _hidden_pattern(text: str) -> str:
    words = re.findall(r"[^\W_]+", text.lower())
    return text if _PATTERN_WORDS.issuperset(words) else f"{PLACEHOLDER}/*"


def _hidden_expression(text: str) -> str:
    words = re.findall(r"[^\W_]+", re.sub(r"\\[dDwWsSbB]", " ", text.lower()))
    return text if _PATTERN_WORDS.issuperset(words) else PLACEHOLDER


def _hidden_cases(names: Sequence[str]) -> list[str]:
    return [name if _PLAIN_ID.fullmatch(name) else PLACEHOLDER for name in names]


PrivatePath = Annotated[Path, Private(_hidden_path)]
"""A path, shown as a placeholder. Prefect encodes flow parameters by value, so the marker has no effect on a bare
parameter."""
DataRoot = Annotated[str, Private(_hidden_folder)]
"""A folder, shown as a placeholder. `samples:NAME` is shown as it is."""
ModelName = Annotated[str, Private(_hidden_model)]
"""A model's name, shown as it is. `local-dir:FOLDER` is shown without the folder."""
ModelFile = Annotated[str, Private(_hidden_file)]
"""A file or folder of weights, shown by its name without the folders above it."""
PrivatePattern = Annotated[str, Private(_hidden_pattern)]
"""A glob pattern. It is shown if all its words are ordinary: other words may name a patient's folder."""
PrivateExpression = Annotated[str, Private(_hidden_expression)]
"""A regular expression with one group. It is shown if all its words are ordinary. The placeholder is also a valid
expression with one group."""
PrivateCases = Annotated[tuple[str, ...], Private(_hidden_cases)]
"""Cases. Ids are shown, file names are hidden."""


def changes_of(settings: type[BaseModel]) -> Private:
    """Return the marker for a mapping of changes by dotted key. Each value is hidden like the field that it changes."""
    return Private(lambda values: {key: _shown(settings, key, value) for key, value in values.items()})


def field_types(settings: type[BaseModel]) -> dict[str, Any]:
    """Return the type of each field by its name, with its markers."""
    return {
        name: Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        for name, field in settings.model_fields.items()
    }


@functools.cache
def private_fields(settings: type[BaseModel]) -> frozenset[str]:
    """Return the names of the fields with a private value. Fields inside nested settings are not included."""
    return frozenset(
        name
        for name, kind in field_types(settings).items()
        if any(isinstance(part, Private) for part in nested_types(kind))
    )


def is_private(kind: Any) -> bool:
    """Return whether a type, or any type nested in it, is private."""
    return any(
        isinstance(part, Private) or (_is_model(part) and any(map(is_private, field_types(part).values())))
        for part in nested_types(kind)
    )


def type_at(settings: type[BaseModel], key: str) -> Any:
    """Return the type of the field at a dotted key. None: the field does not exist."""
    name, _, rest = key.partition(".")
    kind = field_types(settings).get(name)
    if not rest:
        return kind
    found = (type_at(part, rest) for part in nested_types(kind) if _is_model(part))
    return next((each for each in found if each is not None), None)


def nested_types(kind: Any) -> Iterator[Any]:
    """Yield a type, all types nested in it, and their markers."""
    yield kind
    for part in get_args(kind):
        yield from nested_types(part)


def _is_model(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _shown(settings: type[BaseModel], key: str, value: Any) -> Any:
    """Return the part of a changed value that may be shown. The value is not validated yet."""
    if isinstance(value, Mapping) and value:
        return {name: _shown(settings, f"{key}.{name}", inner) for name, inner in value.items()}
    kind = type_at(settings, key)
    if kind is None:
        return PLACEHOLDER
    if not is_private(kind):
        return to_jsonable_python(value)
    try:
        adapter = TypeAdapter(kind)
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError:
        return PLACEHOLDER
