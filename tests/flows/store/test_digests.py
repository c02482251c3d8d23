"""Remembered digests: unchanged files are not read again, and changed files never get an old digest."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from flows.store import digests
from flows.store.digests import DigestMemory, file_sha256


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files count as settled immediately, so that tests need not wait."""
    monkeypatch.setattr(digests, "MIN_UNCHANGED_S", -1.0)


class Counting:
    """A digest function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.__qualname__ = "counting"

    def __call__(self, path: Path) -> str:
        self.calls += 1
        return file_sha256(path)


def test_a_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "scan"
    file.write_bytes(b"abc" * 100_000)
    assert DigestMemory(tmp_path / "db").get(file) == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    file, compute = tmp_path / "scan", Counting()
    file.write_bytes(b"abc")
    answers = {DigestMemory(tmp_path / "db").get(file, compute) for _ in range(3)}
    assert (len(answers), compute.calls) == (1, 1)


@pytest.mark.usefixtures("settled")
def test_a_change_that_keeps_size_and_modification_time_is_seen(tmp_path: Path) -> None:
    file, memory = tmp_path / "scan", DigestMemory(tmp_path / "db")
    file.write_bytes(b"abc")
    before = file.stat()
    assert memory.get(file) == hashlib.sha256(b"abc").hexdigest()
    time.sleep(0.02)
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert memory.get(file) == hashlib.sha256(b"abd").hexdigest()


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    file, compute = tmp_path / "scan", Counting()
    file.write_bytes(b"abc")
    for _ in range(2):
        DigestMemory(tmp_path / "db").get(file, compute)
    assert compute.calls == 2


@pytest.mark.usefixtures("settled")
def test_a_change_of_any_listed_file_is_seen(tmp_path: Path) -> None:
    header, raw, compute = tmp_path / "scan.mhd", tmp_path / "scan.raw", Counting()
    header.write_bytes(b"header")
    raw.write_bytes(b"1")
    memory = DigestMemory(tmp_path / "db")
    memory.get(header, compute, [header, raw])
    memory.get(header, compute, [header, raw])
    assert compute.calls == 1
    raw.write_bytes(b"22")
    memory.get(header, compute, [header, raw])
    assert compute.calls == 2


@pytest.mark.usefixtures("settled")
def test_a_damaged_memory_is_no_error(tmp_path: Path) -> None:
    file, database = tmp_path / "scan", tmp_path / "db"
    file.write_bytes(b"abc")
    wanted = DigestMemory(database).get(file)
    database.write_bytes(b"this is no database" * 1000)
    assert DigestMemory(database).get(file) == wanted
    assert DigestMemory(database).get(file) == wanted


@pytest.mark.usefixtures("settled")
def test_the_memory_holds_no_path(tmp_path: Path) -> None:
    file = tmp_path / "MUSTERMANN_MAX.nii"
    file.write_bytes(b"abc")
    DigestMemory(tmp_path / "db").get(file)
    assert b"MUSTERMANN" not in (tmp_path / "db").read_bytes()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DigestMemory(tmp_path / "db").get(tmp_path / "nothing")


def test_what_was_watched_is_remembered_whatever_its_time_stamps_say(tmp_path: Path) -> None:
    """Time stamps are in the future if the clock of a share is ahead, or this machine's clock was set back."""
    file, compute = tmp_path / "scan", Counting()
    file.write_bytes(b"abc")
    os.utime(file, (time.time() + 1e6, time.time() + 1e6))
    memory = DigestMemory(tmp_path / "db")
    assert memory.recall(file, compute, [file]) is None
    wanted = memory.get(file, compute, watched=True)
    assert (memory.recall(file, compute, [file]), memory.get(file, compute), compute.calls) == (wanted, wanted, 1)
    file.write_bytes(b"abd")
    assert memory.recall(file, compute, [file]) is None
