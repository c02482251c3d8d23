"""The artifact store makes each artifact once, completely, and never returns a damaged one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.store.artifacts import SIDECAR, ArtifactStore, BuildRecord, DamagedArtifactError
from flows.store.references import Ref
from flows.store.step import Step, content_key
from medad.base.errors import DiskFullError
from tests.flows.live_server import wait_for

STEP = Step("paint", 1, "medad.base.storage:sync_path", ("pydantic",), volatile=frozenset({"timing"}))
PARTS = STEP.key_parts({})


class Body:
    """A body that writes two files and counts its calls."""

    def __init__(self, colour: str = "green") -> None:
        self.calls = 0
        self.colour = colour

    def __call__(self, out: Path) -> None:
        self.calls += 1
        (out / "deep").mkdir()
        (out / "deep" / "picture").write_text(self.colour * 1000, encoding="utf-8")
        (out / "timing").write_text(f"{self.calls} {time.time_ns()}", encoding="utf-8")


def everything(root: Path) -> set[str]:
    """Return the files and folders of a cache that belong to artifacts or to their making."""
    names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    return {name for name in names if name not in {"digests.sqlite", "tmp", "locks", "paint"}}


def test_an_artifact_is_made_once_and_explains_itself(cache: Path) -> None:
    store, body = ArtifactStore(), Body()
    parts = STEP.key_parts({"colour": "green"})
    first, cached = store.build(STEP, parts, body)
    assert not cached
    assert store.build(STEP, parts, body) == (first, True)
    assert body.calls == 1
    assert (first.folder() / "deep" / "picture").read_text(encoding="utf-8") == "green" * 1000
    sidecar = json.loads((first.folder() / SIDECAR).read_text(encoding="utf-8"))
    assert sidecar["parts"]["inputs"] == {"colour": "green"}
    assert sidecar["files"]["deep/picture"]["size"] == 5000
    assert sidecar["key"] == content_key(sidecar["parts"]) == first.key
    assert everything(cache) == {f"paint/{first.key}"} | {
        f"paint/{first.key}/{name}" for name in ("deep", "deep/picture", "timing", SIDECAR)
    }


def test_what_timings_say_is_not_what_later_steps_depend_on(cache: Path) -> None:
    store, body = ArtifactStore(), Body()
    first, _ = store.build(STEP, PARTS, body)
    second, cached = store.build(STEP, PARTS, body, refresh=True)
    assert not cached
    assert body.calls == 2
    assert first.digest == second.digest
    assert store.build(STEP, PARTS, Body("red"), refresh=True)[0].digest != first.digest


def flip_bit(folder: Path) -> None:
    file = folder / "deep" / "picture"
    data = bytearray(file.read_bytes())
    data[1234] ^= 1
    file.write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / "deep" / "picture", 4999)


def delete_file(folder: Path) -> None:
    (folder / "deep" / "picture").unlink()


def delete_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def delete_sidecar(folder: Path) -> None:
    (folder / SIDECAR).unlink()


def truncate_sidecar(folder: Path) -> None:
    os.truncate(folder / SIDECAR, 100)


def forge_sidecar(folder: Path) -> None:
    """Make the sidecar agree with a changed file."""
    import hashlib

    (folder / "deep" / "picture").write_text("x" * 5000, encoding="utf-8")
    sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    sidecar["files"]["deep/picture"]["sha256"] = hashlib.sha256(b"x" * 5000).hexdigest()
    (folder / SIDECAR).write_text(json.dumps(sidecar), encoding="utf-8")


def damage_timing(folder: Path) -> None:
    """Volatile files are verified too."""
    (folder / "timing").write_text("never", encoding="utf-8")


DAMAGES = [
    flip_bit,
    truncate,
    delete_file,
    delete_all,
    delete_sidecar,
    truncate_sidecar,
    forge_sidecar,
    damage_timing,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_is_made_again(cache: Path, damage: Callable[[Path], None]) -> None:
    store, body = ArtifactStore(), Body()
    ref, _ = store.build(STEP, PARTS, body)
    damage(ref.folder())
    with pytest.raises(DamagedArtifactError):
        store.verify(ref)
    assert store.find(STEP, ref.key) is None
    again, cached = store.build(STEP, PARTS, body)
    assert not cached
    assert body.calls == 2
    assert again.digest == ref.digest
    assert (ref.folder() / "deep" / "picture").read_text(encoding="utf-8") == "green" * 1000
    store.verify(again)
    assert not list((cache / "tmp").iterdir())


def test_a_body_that_fails_leaves_nothing(cache: Path) -> None:
    def body(out: Path) -> BuildRecord | None:
        (out / "half").write_text("half", encoding="utf-8")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        ArtifactStore().build(STEP, PARTS, body)
    assert not everything(cache)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_leaves_nothing(cache: Path, error: Exception) -> None:
    def body(out: Path) -> BuildRecord | None:
        (out / "half").write_text("half", encoding="utf-8")
        raise error

    with pytest.raises(DiskFullError) as caught:
        ArtifactStore().build(STEP, PARTS, body)
    assert "\n" not in str(caught.value)
    assert not everything(cache)


def test_a_refresh_that_fails_keeps_what_was_there(cache: Path) -> None:
    store = ArtifactStore()
    ref, _ = store.build(STEP, PARTS, Body())

    def body(out: Path) -> BuildRecord | None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        store.build(STEP, PARTS, body, refresh=True)
    store.verify(ref)


def test_threads_that_want_one_key_make_it_once(cache: Path) -> None:
    calls: list[int] = []

    def body(out: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        (out / "done").write_text("done", encoding="utf-8")

    found: list[tuple[Ref, bool]] = []
    threads = [
        threading.Thread(target=lambda: found.append(ArtifactStore().build(STEP, PARTS, body))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(cached for _, cached in found) == [False] + [True] * 7
    assert not list((cache / "locks").iterdir())


WORKER = """
import sys, time
from pathlib import Path
from flows.store.artifacts import ArtifactStore
from flows.store.step import Step
log, seconds = Path(sys.argv[1]), float(sys.argv[2])
def body(out):
    with log.open("a") as stream:
        stream.write("made\\n")
    (out / "half").write_text("half")
    time.sleep(seconds)
    (out / "result").write_text("whole")
step = Step("paint", 1, "medad.base.storage:sync_path", ("pydantic",))
ref, _ = ArtifactStore().build(step, step.key_parts({}), body)
print(ref.folder())
"""


def start(log: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(log), str(seconds)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_processes_that_want_one_key_make_it_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [start(log, 0.5) for _ in range(3)]
    folders = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert len(folders) == 1
    assert (Path(folders.pop()) / "result").read_text(encoding="utf-8") == "whole"
    assert log.read_text(encoding="utf-8") == "made\n"


def test_a_killed_holder_frees_its_lock_and_its_half_is_swept(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    killed = start(log, 600)
    wait_for("one holds the lock", log.exists)
    waiting = start(log, 0)
    time.sleep(0.3)
    assert waiting.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    folder = Path(waiting.communicate(timeout=60)[0].strip())
    assert (folder / "result").read_text(encoding="utf-8") == "whole"
    assert log.read_text(encoding="utf-8") == "made\nmade\n"
    assert not list((cache / "tmp").iterdir())


def test_what_killed_processes_left_is_swept_and_what_is_under_way_is_not(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    killed = start(log, 600)
    wait_for("one is at work", lambda: log.exists() and list((cache / "tmp").glob("*/half")))
    assert ArtifactStore().sweep() == 0
    assert list((cache / "tmp").iterdir())
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert ArtifactStore().sweep() == 1
    assert not list((cache / "tmp").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"name": "draw"},
        {"libraries": ("pydantic", "typer")},
        {"function": "medad.base.storage:file_digest"},
        {"files": ("medad/base/errors.py",)},
    ],
)
def test_a_key_depends_on_the_step(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.store.step.STEPS", {})
    assert content_key(PARTS) != content_key(replace(STEP, **change).key_parts({}))


def test_a_key_does_not_depend_on_the_order_of_its_parts() -> None:
    one, two = {"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}
    assert content_key(STEP.key_parts(one)) == content_key(STEP.key_parts(two))


def test_a_value_that_is_no_json_is_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        content_key(STEP.key_parts({"x": float("nan")}))
    with pytest.raises(TypeError):
        content_key(STEP.key_parts({"x": {1, 2}}))
