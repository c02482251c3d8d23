"""The doctor finds what would stop a run, and says what to do."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from flows import doctor


def test_a_cache_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "file" / "cache"))
    check = doctor.check_cache()
    assert check.status == "fail"
    assert "ADFLOWS_CACHE" in check.advice


@pytest.mark.usefixtures("cache")
def test_a_cache_that_can_be_written_is_well() -> None:
    assert doctor.check_cache().status == "ok"


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

    root = Path(__file__).parents[2]
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
    """As with a torchvision of another build than torch's."""
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
    assert (tmp_path / "hub").exists() == bool(models), "looking makes nothing"
