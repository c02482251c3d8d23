"""The register of systems: names, modules, and settings that load no torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from zsad.config.systems import METHODS
from zsad.scorers.winclip.settings import WinClip

ROOT = Path(__file__).parents[3]
FOLDERS = {path.parent.name for path in (ROOT / "zsad/scorers").glob("*/settings.py")}


def test_the_register_has_every_folder_with_settings() -> None:
    assert {kind.__module__ for kind in METHODS.values()} == {f"zsad.scorers.{name}.settings" for name in FOLDERS}


@pytest.mark.parametrize("name", METHODS)
def test_a_name_in_the_register_is_that_of_the_settings(name: str) -> None:
    assert METHODS[name]().system == name


@pytest.mark.parametrize("name", METHODS)
def test_the_module_beside_the_settings_scores(name: str) -> None:
    module, _, function = METHODS[name]().scorer.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_normal_images_are_needed_where_shots_are_set() -> None:
    assert {name for name, kind in METHODS.items() if kind().shot_count} == {"anomalydino"}
    assert {name for name, kind in METHODS.items() if kind().accepts_shots} == {
        "winclip",
        "anomalydino",
        "april_gan",
        "dual",
        "musc",
        "musc_2",
    }
    assert WinClip(shots=4).shot_count == 4


def test_settings_load_no_torch() -> None:
    script = "import sys, zsad.config.systems; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert ran.stdout.strip() == "False"
