"""The register of pseudonyms: equal for equal content, private, and intact after any kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.privacy import case_ids
from flows.privacy.case_ids import RegisteredCase, forget, identify, register, register_found, registered, resolve
from medad.base.errors import ConfigError, InputError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty folder for the register."""
    folder = tmp_path / "private"
    monkeypatch.setenv("ADFLOWS_PRIVATE", str(folder))
    return folder


def scan_of(tmp_path: Path, name: str = "MUSTERMANN_Erika.nii.gz", content: bytes = b"scan") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_one_content_has_one_id_whatever_it_is_called(tmp_path: Path) -> None:
    first = register(scan_of(tmp_path))
    assert re.fullmatch(case_ids.ID_PATTERN, first.id)
    again = register(scan_of(tmp_path, "elsewhere/other.nii.gz"))
    other = register(scan_of(tmp_path, content=b"another"))
    assert again.id == first.id
    assert other.id != first.id
    assert identify([again.scan, other.scan]) == [again.id, other.id]
    assert resolve(first.id) == again, "the last given path is used"


def test_an_id_cannot_be_computed_without_the_secret(
    tmp_path: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id cannot be computed from the name or a copy of the scan. Another machine gives another id."""
    scan = scan_of(tmp_path)
    case = register(scan)
    known = [scan.name, str(scan), "MUSTERMANN", scan.read_bytes().decode()]
    digests = [hashlib.new(kind, text.encode()).hexdigest() for kind in ("md5", "sha1", "sha256") for text in known]
    assert not any(case.id.removeprefix("ct-") in digest for digest in digests)
    assert "MUSTERMANN" not in case.id
    monkeypatch.setenv("ADFLOWS_PRIVATE", str(private.with_name("other machine")))
    assert register(scan).id != case.id


def test_only_the_owner_can_read_it_whatever_the_umask(tmp_path: Path, private: Path) -> None:
    before = os.umask(0)
    try:
        register(scan_of(tmp_path))
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in private.iterdir()} == dict.fromkeys(
        ("case-ids.json", "case-ids.key", "case-ids.lock"), 0o600
    )


@pytest.mark.parametrize("name", ["", "case-ids.json", "case-ids.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_register_that_others_can_read_is_refused_in_one_line(
    tmp_path: Path, private: Path, name: str, mode: int
) -> None:
    scan = scan_of(tmp_path)
    case = register(scan)
    (private / name).chmod(mode | (0o100 if not name else 0))
    with pytest.raises(ConfigError, match="chmod") as refused:
        resolve(case.id)
    assert str(refused.value).startswith(f"{private / name}: ")
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="chmod"):
        register(scan)


def test_a_register_of_someone_elses_is_refused(tmp_path: Path, private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = register(scan_of(tmp_path))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match="another user"):
        resolve(case.id)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path, private: Path) -> None:
    case = register(scan_of(tmp_path))
    moved = (private / "case-ids.json").rename(tmp_path / "elsewhere.json")
    (private / "case-ids.json").symlink_to(moved)
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(case.id)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": "adflows case ids 1", "cases": {"ct-1": {}}}'])
def test_a_damaged_register_is_refused_and_left_as_it_is(tmp_path: Path, private: Path, damage: str) -> None:
    scan = scan_of(tmp_path)
    case = register(scan)
    (private / "case-ids.json").write_text(damage, encoding="utf-8")
    for call in (lambda: resolve(case.id), lambda: register(scan), lambda: forget(case.id)):
        with pytest.raises(ConfigError, match="restore it from a backup"):
            call()
    assert (private / "case-ids.json").read_text(encoding="utf-8") == damage


def test_a_lost_key_is_not_replaced_in_silence(tmp_path: Path, private: Path) -> None:
    """With a new key, every scan would get a second id."""
    scan = scan_of(tmp_path)
    register(scan)
    (private / "case-ids.key").unlink()
    with pytest.raises(ConfigError, match="missing, but the ids"):
        register(scan)


def test_unknown_ids_and_what_is_none(tmp_path: Path) -> None:
    register(scan_of(tmp_path))
    with pytest.raises(ConfigError, match="ct-000000000000: this machine's register has no such case"):
        resolve("ct-000000000000")
    for wrong in ("/data/MUSTERMANN/scan.nii.gz", "MUSTERMANN", "", "x", "ct-1/../2"):
        with pytest.raises(ConfigError) as refused:
            resolve(wrong)
        assert "MUSTERMANN" not in str(refused.value), "a path entered in a form must not be stored in a message"
        assert "not a case id" in str(refused.value)


def test_another_scan_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    scan = scan_of(tmp_path)
    case = register(scan)
    scan.write_bytes(b"another patient")
    with pytest.raises(ConfigError, match=f"{case.id}: the scan at its path has changed") as refused:
        resolve(case.id)
    assert str(tmp_path) not in str(refused.value)
    scan.unlink()
    with pytest.raises(ConfigError, match=f"{case.id}: its scan can no longer be read") as refused:
        resolve(case.id)
    assert str(tmp_path) not in str(refused.value)


def test_masks_stay_until_another_is_given(tmp_path: Path) -> None:
    scan, mask = scan_of(tmp_path), scan_of(tmp_path, "mask.nii.gz", b"mask")
    case = register(scan, mask, (1, 2))
    assert (case.liver, case.liver_labels) == (mask, (1, 2))
    assert register(scan) == case
    found = RegisteredCase(case.id, scan, scan_of(tmp_path, "label.nii.gz", b"label"), (6,))
    register_found([found])
    assert resolve(case.id) == case, "a mask that a flow finds does not replace one that a user chose"
    other = scan_of(tmp_path, "other.nii.gz", b"other mask")
    assert register(scan, other).liver == other
    with pytest.raises(InputError, match="no such file"):
        register(scan, tmp_path / "nowhere.nii.gz")


def test_names_on_disk_need_be_no_text(tmp_path: Path) -> None:
    scan = scan_of(tmp_path, os.fsdecode(b"M\xfcstermann.nii.gz"))
    case = register(scan)
    assert resolve(case.id).scan == scan


def test_found_cases_are_registered_at_once_and_unreadable_ones_left_out(tmp_path: Path, private: Path) -> None:
    scans = [scan_of(tmp_path, f"{n}.nii.gz", str(n).encode()) for n in range(50)]
    absent = tmp_path / "absent.nii.gz"
    ids = identify([*scans, absent])
    assert len(set(ids)) == 51
    cases = [RegisteredCase(case_id, scan, None, (1,)) for case_id, scan in zip(ids, [*scans, absent], strict=True)]
    register_found(cases)
    assert [case.id for case in registered()] == sorted(ids[:-1])
    written = (private / "case-ids.json").stat()
    register_found(cases)
    assert (private / "case-ids.json").stat() == written, "a nightly run that finds nothing new writes nothing"


def test_processes_register_beside_each_other_and_lose_nothing(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from flows.privacy.case_ids import register
folder, start = Path(sys.argv[1]), int(sys.argv[2])
for n in range(start, start + 10):
    scan = folder / f"{n}.nii.gz"
    scan.write_bytes(str(n).encode())
    register(scan)
"""
    root = Path(__file__).parents[3]
    under_way = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(start)], cwd=root) for start in (0, 10, 20)
    ]
    assert [process.wait(timeout=120) for process in under_way] == [0, 0, 0]
    assert len(registered()) == 30


def test_a_killed_writer_leaves_the_register_whole_and_unlocked(tmp_path: Path, private: Path) -> None:
    program = """
import sys
from pathlib import Path
from flows.privacy.case_ids import register
scan = Path(sys.argv[1]) / "scan.nii.gz"
n = 0
while True:
    n += 1
    scan.write_bytes(str(n).encode())
    register(scan)
    print(n, flush=True)
"""
    root = Path(__file__).parents[3]
    for _ in range(3):
        before = len(registered())
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=root)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(registered()) >= max(before, 3)
    (private / ".tmp-0123456789ab-case-ids.json").write_text("half", encoding="utf-8")
    began = time.monotonic()
    register(scan_of(tmp_path, "last.nii.gz", b"last"))
    assert time.monotonic() - began < 10
    assert sorted(path.name for path in private.iterdir()) == ["case-ids.json", "case-ids.key", "case-ids.lock"]


def test_the_commands(tmp_path: Path, cli: Callable[..., Any], private: Path) -> None:
    scan, mask = scan_of(tmp_path), scan_of(tmp_path, "Maske_MUSTERMANN.nii.gz", b"mask")
    added = cli("ids", "add", scan, "--liver", mask, "--liver-label", 1, "--liver-label", 2)
    case_id = added.out.strip()
    assert added.code == 0
    assert re.fullmatch(case_ids.ID_PATTERN, case_id)
    assert f"{case_id} is {scan}" in added.err
    assert json.loads(cli("ids", "add", scan, "--json").out) == {"ids": [case_id]}
    listed = cli("ids", "ls")
    assert case_id in listed.out
    assert "MUSTERMANN" not in listed.out + cli("ids", "ls", "--json").out
    assert str(scan) in cli("ids", "ls", "--paths").out
    [row] = json.loads(cli("ids", "ls", "--paths", "--json").out)
    assert row == {
        "id": case_id, "scan_there": True, "liver_there": True, "scan": str(scan), "liver": str(mask),
        "liver_labels": [1, 2],
    }  # fmt: skip
    mask.unlink()
    assert "mask missing" in cli("ids", "ls").out
    assert str(scan) in cli("ids", "which", case_id).out
    assert cli("ids", "rm", case_id).code == 0
    assert registered() == []
    assert scan.is_file()
    for arguments in (
        ("rm", case_id),
        ("which", case_id),
        ("add", tmp_path / "no"),
        ("add", scan, scan, "--liver", scan),
    ):
        ran = cli("ids", *arguments)
        assert ran.code == 2
        assert len(ran.err.strip().splitlines()) == 1
    private.chmod(0o755)
    ran = cli("ids", "ls")
    assert ran.code == 2
    assert ran.err == (
        f"adflows: {private}: other users can read it (mode 755), but it has names of patients: chmod 700 it\n"
    )
