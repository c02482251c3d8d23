"""The inbox with processes that are killed or run in parallel while scans arrive."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.inbox.arrivals import Content
from flows.store.digests import file_sha256
from tests.flows.inbox_box import Box, read
from tests.flows.inbox_driver import PLACES
from tests.flows.live_server import HANGS_S, wait_for

pytestmark = pytest.mark.slow

SCANS, BROKEN = 50, 4
ROOT = Path(__file__).parents[3]


@pytest.fixture
def box(
    tmp_path: Path,
    new_world: Callable[..., Any],
    cli: Callable[..., Any],
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Box:
    """Create a trained model and many phantoms."""
    from medad.cohort.phantom import write_lits_phantoms

    world = new_world(tmp_path, train=1, test=0)
    monkeypatch.setenv("ADFLOWS_CACHE", str(world.cache))
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    assert cli("liver", "train", world.config, "--out", world.runs).code == 0
    write_lits_phantoms(world.lits, SCANS, seed=3, shape=(48, 40, 10), spacing_mm=(7.0, 7.0, 12.0))
    return Box(tmp_path / "box", world.lits, world.runs / "liver" / "tiny", cli)


class Process:
    """A process of the inbox command. All processes log what they make to one file."""

    def __init__(self, box: Box, *options: object, die_at: str = "") -> None:
        command = ["liver", "inbox", str(box.config), "--json", *map(str, options)]
        dying = ["--die", die_at] if die_at else []
        self.out, self.err = (box.root / f"{uuid.uuid4().hex}.{name}" for name in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:  # files instead of pipes, which could fill up
            self.running = subprocess.Popen(
                [sys.executable, "-m", "tests.flows.inbox_driver", str(box.root / "made.log"), *dying, *command],
                cwd=ROOT,
                stdout=out,
                stderr=err,
            )

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        self.running.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        code = self.running.wait(timeout=HANGS_S)
        return code, self.out.read_text(encoding="utf-8"), self.err.read_text(encoding="utf-8")

    def until(self, what: str, true: Callable[[], bool]) -> None:
        """Wait until the condition is true. Fails if the process ends before that."""

        def seen() -> bool:
            assert self.running.poll() is None, self.wait()[2]
            return true()

        wait_for(what, seen, 900, 0.02)


def made(box: Box) -> Counter[str]:
    """Count how often each artifact was made and each failure recorded, by all processes."""
    return Counter((box.root / "made.log").read_text(encoding="utf-8").splitlines())


def drop_all(box: Box, rng: random.Random) -> set[str]:
    """Write the scans one by one, in pieces, some of them broken. Returns their contents."""
    contents = set()
    for number in range(SCANS):
        name, scan, liver = f"P{number}", f"volume-{number}.nii.gz", f"segmentation-{number}.nii.gz"
        data = (box.phantoms / scan).read_bytes()
        if number % (SCANS // BROKEN) == 5:
            data = data[: len(data) // 2]
        folder = box.inbox / name
        folder.mkdir()
        partial = rng.random() < 0.3
        target = folder / ("scan.nii.gz.partial" if partial else "scan.nii.gz")
        for start in range(0, len(data), len(data) // 3 + 1):
            with target.open("ab") as file:
                file.write(data[start : start + len(data) // 3 + 1])
            time.sleep(rng.uniform(0, 0.15))
        (folder / "liver.nii.gz").write_bytes((box.phantoms / liver).read_bytes())
        if partial:
            target.rename(folder / "scan.nii.gz")
        digests = (file_sha256(folder / "scan.nii.gz"), file_sha256(folder / "liver.nii.gz"))
        contents.add(Content(*digests, (1, 2)).digest)
    return contents


def nothing_is_left(box: Box, cache: Path) -> None:
    """Check that no lock is held and no incomplete artifact or folder is left."""
    assert not list((box.out / ".inbox" / "locks").iterdir())
    assert not list((cache / "tmp").iterdir())
    assert not [path for path in box.out.glob(".*") if path.name != ".inbox"]
    for lock in (cache / "locks").iterdir():
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.timeout(5400)
def test_fifty_scans_dropped_while_the_inbox_is_killed_three_times(box: Box) -> None:
    box.configure(unchanged_s=2.5)
    rng = random.Random(4)
    dropped: set[str] = set()
    dropping = threading.Thread(target=lambda: dropped.update(drop_all(box, rng)))
    dropping.start()

    def ended() -> int:
        return len(box.results()) + len(box.failures())

    for results in (1, 14, 30):
        process = Process(box, "--watch", 1)
        process.until(f"{results} scans are done", lambda results=results: ended() >= results)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 1.5))
        assert process.end(signal.SIGKILL)[0] == -signal.SIGKILL
    process = Process(box, "--watch", 1)
    dropping.join()
    process.until("all scans are done", lambda: ended() == SCANS)
    time.sleep(3)  # at least one more check of the inbox
    code, _, err = process.end(signal.SIGINT)
    assert code in {0, 2}, err
    assert "Traceback" not in err

    assert (len(box.results()), len(box.failures())) == (SCANS - BROKEN, BROKEN)
    manifests = [read(box.out / case_id / "manifest.json") for case_id in box.results()]
    found = {manifest["inbox"]["content"] for manifest in manifests}
    found |= {record["content"] for record in box.failures().values()}
    assert found == dropped, "no scan is lost, mistaken for another, or read in part"
    assert (box.overview()["done"], box.overview()["failed"]) == (SCANS - BROKEN, BROKEN)

    count = made(box)
    assert set(count.values()) == {1}, "nothing was made twice, and no failure was tried again"
    cache = Path(os.environ["ADFLOWS_CACHE"])
    for step in ("prepare", "segment", "report"):
        kept = [path for path in (cache / step).iterdir() if len(path.name) == 64]
        of_training = {"prepare": 1, "segment": 0, "report": 1}[step]
        assert len(kept) == SCANS - BROKEN + of_training
    ran = box.run()
    assert (ran.code, ran.answer["segmented"], ran.answer["computed"], ran.answer["cached"]) == (0, [], 0, 0)
    nothing_is_left(box, cache)


@pytest.mark.timeout(2400)
def test_two_passes_at_once_make_everything_once(box: Box) -> None:
    scans = 12
    for number in range(scans):
        box.drop(f"P{number}", number)
    box.drop_broken("Q", 0)
    both = [Process(box), Process(box)]
    answers = []
    for process in both:
        code, out, err = process.wait()
        assert code in {0, 2}, err
        answers.append(json.loads(out))
    assert set(made(box).values()) == {1}
    segmented = [case_id for answer in answers for case_id in answer["segmented"]]
    assert sorted(segmented) == box.results()
    assert len(segmented) == scans
    assert len(box.failures()) == 1
    assert sum(len(answer["failures"]) for answer in answers) == 1
    ran = box.run()
    assert (ran.answer["segmented"], ran.answer["computed"]) == ([], 0)
    nothing_is_left(box, Path(os.environ["ADFLOWS_CACHE"]))


@pytest.mark.timeout(2400)
def test_a_pass_killed_anywhere_is_made_good(box: Box) -> None:
    """Kill a pass in each step, before and after publishing, before the overview, and before a failure record."""
    cache = Path(os.environ["ADFLOWS_CACHE"])
    for number, place in enumerate(PLACES):
        broken = place == "fail"
        (box.drop_broken if broken else box.drop)(place, number)
        before = len(box.results()), len(box.failures())
        code, _, err = Process(box, die_at=place).wait()
        assert code == -signal.SIGKILL, err
        ran = box.run()
        assert ran.code == (2 if broken else 0), ran.err
        assert (len(box.results()), len(box.failures())) == (before[0] + (not broken), before[1] + broken)
        assert (box.overview()["done"], box.overview()["failed"]) == (len(box.results()), len(box.failures()))
        nothing_is_left(box, cache)
        # results that the killed pass had published are found, and the rest is made; the networks are cached already
        left = {"prepare": 3, "segment": 2, "report": 1}.get(place, 0)
        assert ran.answer["computed"] == left
    assert set(made(box).values()) == {1}
    assert box.run().answer["computed"] == 0


def test_a_case_without_dicom_results_is_done_and_the_overview_says_why(box: Box) -> None:
    box.configure(dicom=True)
    box.drop("a", 0)
    [case_id] = box.segmented()
    assert not (box.out / case_id / "dicom").exists()
    [row] = box.overview()["cases"]
    assert (row["status"], row["rule"]) == (
        "done",
        "no DICOM results, because the scan is not DICOM and has no study",
    )
    assert box.segmented() == []
