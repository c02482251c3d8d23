"""Fetch one file from the package index that pip is configured for, checked by its digest. No code of it is run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from medad.base.errors import UserError

PIP_SECONDS = 900


class FetchError(UserError):
    """A package that cannot be fetched: no pip, no reachable package index, or not the expected file."""


def cache_root() -> Path:
    """Return the folder of everything that this product caches.

    It is $ADFLOWS_CACHE, else $XDG_CACHE_HOME/adflows, else ~/.cache/adflows.
    """
    if explicit := os.environ.get("ADFLOWS_CACHE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "adflows").absolute()


@dataclass(frozen=True)
class Package:
    """A file of a package on the index.

    Attributes
    ----------
    name, version
        Name and version of the package.
    sha256
        Digest of the file, hexadecimal. pip refuses any other file.
    ending
        `.tar.gz` for a source distribution, `.whl` for a wheel.
    """

    name: str
    version: str
    sha256: str
    ending: str


def fetch_package(package: Package, work: Path, *, python: str = sys.executable) -> Path:
    """Download a package's file with pip into `work`, an existing folder, and return its path.

    The requirements file has a hash, so pip refuses any other file before its metadata step. For a source distribution
    that step needs setuptools. The environment's setuptools is tried first, because it is quick. Otherwise pip
    downloads setuptools.

    Raises
    ------
    FetchError
        pip is missing or fails. The message is the reason alone.
    """
    source = package.ending == ".tar.gz"
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    folder = work / "archive"
    command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--no-binary" if source else "--only-binary", package.name, "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    reason = ""
    for extra in (["--no-build-isolation"], []) if source else ([],):
        try:
            done = subprocess.run(
                [*command, *extra],
                capture_output=True,
                text=True,
                timeout=PIP_SECONDS,
                check=False,
                cwd=work,
                encoding="utf-8",
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            reason = f"pip took longer than {PIP_SECONDS} s"
            break
        except OSError as error:
            reason = f"{python}: {error.strerror}"
            break
        files = sorted(folder.glob(f"*{package.ending}")) if folder.is_dir() else []
        if done.returncode == 0 and len(files) == 1:
            return files[0]
        reason = _last_error(done.stderr) or f"pip ended with exit code {done.returncode}"
        if "No matching distribution" in done.stderr or "No module named pip" in done.stderr:
            break
    raise FetchError(reason)


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1][:300]
