"""Upkeep of the cache: listing, reasons for changed keys, all kinds of damage, and pruning during runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.cli.cache import parse_age, parse_size, show_size
from flows.runs.runner import BuiltArtifact, find_or_make, make_in_this_process
from flows.store import upkeep
from flows.store.artifacts import SIDECAR, ArtifactStore
from flows.store.references import Ref
from flows.store.step import STEPS, Call, load_steps
from medad.base.errors import ConfigError
from tests.flows.fake_steps import FAKE, fake

DAY_S = 86400.0
RUN_UNDER_WAY = """
import time
from flows.store.artifacts import ArtifactStore
ArtifactStore().mark_run()
print("marked", flush=True)
time.sleep(60)
"""


def make(call: Call, *, unused_days: float = 0.0) -> Ref:
    """Run a call without Prefect, and set the time of last use of its artifact to this age."""
    found = find_or_make("a", call, refresh=False, make=make_in_this_process)
    assert isinstance(found, BuiltArtifact)
    then = time.time() - unused_days * DAY_S
    os.utime(found.ref.folder(), (then, then))
    return found.ref


def keys() -> set[str]:
    return {each.key for each in upkeep.list_artifacts(ArtifactStore())}


def test_what_is_kept_is_listed_from_the_longest_unused(cache: Path) -> None:
    refs = {days: make(fake("x" * days), unused_days=days) for days in (1, 5, 3)}
    found = upkeep.list_artifacts(ArtifactStore())
    assert [each.key for each in found] == [refs[days].key for days in (5, 3, 1)]
    for each in found:
        assert each.size == sum(path.stat().st_size for path in (cache / "fake" / each.key).rglob("*"))
        assert each.sidecar is not None
    assert upkeep.list_artifacts(ArtifactStore(), "other") == []


def test_use_is_noted_by_who_finds_and_by_who_verifies(cache: Path) -> None:
    store, call = ArtifactStore(), fake("a")
    ref = make(call, unused_days=9)
    assert store.find(call.step, ref.key) is not None
    assert time.time() - ref.folder().stat().st_mtime < 60
    make(call, unused_days=9)
    store.verify(ref)
    assert time.time() - ref.folder().stat().st_mtime < 60


@pytest.mark.parametrize(
    ("breaks", "rule"),
    [
        (lambda folder: (folder / "result.txt").write_text("b", encoding="utf-8"), "result.txt was changed"),
        (
            lambda folder: (folder / "result.txt").write_text("", encoding="utf-8"),
            "result.txt was changed or is incomplete",
        ),
        (lambda folder: (folder / "result.txt").unlink(), "result.txt cannot be read"),
        (lambda folder: (folder / SIDECAR).unlink(), "cannot be read"),
        (lambda folder: _change(folder, "step", "other"), "another artifact, or was changed"),
        (lambda folder: _change(folder, "digest", "0" * 64), f"{SIDECAR} was changed"),
        (lambda folder: _change(folder, "parts", {"inputs": {"text": "b"}}), "another artifact, or was changed"),
    ],
)
def test_damage_is_found_though_size_and_time_stamps_are_the_same(
    cache: Path, breaks: Callable[[Path], object], rule: str
) -> None:
    whole, ref = make(fake("whole")), make(fake("a"))
    stamps = {path: path.stat().st_mtime_ns for path in ref.folder().iterdir()}
    breaks(ref.folder())
    for path, stamp in stamps.items():
        if path.exists():
            os.utime(path, ns=(stamp, stamp))
    [damage] = upkeep.find_damaged(ArtifactStore())
    assert damage.artifact.key == ref.key
    assert rule in damage.rule
    assert upkeep.remove(ArtifactStore(), damage.artifact)
    assert keys() == {whole.key}
    assert not list((cache / "tmp").iterdir())


def _change(folder: Path, name: str, value: object) -> None:
    record = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    (folder / SIDECAR).write_text(json.dumps(record | {name: value}), encoding="utf-8")


def test_choosing_by_age_then_by_size(cache: Path) -> None:
    refs = [make(fake(text), unused_days=days) for text, days in (("a", 40), ("b", 20), ("c", 10), ("d", 0))]
    everything, now = upkeep.list_artifacts(ArtifactStore()), time.time()
    size = everything[0].size
    assert all(abs(each.size - size) <= 2 for each in everything)

    def chosen(**limits: Any) -> list[int]:
        given: dict[str, Any] = {"older_than_s": None, "max_bytes": None, "in_use_since": float("inf")} | limits
        return [
            [ref.key for ref in refs].index(each.key) for each in upkeep.choose_unused(everything, now=now, **given)
        ]

    assert chosen() == []
    assert chosen(older_than_s=15 * DAY_S) == [0, 1]
    assert chosen(max_bytes=int(2.5 * size)) == [0, 1]
    assert chosen(older_than_s=30 * DAY_S, max_bytes=int(1.5 * size)) == [0, 1, 2]
    assert chosen(max_bytes=0) == [0, 1, 2, 3]
    # everything that a run of 15 days may have used stays, even beyond the limits
    assert chosen(max_bytes=0, in_use_since=now - 15 * DAY_S) == [0, 1]


def test_a_clock_that_went_back_makes_nothing_old(cache: Path) -> None:
    make(fake("a"), unused_days=-3)
    everything = upkeep.list_artifacts(ArtifactStore())
    assert (
        upkeep.choose_unused(everything, older_than_s=0.0, max_bytes=None, now=time.time(), in_use_since=time.time())
        == []
    )
    assert upkeep.age(everything[0]) == "0 min"


def test_what_a_run_is_making_is_not_removed(cache: Path) -> None:
    ref, store = make(fake("a")), ArtifactStore()
    [each] = upkeep.list_artifacts(store)
    with store.lock(f"fake-{ref.key}"):
        assert not upkeep.remove(store, each)
    assert keys() == {ref.key}
    assert upkeep.remove(store, each)
    assert not upkeep.remove(store, each)


def test_a_run_is_under_way_until_it_ends_or_its_process_dies(cache: Path) -> None:
    store = ArtifactStore()
    assert store.oldest_run_start() == float("inf")
    before = time.time()
    mark = store.mark_run()
    assert before - 1 <= store.oldest_run_start() <= time.time() + 1
    mark.end()
    assert store.oldest_run_start() == float("inf")
    with subprocess.Popen([sys.executable, "-c", RUN_UNDER_WAY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert store.oldest_run_start() < float("inf")
        process.kill()
    assert store.oldest_run_start() == float("inf")
    assert not list((cache / "runs").iterdir())


def test_changes_are_named_by_part() -> None:
    parts = FAKE.key_parts({"scan": "a" * 64, "settings": {"low": -100, "px": [1, 2]}, "gone": 1})
    other = FAKE.key_parts({"scan": "b" * 64, "settings": {"low": -150, "px": [1, 2]}, "added": 2})
    lines = [change.line for change in upkeep.changes(parts, other)]
    assert lines == [
        "inputs.added: new",
        "inputs.gone: removed",
        "inputs.scan changed",
        "inputs.settings.low: -100 -> -150",
    ]
    assert upkeep.changes(parts, parts) == []


def test_the_nearest_key_is_of_the_same_input_under_another_setting(cache: Path) -> None:
    store, step = ArtifactStore(), FAKE

    def write(out: Path) -> None:
        (out / "result.txt").write_text("x", encoding="utf-8")

    def keep(**inputs: Any) -> None:
        store.build(step, step.key_parts(inputs), write)

    wanted = step.key_parts({"scan": "a" * 64, "low": 1, "high": 2})
    assert upkeep.nearest(store, step, wanted) is None
    keep(scan="b" * 64, low=1, high=2)
    keep(scan="a" * 64, low=5, high=6)
    assert [change.line for change in upkeep.nearest(store, step, wanted) or []] == [
        "inputs.high: 6 -> 2",
        "inputs.low: 5 -> 1",
    ]


def test_every_step_of_both_flows_is_known() -> None:
    steps = load_steps("flows.liver", "flows.zsad")
    assert {"prepare", "restoration", "segment", "report", "step-window", "zsad-encode", "zsad-maps"} <= set(steps)
    assert all(name == step.name for name, step in steps.items())


@pytest.mark.parametrize(("text", "size"), [("500", 500), ("20G", 20 * 10**9), ("1.5 TB", 1500 * 10**9), ("3kb", 3000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "age_s"), [("12h", 43200.0), ("30d", 30 * DAY_S), ("0.5w", 3.5 * DAY_S)])
def test_ages_are_read(text: str, age_s: float) -> None:
    assert parse_age(text) == age_s


@pytest.mark.parametrize("text", ["", "x", "-3d", "3", "3 years", "20G"])
def test_other_ages_are_one_clear_line(text: str) -> None:
    with pytest.raises(ConfigError, match="--older-than"):
        parse_age(text)
    with pytest.raises(ConfigError, match="--max-size"):
        parse_size(text.replace("20G", "20P").replace("3", "3 x"))


def test_sizes_are_shown() -> None:
    assert [show_size(size) for size in (12, 3200, 4 * 10**6, 7 * 10**9)] == ["12 B", "3.2 kB", "4.0 MB", "7.0 GB"]


def test_a_step_that_does_not_exist_is_refused_with_the_known_ones(cli: Callable[..., Any]) -> None:
    unknown, empty = cli("cache", "ls", "window"), cli("cache", "ls", "step-window")
    assert (unknown.code, empty.code) == (2, 0)
    assert "window: not a step; the steps are" in unknown.err
    assert "step-window" in unknown.err


def test_the_commands(cache: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = make(fake("old"), unused_days=40), make(fake("new"))
    ran = cli("cache", "ls")
    assert ran.code == 0
    assert (
        f"2 artifacts, {show_size(sum(each.size for each in upkeep.list_artifacts(ArtifactStore())))}, in {cache}"
        in ran.out
    )
    assert [row["key"] for row in cli("cache", "ls", "fake", "--json").answer["artifacts"]] == [old.key, new.key]
    assert old.key[:12] in cli("cache", "ls", "fake").out

    assert "up to date" in cli("cache", "explain", old.key[:12]).out
    monkeypatch.delitem(STEPS, "fake")
    replace(FAKE, version=2)
    assert "stale: version: 1 -> 2" in cli("cache", "explain", old.key[:12]).out
    ran = cli("cache", "explain", "zz")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "no artifacts" in ran.err

    (new.folder() / "result.txt").write_text("bad", encoding="utf-8")
    ran = cli("cache", "verify")
    assert ran.code == 2
    assert f"{new.folder()}: result.txt was changed" in ran.out
    assert keys() == {old.key, new.key}
    assert cli("cache", "verify", "--remove").code == 0
    assert cli("cache", "verify").code == 0
    assert keys() == {old.key}

    (cache / "checkpoints").mkdir()
    for name, days in (("restoration-a.pt", 40), ("restoration-b.pt", 1)):
        path = cache / "checkpoints" / name
        path.touch()
        os.utime(path, (time.time() - days * DAY_S,) * 2)
    ran = cli("cache", "prune", "--older-than", "30d", "--dry-run", "--json")
    assert ran.answer["dry_run"]
    assert ran.answer["checkpoints"] == ["restoration-a.pt"]
    assert [row["key"] for row in ran.answer["removed"]] == [old.key]
    assert keys() == {old.key}
    assert "1 artifacts removed" in cli("cache", "prune", "--older-than", "30d").out
    assert keys() == set()
    assert [path.name for path in (cache / "checkpoints").iterdir()] == ["restoration-b.pt"]
    assert cli("cache", "prune").code == 2


def test_what_was_pruned_is_made_anew(cache: Path, runs: list[str]) -> None:
    ref = make(fake("a"))
    [each] = upkeep.list_artifacts(ArtifactStore())
    assert upkeep.remove(ArtifactStore(), each)
    assert not list((cache / "fake").iterdir())
    assert make(fake("a")) == ref
    assert runs == ["a", "a"]
    shutil.rmtree(cache)
