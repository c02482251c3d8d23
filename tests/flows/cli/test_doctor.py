"""The doctor: it finds problems that would stop a run, and says what to do."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import doctor
from flows.privacy import case_ids


def test_a_cache_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "file" / "cache"))
    check = doctor.check_cache()
    assert check.status == "fail"
    assert "ADFLOWS_CACHE" in check.advice


@pytest.mark.usefixtures("cache")
def test_a_cache_that_can_be_written_is_well() -> None:
    assert doctor.check_cache().status == "ok"


def test_the_disk_of_the_runs_is_that_of_the_environment(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def run_checks(runs: Path) -> list[doctor.Check]:
        asked.append(runs)
        return [doctor.check_python()]

    monkeypatch.setattr("flows.cli.doctor.run_checks", run_checks)
    monkeypatch.setenv("ADFLOWS_RUNS", str(tmp_path / "runs"))
    cli("doctor")
    cli("doctor", "--out", tmp_path / "others")
    assert asked == [tmp_path / "runs", tmp_path / "others"]


@pytest.mark.parametrize(("free_gb", "status"), [(1, "fail"), (10, "warn"), (100, "ok")])
def test_little_room_is_told(free_gb: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free_gb * 1_000_000_000))
    checks = doctor.check_disk(tmp_path / "runs" / "not" / "there" / "yet")
    assert {check.status for check in checks} == {status}
    assert all(check.advice for check in checks if status != "ok")


@pytest.mark.parametrize(
    ("versions", "bad"),
    [
        ({"prefect": "3.8.8", "fastapi": "0.150.0", "sqlalchemy": "2.0.58"}, set()),
        ({"prefect": "3.9.1", "fastapi": "0.150.0", "sqlalchemy": "2.0.58"}, {"prefect"}),
        ({"prefect": "3.8.8", "fastapi": "0.151.0", "sqlalchemy": "2.1.0"}, {"fastapi", "sqlalchemy"}),
        ({"prefect": "3.8.8", "fastapi": "0.138.2", "sqlalchemy": "2.0.58"}, {"fastapi"}),
        ({"fastapi": "0.139.0", "sqlalchemy": "2.0.0"}, {"prefect"}),
    ],
)
def test_versions_that_break_the_server_are_failures(
    versions: dict[str, str], bad: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = doctor.check_pins()
    assert {check.name for check in checks if check.status == "fail"} == bad
    assert all("pip install" in check.advice for check in checks if check.status == "fail")


def test_the_pins_are_those_of_the_distribution() -> None:
    import tomllib

    root = Path(__file__).parents[3]
    wanted = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    constraints = (root / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    for name, (lowest, too_new, _) in doctor.PINS.items():
        [requirement] = [text for text in wanted if text.startswith(name)]
        assert ".".join(map(str, lowest)) in requirement
        assert "==" in requirement or ".".join(map(str, too_new)) in requirement
        [pinned] = [line.partition("==")[2] for line in constraints if line.startswith(f"{name}==")]
        assert lowest <= doctor._version(pinned) < too_new


def test_a_torch_that_does_not_import_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is missing')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_torch()
    assert check.status == "fail"
    assert "libcudart" in check.found
    assert check.advice


@pytest.mark.parametrize(("gigabytes", "status"), [(2, "fail"), (6, "warn"), (32, "ok"), (None, "warn")])
def test_little_memory_is_told(gigabytes: int | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = None if gigabytes is None else gigabytes * 1_000_000_000
    monkeypatch.setattr(doctor, "memory_bytes", lambda: memory)
    check = doctor.check_memory()
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


def test_an_open_clip_that_does_not_import_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the result for an import error, as when torch and torchvision are of different builds."""
    (tmp_path / "open_clip.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_open_clip()
    assert check.status == "fail"
    assert "torchvision::nms" in check.found
    assert "torchvision" in check.advice


@pytest.mark.parametrize(
    ("models", "offline", "status"), [(0, "", "ok"), (2, "", "ok"), (0, "1", "warn"), (1, "1", "ok")]
)
def test_the_local_cache_of_weights_is_looked_at(
    models: int, offline: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    for number in range(models):
        (tmp_path / "hub" / f"models--timm--vit-{number}").mkdir(parents=True)
    check = doctor.check_hub()
    assert check.status == status
    assert f"{models} models in {tmp_path / 'hub'}" in check.found
    assert ("offline" in check.found) == bool(offline)
    assert bool(check.advice) == (status != "ok")
    assert (tmp_path / "hub").exists() == bool(models), "the check creates no folder"


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "private"
    monkeypatch.setenv("ADFLOWS_PRIVATE", str(folder))
    return folder


@pytest.mark.usefixtures("cache")
def test_a_register_of_case_ids_is_counted_and_none_is_made(tmp_path: Path, private: Path) -> None:
    check = doctor.check_register()
    assert (check.status, check.found.partition(";")[0]) == ("ok", "none yet")
    assert not private.exists(), "the check creates no register"
    private.mkdir(mode=0o700)
    assert doctor.check_register().status == "ok"
    assert not list(private.iterdir())
    for number in range(2):
        scan = tmp_path / f"MUSTERMANN-{number}.nii.gz"
        scan.write_bytes(b"scan %d" % number)
        case_ids.register(scan)
    check = doctor.check_register()
    assert (check.status, check.found.partition(" ")[0]) == ("ok", "2")
    assert "MUSTERMANN" not in check.found + check.advice, "the output may be mailed"


def others_may_read(private: Path) -> None:
    (private / "case-ids.json").chmod(0o644)


def others_may_enter(private: Path) -> None:
    private.chmod(0o755)


def cut_short(private: Path) -> None:
    register = private / "case-ids.json"
    register.write_bytes(register.read_bytes()[:-9])


def lose_the_key(private: Path) -> None:
    (private / "case-ids.key").unlink()


def spoil_the_key(private: Path) -> None:
    (private / "case-ids.key").write_text("0123", encoding="ascii")


def a_link(private: Path) -> None:
    moved = (private / "case-ids.json").rename(private / "moved.json")
    (private / "case-ids.json").symlink_to(moved)


def a_file(private: Path) -> None:
    shutil.rmtree(private)
    private.touch(mode=0o600)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "spoil", [others_may_read, others_may_enter, cut_short, lose_the_key, spoil_the_key, a_link, a_file]
)
def test_a_register_that_would_stop_a_run_is_a_failure_and_stays_as_it_is(
    spoil: Callable[[Path], None], tmp_path: Path, private: Path
) -> None:
    scan = tmp_path / "MUSTERMANN.nii.gz"
    scan.write_bytes(b"scan")
    case_ids.register(scan)
    spoil(private)
    before = {path: (path.read_bytes(), path.lstat().st_mode) for path in private.rglob("*")}
    check = doctor.check_register()
    assert check.status == "fail"
    assert check.found.startswith(str(private))
    assert check.advice
    assert "MUSTERMANN" not in check.found + check.advice
    assert {path: (path.read_bytes(), path.lstat().st_mode) for path in private.rglob("*")} == before
