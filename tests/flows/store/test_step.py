"""Steps and calls: the parts of a key, the arguments of a function, and the list of all steps."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from flows.store import upkeep
from flows.store.artifacts import ArtifactStore
from flows.store.digests import file_sha256
from flows.store.references import Ref
from flows.store.step import Keyed, Place, Step, content_key, content_of, keyed, load_steps, shown
from medad.base.errors import InputError
from medad.base.settings import MACHINE_FIELDS, MachineSettings
from medad.config.liver import LiverSettings
from tests.flows.fake_steps import SEEN, TAKE, TRAIN

ROOT = Path(__file__).parents[3]
REF = Ref(step="a", key="k", digest="d" * 64, path="a/k")
OTHER = Ref(step="b", key="", digest="e" * 64, path="planned/b")
HERE = Place("cpu", 3)


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any = 0
    made: str = field(default="made", init=False)


class Deep(BaseModel):
    low: float = 1.0
    high: float = 2.0


class Config(BaseModel):
    name: str = "x"
    deep: Deep = Deep()


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


@pytest.mark.parametrize(
    ("value", "content"),
    [
        (None, None),
        (3, 3),
        ("text", "text"),
        (REF, "d" * 64),
        ((REF, [1, 2]), ["d" * 64, [1, 2]]),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2, 1}), [1, 2]),
        ({1: REF}, {"1": "d" * 64}),
        (Pair(REF, (1,)), {"left": "d" * 64, "right": [1], "made": "made"}),
        (Config(), {"name": "x", "deep": {"low": 1.0, "high": 2.0}}),
        (Keyed("not looked at", {"by": REF}), {"by": "d" * 64}),
        ([Pair(Keyed(1, 2))], [{"left": 2, "right": 0, "made": "made"}]),
    ],
)
def test_what_an_argument_counts_by(value: Any, content: Any) -> None:
    assert content_of(value) == content


def test_a_file_counts_by_its_content_and_not_by_its_name(cache: Path, tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("MUSTERMANN.txt", "same.txt", "other.txt"))
    for path, text in ((one, "a"), (same, "a"), (other, "b")):
        path.write_text(text, encoding="utf-8")
    assert content_of(one) == content_of(same) == file_sha256(one)
    assert content_of(one) != content_of(other)
    with pytest.raises(InputError, match="no such file") as raised:
        content_of({"scan": tmp_path / "nothing"})
    assert raised.value.path == tmp_path / "nothing"


def test_fields_are_left_out_by_dotted_name() -> None:
    left_out = frozenset({"settings.deep.low", "settings.name"})
    assert content_of(Config(), left_out, "settings") == {"deep": {"high": 2.0}}
    assert content_of(Config(), left_out) == content_of(Config()), "names of another argument do not matter"
    assert content_of([Config()], left_out, "settings") == [{"deep": {"high": 2.0}}]
    assert content_of(Keyed(1, {"name": 1, "deep": 2}), left_out, "settings") == {"deep": 2}


def test_a_keyed_value_counts_by_its_fields_and_by_more() -> None:
    settings = Config()
    value = keyed(settings, "name", "deep.low", textures="t")
    assert value.value is settings
    assert content_of(value) == {"deep": {"high": 2.0}, "textures": "t"}
    assert content_of(keyed(settings, deep=None)) == {"name": "x", "deep": None}


def test_settings_of_a_report_count_by_all_but_the_machine() -> None:
    data = {"root": "/share", "layout": "btcv"}
    settings = LiverSettings.model_validate({"name": "x", "train_data": data, "test_data": data})
    content = content_of(shown(settings))
    assert set(content) == set(LiverSettings.model_fields) - set(MACHINE_FIELDS)
    assert shown(settings).value is settings


def test_inputs_are_the_arguments_without_what_is_not_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.store.step.STEPS", {})
    step = replace(TAKE, not_in_key=frozenset({"folder", "settings.deep.low"}))
    call = step(settings=Config(), folder=Path("/nowhere"), ref=REF)
    assert call.inputs() == {"settings": {"name": "x", "deep": {"high": 2.0}}, "ref": "d" * 64}
    assert call.parts() == step.key_parts(call.inputs())


@pytest.mark.parametrize("where", [{"batch_size": 9}, {"phase": "joint"}, {"machine": MachineSettings(gpus="cpu")}])
def test_where_and_how_a_call_runs_is_in_no_key(where: dict[str, Any]) -> None:
    assert content_key(TAKE(text="a", **where).parts()) == content_key(TAKE(text="a").parts())
    assert content_key(TAKE(text="b").parts()) != content_key(TAKE(text="a").parts())


def test_references_are_found_however_deep() -> None:
    arguments = [REF, (3, [OTHER]), {"deep": {"er": REF}}, Pair(OTHER), Keyed(REF, [OTHER]), Keyed(Path("x"), REF)]
    found = [list(TAKE(value=value).refs()) for value in arguments]
    assert found == [[REF], [OTHER], [REF], [OTHER], [REF, OTHER], [REF]]
    assert list(TAKE(none=None, settings=Config(), text="a", path=Path("x")).refs()) == []
    assert [ref.made for ref in (REF, OTHER)] == [True, False]


def test_a_function_gets_folders_for_references_and_values_for_keyed_ones(cache: Path, tmp_path: Path) -> None:
    settings = Config()
    TAKE(
        ref=REF,
        several=(REF, 3),
        inside=Pair([REF], Keyed(REF, 1)),
        named={"x": REF},
        settings=Keyed(settings, 1),
        text="a",
    ).run(tmp_path, HERE, key="k")
    folder = cache / "a" / "k"
    assert {
        "out": tmp_path,
        "ref": folder,
        "several": (folder, 3),
        "inside": Pair([folder], folder),
        "named": {"x": folder},
        "settings": settings,
        "text": "a",
    } == SEEN, "the function has no parameter for the device, so it gets none"
    assert SEEN["settings"] is settings


def test_a_training_gets_its_place_and_a_checkpoint_that_outlives_only_a_failure(cache: Path, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    place = Place("cuda:0", 5, lambda *progress: reported.append(progress))
    checkpoint = cache / "checkpoints" / "train-key.pt"
    with pytest.raises(ZeroDivisionError):
        TRAIN(settings="broken").run(tmp_path, place, key="key")
    assert checkpoint.read_text(encoding="utf-8") == "half way"
    TRAIN(settings="whole").run(tmp_path, place, key="key")
    assert {"device": "cuda:0", "largest_batch": 5, "checkpoint": checkpoint} == SEEN
    assert reported == [(1, 2)]
    assert not checkpoint.exists()
    TRAIN(settings="whole", checkpoint=tmp_path / "given").run(tmp_path, place, key="key")
    assert SEEN["checkpoint"] == tmp_path / "given"
    assert (tmp_path / "given").is_file(), "a checkpoint given as an argument is not removed"


def test_two_steps_of_one_name_are_an_error() -> None:
    assert replace(TAKE) == TAKE
    with pytest.raises(ValueError, match="two steps are called take"):
        replace(TAKE, version=2)


DECLARING = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "flows").rglob("*.py")
    if any(
        isinstance(node, ast.Call) and "Step" in {getattr(node.func, "id", ""), getattr(node.func, "attr", "")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
)
"""Modules of flows that declare steps."""
STEPS = load_steps("flows.liver", "flows.zsad")
LOAD = """
import sys
from flows.store.step import load_steps
steps = load_steps("flows.liver", "flows.zsad")
print(*sorted(name for name in sys.modules if name.startswith("flows.")))
print(*sorted(steps))
"""


def test_every_step_is_known_to_explain_verify_and_prune() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, check=True, cwd=ROOT, encoding="utf-8"
    )
    modules, names = map(str.split, done.stdout.splitlines())
    assert DECLARING
    assert set(DECLARING) <= set(modules)
    assert {
        "ablation", "embedding", "examples", "sensitivity", "sensitivity-report", "baseline", "zsad-compare",
        "zsad-system", "zsad-train", "prepare", "restoration", "segment", "report", "step-window", "zsad-encode",
        "zsad-maps",
    } <= set(names)  # fmt: skip


DECLARED = [
    step
    for module in DECLARING
    for value in vars(importlib.import_module(module)).values()
    for step in (value.values() if isinstance(value, dict) else (value,))
    if isinstance(step, Step)
]


@pytest.mark.parametrize("step", DECLARED, ids=lambda step: step.name)
def test_a_steps_function_exists_and_takes_what_is_not_in_its_key(step: Step) -> None:
    function = step.load()
    parameters = inspect.signature(function).parameters
    assert "out" in parameters
    assert {"device", "on_progress"} & set(parameters) or step.kind is None
    for dotted in step.not_in_key:
        name, *below = dotted.split(".")
        assert name in parameters
        kinds = functools.reduce(_kinds_of_field, below, list(_plain(typing.get_type_hints(function)[name])))
        assert kinds, f"{dotted} is not a field of {name}"


def _kinds_of_field(kinds: list[Any], name: str) -> list[Any]:
    """Return the types of a field, for any of the given types that has it."""
    found: list[Any] = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields:
            found += _plain(kind.model_fields[name].annotation)
        elif is_dataclass(kind) and name in {each.name for each in fields(kind)}:
            found += _plain(typing.get_type_hints(kind)[name])
    return found


def _plain(annotation: Any) -> Iterator[Any]:
    """Yield the types of an annotation: all members of a union, and generic types without their arguments."""
    origin = typing.get_origin(annotation)
    if origin in {typing.Union, types.UnionType}:
        for each in typing.get_args(annotation):
            yield from _plain(each)
    else:
        yield origin or annotation


@pytest.mark.parametrize("step", DECLARED, ids=lambda step: step.name)
def test_explain_verify_and_prune_take_an_artifact_of_any_step(step: Step, cache: Path) -> None:
    store = ArtifactStore()
    ref, _ = store.build(step, step.key_parts({"x": 1}), lambda out: None)
    each = upkeep.find(store, ref.key)
    assert upkeep.outdated(each) == [], "up to date"
    assert upkeep.find_damaged(store) == []
    assert upkeep.list_artifacts(store, step.name) == [each]
    assert upkeep.remove(store, each)
    assert upkeep.list_artifacts(store) == []


@pytest.mark.parametrize("step", DECLARED, ids=lambda step: step.name)
def test_a_steps_files_and_libraries_are_there(step: Step) -> None:
    parts = step.key_parts({})
    assert set(parts["libraries"]) == set(step.libraries)
    assert len(parts["files"]) == len(step.files)
