"""Steps that read files of others: a crash, a hang or a memory blow-up is one case's failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.devices import child
from flows.runs.runner import LocalRunner
from tests.flows.fake_steps import hard_reading


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(child, "reads_apart", True)
    yield
    for workers in child._idle.values():
        for worker in workers:
            worker.end()
    child._idle.clear()


def process_of(runner: LocalRunner, scan: Path) -> int:
    ref = runner.run("good", hard_reading(scan, ""))
    assert ref is not None
    return int((ref.folder() / "process").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("cache")
def test_a_crash_of_native_code_fails_one_case_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child, "READING_HOURS", 2 / 3600)
    runner = LocalRunner()
    rules = {
        "abort": "the program that read it crashed (SIGABRT); is the file damaged?",
        "hang": "reading it took longer than 0.0333333 minutes",
        "killed": "reading it needs more memory than this machine has",
        "memory": "reading it needs more memory than this machine has",
    }
    processes = set()
    for act, rule in rules.items():
        scan = tmp_path / f"{act}.bin"
        scan.write_bytes(act.encode())
        assert runner.run(act, hard_reading(scan, act)) is None
        failure = runner.failures[-1]
        assert (failure.case_id, failure.rule, failure.path) == (act, rule, str(scan))
        assert failure.bug is None
        good = tmp_path / f"good after {act}.bin"
        good.write_bytes(b"good" + act.encode())
        processes.add(process_of(runner, good))
    assert os.getpid() not in processes
    assert len(runner.failures) == len(rules)
    assert "terminate called" not in capfd.readouterr().err, "what native code says may quote a header"


@pytest.mark.usefixtures("cache")
def test_one_process_reads_many_files(tmp_path: Path) -> None:
    runner = LocalRunner()
    processes = set()
    for number in range(3):
        scan = tmp_path / f"{number}.bin"
        scan.write_bytes(str(number).encode())
        processes.add(process_of(runner, scan))
    assert len(processes) == 1
    assert os.getpid() not in processes
