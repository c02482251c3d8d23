"""The register of systems: names, modules, and settings that load no torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from zsad.config.systems import METHODS
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.musc.settings import MuSc2
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


def test_scores_depend_on_other_images_only_where_images_are_compared_with_them() -> None:
    def compared(**values: int) -> set[str]:
        found = {name: kind(**(values if kind().accepts_shots else {})) for name, kind in METHODS.items()}
        return {name for name, system in found.items() if system.compares_images}

    assert compared() == {"musc", "musc_2", "dual"}
    assert compared(shots=2) == set(), "each image is compared with the normal ones"
    assert AprilGan(shots=2, stretch_map=True).compares_images, "its maps are stretched over all images"
    assert MuSc2(shots=2).reference_count == 0


def test_settings_load_no_torch() -> None:
    script = "import sys, zsad.config.systems; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert ran.stdout.strip() == "False"
