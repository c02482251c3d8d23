"""The page of all settings, docs/reference/settings.md, generated from the settings classes.

python -m flows.cli.settings_page > docs/reference/settings.md
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from medad.base.private import Private, field_types, nested_types
from medad.base.settings import MACHINE_FIELDS, MachineSettings
from medad.config.ablation import AblationSettings
from medad.config.inbox import InboxSettings
from medad.config.liver import LiverSettings
from medad.config.sensitivity import SensitivitySettings
from zsad.config.settings import ZsadSettings
from zsad.config.system_base import SystemSettings

Model = type[BaseModel]

HEAD = """# Settings

All settings of the configuration files, by dotted key. `--set KEY=VALUE` overrides any of them on the command line.
Lengths end in `_mm` or `_px`, densities in `_hu`. A range is a pair `[low, high]`. None is `null` in YAML.
A *private* value does not appear in reports, manifests or Prefect, see [privacy](../explanation/privacy.md).
A class's defaults are the published values. A value that published code fixes and no configuration changes is a
constant in the code.

<!-- python -m flows.cli.settings_page > docs/reference/settings.md -->
"""


@dataclass(frozen=True)
class Chapter:
    """The settings of one kind of file."""

    title: str
    text: str
    model: Model

    @property
    def link(self) -> str:
        return f"[{self.title}](#{self.title.lower().replace(' ', '-')})"


MACHINE = Chapter("Machine", "These settings are part of all files below, except that of an inbox.", MachineSettings)
CHAPTERS = (
    MACHINE,
    Chapter("Liver run", "`adflows liver run`, `prepare`, `train`, `evaluate`; `configs/liver`.", LiverSettings),
    Chapter("Liver ablation", "`adflows liver ablate`; `configs/liver/ablation.yaml`.", AblationSettings),
    Chapter("Liver sensitivity", "`adflows liver sensitivity`.", SensitivitySettings),
    Chapter("Liver inbox", "`adflows liver inbox`; `configs/inbox`.", InboxSettings),
    Chapter("Image run", "`adflows zsad run`, `score`, `compare` and `train`; `configs/zsad`.", ZsadSettings),
)


def settings_page() -> str:
    """Return the page as Markdown."""
    parts, known = [HEAD], {chapter.model: ("", chapter) for chapter in CHAPTERS}
    for chapter in CHAPTERS:
        parts += [f"## {chapter.title}\n", f"{chapter.text}\n"]
        if chapter is not MACHINE and issubclass(chapter.model, MachineSettings):
            parts.append(f"Further settings: {MACHINE.link}.\n")
        parts += _tables(chapter.model, "", chapter, known)
    return "\n".join(parts)


def _tables(model: Model, prefix: str, chapter: Chapter, known: dict[Model, tuple[str, Chapter]]) -> Iterator[str]:
    """Yield the table of a class, then those of the groups in it. `known`: tables that exist already."""
    if prefix:
        yield f"### `{prefix.removesuffix('.')}`\n"
        yield f"{inspect.cleandoc(model.__doc__ or '')}\n"
    own = [name for name in model.model_fields if not _is_described_elsewhere(model, name, chapter)]
    groups: list[tuple[Model, str]] = []
    if own:
        yield "| setting | value | default | description |\n|---|---|---|---|"
    for name in own:
        kind, key = field_types(model)[name], f"{prefix}{name}"
        inner = [part for part in nested_types(kind) if _is_model(part)]
        value = _type_text(kind)
        if len(inner) == 1:
            at = (
                "[]"
                if get_origin(_unwrapped(kind)) is tuple
                else ".NAME"
                if get_origin(_unwrapped(kind)) is dict
                else ""
            )
            if inner[0] in known:
                value += f", as {_table_reference(*known[inner[0]], chapter)}"
            else:
                groups.append((inner[0], f"{key}{at}."))
                known[inner[0]] = f"{key}{at}", chapter
        elif inner:
            groups.append((SystemSettings, f"{key}[]."))
            groups += [(one, f"{key}[] {one.model_fields['system'].default}.") for one in inner]
        cells = (f"`{key}`", value, _default_text(model.model_fields[name]), description(model, name))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    for one, at in groups:
        yield from _tables(one, at, chapter, known)


def _table_reference(key: str, chapter: Chapter, here: Chapter) -> str:
    """Return a reference to a table, for use in the chapter `here`."""
    parts = [f"`{key}`"] * bool(key) + [chapter.link] * (chapter is not here)
    return " of ".join(parts)


def _is_described_elsewhere(model: Model, name: str, chapter: Chapter) -> bool:
    if chapter is not MACHINE and name in MACHINE_FIELDS and issubclass(model, MachineSettings):
        return True
    return model is not SystemSettings and issubclass(model, SystemSettings) and name in SystemSettings.model_fields


def description(model: Model, name: str) -> str:
    """Return the text below a field in its class. Raise KeyError if it has none."""
    owner = next(one for one in model.__mro__ if name in inspect.get_annotations(one))
    return _descriptions(owner.__module__)[owner.__name__, name]


@functools.cache
def _descriptions(module: str) -> Mapping[tuple[str, str], str]:
    tree = ast.parse(Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8"))
    found = {}
    for one in tree.body:
        body = one.body if isinstance(one, ast.ClassDef) else []
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                assert isinstance(one, ast.ClassDef)
                found[one.name, field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def _unwrapped(kind: Any) -> Any:
    """Return a type without its annotations and without None."""
    if get_origin(kind) is Annotated:
        return _unwrapped(get_args(kind)[0])
    options = [part for part in get_args(kind) if part is not type(None)]
    return _unwrapped(options[0]) if get_origin(kind) in (Union, types.UnionType) and len(options) == 1 else kind


def _type_text(kind: Any, marks: tuple[Any, ...] = ()) -> str:
    """Return a type in words, with its limits."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        return _type_text(parts[0], (*marks, *(each for mark in parts[1:] for each in _flat(mark))))
    if get_origin(kind) in (Union, types.UnionType):
        if all(map(_is_model, parts)):
            return "one of the groups below"
        return " or ".join("none" if part is type(None) else _type_text(part, marks) for part in parts)
    limits = {
        name: found
        for name in ("ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length", "pattern")
        if (found := next((got for mark in marks if (got := getattr(mark, name, None)) is not None), None)) is not None
    }
    private = "private " if any(isinstance(mark, Private) for mark in marks) else ""
    if parts:
        return f"{private}{_container_text(get_origin(kind), parts, limits)}"
    words = {str: "text", bool: "true or false", int: "integer", float: "number"}
    return f"{private}{'group' if _is_model(kind) else words.get(kind, 'any')}{_limit_text(limits)}"


def _container_text(origin: Any, parts: tuple[Any, ...], limits: Mapping[str, Any]) -> str:
    if origin is Literal:
        return ", ".join(f"`{_yaml(part)}`" for part in parts)
    if origin is dict:
        return "mapping" if parts[1] is Any else f"mapping to {_type_text(parts[1])}"
    if parts[-1] is not Ellipsis:
        return f"{'pair' if len(parts) == 2 else f'{len(parts)} values'} ({_type_text(parts[0])})"
    least, most = limits.get("min_length"), limits.get("max_length")
    many = f" of {least} to {most}" if most else f" of at least {least}" if least else ""
    return f"list{many} ({_type_text(parts[0])})"


def _is_model(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _flat(mark: Any) -> list[Any]:
    return [mark, *mark.metadata] if isinstance(mark, FieldInfo) else [mark]


def _limit_text(found: Mapping[str, Any]) -> str:
    if "pattern" in found:
        return f" `{found['pattern']}`"
    if {"ge", "le"} <= found.keys():
        texts = [f" {found['ge']:g} to {found['le']:g}"]
    else:
        words = {"ge": " at least", "gt": " above", "le": " at most", "lt": " below"}
        texts = [f"{words[name]} {found[name]:g}" for name in words if name in found]
    return ",".join(texts) + (f", multiple of {found['multiple_of']}" if "multiple_of" in found else "")


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "needed"
    if isinstance(default, BaseModel):  # show only values that differ from the class's defaults
        given = {
            name: getattr(default, name)
            for name, own in type(default).model_fields.items()
            if getattr(default, name) != own.get_default(call_default_factory=True, validated_data={})
        }
        return f"`{_yaml(given)}`" if given else ""
    return f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    """Return a value as one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, BaseModel):
        return _yaml(value.model_dump(exclude_defaults=True))
    return value if isinstance(value, str) and value else json.dumps(to_jsonable_python(value))


if __name__ == "__main__":
    sys.stdout.write(settings_page())
