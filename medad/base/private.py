"""LEAF: field types of settings whose values may name a patient, and what of them may be shown. Also used by `zsad`.

JSON made by pydantic holds what may be shown, since JSON is what Prefect, manifests and reports store. The settings
themselves, and `model_dump()` in its python mode, keep the true values.
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
"""Names that many layouts and headers share and that say nothing of a patient; hiding them would garble sentences."""

_PATTERN_WORDS = ORDINARY | {"ct", "gz", "img", "mask", "mha", "mhd", "nhdr", "nii", "nrrd", "seg", "vol"}
_PLAIN_ID = re.compile(r"(case|ct|btcv|lits)-[0-9a-f]+(-\d+)?")


@dataclass(frozen=True)
class Private:
    """Mark of a field's type: JSON holds `shown(value)` in place of the value."""

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
"""A path, shown as a placeholder. (Prefect encodes parameters by value: on a bare parameter this does nothing.)"""
DataRoot = Annotated[str, Private(_hidden_folder)]
"""A folder, shown as a placeholder; `samples:NAME` is shown."""
ModelName = Annotated[str, Private(_hidden_model)]
"""A model's name, shown; `local-dir:FOLDER` is shown without the folder."""
ModelFile = Annotated[str, Private(_hidden_file)]
"""A file or folder of weights, shown by its name alone."""
PrivatePattern = Annotated[str, Private(_hidden_pattern)]
"""A glob pattern, shown where all its words are ordinary: others may name one patient's folder."""
PrivateExpression = Annotated[str, Private(_hidden_expression)]
"""A regular expression with one group, shown where all its words are ordinary. The placeholder is one as well."""
PrivateCases = Annotated[tuple[str, ...], Private(_hidden_cases)]
"""Cases; ids are shown, names of files are not."""


def changes_of(settings: type[BaseModel]) -> Private:
    """Mark a mapping of changes by dotted key: each value is withheld as the field of `settings` that it changes."""
    return Private(lambda values: {key: _shown(settings, key, value) for key, value in values.items()})


def field_types(settings: type[BaseModel]) -> dict[str, Any]:
    """Name -> type of each field, marks included."""
    return {
        name: Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        for name, field in settings.model_fields.items()
    }


@functools.cache
def private_fields(settings: type[BaseModel]) -> frozenset[str]:
    """Return the names of the fields whose own value is private; those of groups within are not looked at."""
    return frozenset(
        name
        for name, kind in field_types(settings).items()
        if any(isinstance(part, Private) for part in nested_types(kind))
    )


def is_private(kind: Any) -> bool:
    """Whether a type, or any type within it, is private."""
    return any(
        isinstance(part, Private) or (_is_model(part) and any(map(is_private, field_types(part).values())))
        for part in nested_types(kind)
    )


def type_at(settings: type[BaseModel], key: str) -> Any:
    """The type of the field at a dotted key. None where there is no such field."""
    name, _, rest = key.partition(".")
    kind = field_types(settings).get(name)
    if not rest:
        return kind
    found = (type_at(part, rest) for part in nested_types(kind) if _is_model(part))
    return next((each for each in found if each is not None), None)


def nested_types(kind: Any) -> Iterator[Any]:
    """A type, what it is made of, and its marks."""
    yield kind
    for part in get_args(kind):
        yield from nested_types(part)


def _is_model(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _shown(settings: type[BaseModel], key: str, value: Any) -> Any:
    """A changed value as it may be shown; it has not been validated."""
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
