"""Another user's cache: every command that opens it says so in one line, with exit code 2."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.store.access import require_cache
from medad.base.errors import ConfigError
from tests.prose import ROOT

NOBODY = 65534
WITHOUT_PRIVILEGE = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)
"""Command that takes root's right to ignore the modes of files."""
COMMANDS = {
    "liver prepare": ("liver", "prepare", "demo"),
    "liver prepare --dry-run": ("liver", "prepare", "demo", "--dry-run"),
    "liver step": ("liver", "step", "window", "scan.nii.gz", "-o", "out.nii.gz"),
    "zsad score": ("zsad", "score", "photos", "-o", "out", "--set", "encoder.model=embedded"),
    "cache ls": ("cache", "ls"),
    "cache verify": ("cache", "verify"),
    "cache prune": ("cache", "prune", "--older-than", "1d"),
    "samples": ("samples",),
    "models ls": ("models", "ls"),
}
READS_ONLY = {"liver prepare --dry-run", "cache ls", "cache verify", "models ls"}


def run_as_other(cache: Path, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user who cannot ignore the modes of files."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "ADFLOWS_CACHE": str(cache),
        "ADFLOWS_LOCAL": "1",
        "ADFLOWS_PRIVATE": str(home / "private"),
        "PIP_NO_INDEX": "1",
    }
    start = WITHOUT_PRIVILEGE if os.geteuid() == 0 else ()
    return subprocess.run(
        [*start, sys.executable, "-m", "flows", *words],
        env=environment, cwd=home, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Return another user's cache; this user's, unless the tests run as root."""
    folder = tmp_path / "cache"
    (folder / "prepare").mkdir(parents=True)
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to be an ordinary user")
        os.chown(folder, NOBODY, NOBODY)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_foreign_cache_is_one_line(foreign: Path, tmp_path: Path, command: str, mode: int) -> None:
    foreign.chmod(mode)
    try:
        ran = run_as_other(foreign, tmp_path, *COMMANDS[command])
    finally:
        foreign.chmod(0o755)
    if mode == 0o555 and command in READS_ONLY:
        assert "Traceback" not in ran.stderr
        assert "cannot be written" not in ran.stderr
        return
    assert ran.returncode == 2, ran.stderr
    line = ran.stderr.strip().splitlines()[-1]
    user = pwd.getpwuid(foreign.stat().st_uid).pw_name
    what = "written" if mode == 0o555 else "read"
    advice = "set ADFLOWS_CACHE to a folder of your own"
    assert line == f"adflows: {foreign}: this folder of user {user} cannot be {what}; {advice}"
    assert "Traceback" not in ran.stderr


def test_a_closed_folder_in_a_shared_cache_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "prepare").mkdir(parents=True)
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: allowed(path, mode) and not (Path(path).name == "prepare" and mode & os.W_OK)
    )
    with pytest.raises(ConfigError, match=r"prepare: this folder of user .* cannot be written"):
        require_cache()
    require_cache(writable=False)


def test_a_file_in_the_place_of_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="cannot be used as the cache"):
        require_cache()
