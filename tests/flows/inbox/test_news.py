"""Looks at an inbox: cheap while nothing happens, and patient with scans that are arriving."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from flows.inbox.config import InboxRequest, has_news
from flows.inbox.news import FULL_LOOK_S, MAX_SHARE, InboxNews
from medad.base.errors import InputError


@dataclass
class Ward:
    """An inbox with the package's model, and clocks that the test sets."""

    inbox: Path
    out: Path
    now: float = 0.0
    cpu_s: float = 0.0
    step_cpu_s: float = 0.0
    """CPU time that the clock of the CPU moves on at each question."""

    def __post_init__(self) -> None:
        self.news = InboxNews("ward", lambda: self.now, self._cost)

    def _cost(self) -> float:
        self.cpu_s += self.step_cpu_s
        return self.cpu_s

    def look(self, after_s: float = 60.0) -> set[str]:
        """Look after a time, and return the cases that need a run."""
        self.now += after_s
        return {arrival.scan.parent.name for arrival in self.news.look()}

    def drop(self, case: str, content: str = "a scan") -> Path:
        scan = self.inbox / case / "scan.nii.gz"
        scan.parent.mkdir(exist_ok=True)
        scan.write_text(content, encoding="utf-8")
        return scan


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ward:
    monkeypatch.setenv("ADFLOWS_CONFIGS", str(tmp_path / "configs"))
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    values = {
        "name": "ward",
        "inbox": str(tmp_path / "inbox"),
        "out": str(tmp_path / "out"),
        "scans": "*/scan.nii.gz",
        "unchanged_s": 30,
    }
    config = tmp_path / "configs" / "inbox" / "ward.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "inbox").mkdir()
    return Ward(tmp_path / "inbox", tmp_path / "out")


def test_an_idle_inbox_is_hardly_ever_read(ward: Ward) -> None:
    assert [ward.look() for _ in range(24 * 60)] == [set()] * 24 * 60
    assert ward.news.readings <= 24 * 3600 / FULL_LOOK_S + 2


def test_a_large_inbox_is_read_less_often(ward: Ward) -> None:
    ward.step_cpu_s = 10.0
    for _ in range(24 * 60):
        ward.look()
    assert ward.news.readings * ward.step_cpu_s <= 24 * 3600 * MAX_SHARE + 3 * ward.step_cpu_s


def test_a_scan_is_news_once_it_is_complete(ward: Ward) -> None:
    ward.look()
    scan = ward.drop("one")
    assert ward.look() == set()
    assert ward.news.next_look_s(60.0) == 30.0
    scan.write_text("a longer scan", encoding="utf-8")
    assert ward.look(30.0) == set(), "it has grown"
    assert ward.look(29.0) == set()
    assert ward.news.next_look_s(60.0) == 1.0
    assert ward.look(1.0) == {"one"}
    readings = ward.news.readings
    assert ward.look() == {"one"}
    assert ward.news.next_look_s(60.0) == 60.0
    ward.look()
    assert ward.news.readings <= readings + 1, "what is known is not read again"
    shutil.rmtree(scan.parent)
    assert ward.look() == set()


def test_a_scan_that_is_overwritten_in_place_is_found_by_the_next_reading(ward: Ward) -> None:
    scan = ward.drop("one")
    for _ in range(3):
        found = ward.look()
    assert found == {"one"}
    [before] = ward.news.look()
    scan.write_text("another scan", encoding="utf-8")
    ward.look(FULL_LOOK_S)
    assert ward.look(30.0) == {"one"}
    [after] = ward.news.look()
    assert before != after


@pytest.mark.parametrize("below", ["out", "out/failed"])
def test_a_removed_result_is_noticed(ward: Ward, below: str) -> None:
    folder = ward.out.parent / below
    folder.mkdir(parents=True)
    record = folder / "case.json"
    record.touch()
    for _ in range(3):
        ward.look()
    readings = ward.news.readings
    record.unlink()
    os.utime(folder)
    ward.look()
    assert ward.news.readings == readings + 1


def test_a_missing_folder_is_said_and_comes_back(ward: Ward) -> None:
    ward.inbox.rmdir()
    for _ in range(3):
        with pytest.raises(InputError, match="no such folder"):
            ward.look()
    ward.inbox.mkdir()
    ward.drop("one")
    assert [ward.look() for _ in range(2)] == [set(), {"one"}]


def test_the_command_and_the_watcher_agree(ward: Ward) -> None:
    request = InboxRequest(config="ward")
    assert not has_news(request)
    ward.drop("one")
    assert has_news(request)
    ward.look()
    assert ward.look() == {"one"}
