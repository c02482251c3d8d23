"""The table of manual steps and the functions that it names."""

from __future__ import annotations

import inspect
import subprocess
import sys

from medad.config.manual_steps import MANUAL_STEPS
from medad.steps import by_hand


def test_the_table_has_every_step_and_no_other() -> None:
    functions = [name for name, _ in inspect.getmembers(by_hand, inspect.isfunction) if name.startswith("step_")]
    assert sorted(functions) == sorted(f"step_{name}" for name in MANUAL_STEPS)


def test_the_command_line_reads_the_table_without_a_heavy_import() -> None:
    probe = "import sys; import medad.config.manual_steps; print({'numpy', 'torch', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.strip() == "set()"
