"""Runs the blocks of a page in a folder: the command line in this process, all else by a shell."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.docs.pages import Block, arguments, logical_lines
from tests.prose import ROOT

SHOWN_FOLDER = "/path/to/work"
"""The folder that pages show in the place of the one that a test works in."""
_NUMBER = re.compile(r"(?<![a-zA-Z])-?\d+(\.\d+)?(?![a-zA-Z])")
_KEY = re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{10,}\b|\b\d{10,}\b")

_LIVER = (
    "gpus=cpu",
    "preprocess.slice_px=64",
    "synthesis.blur_sigma_px=4.0",
    "synthesis.ellipse_px=3",
    "restoration.widths=[8,16,32]",
    "restoration.groups=4",
    "segmentation.widths=[8,16,32]",
    "segmentation.groups=4",
    "train.restoration.epochs=1",
    "train.segmentation.epochs=1",
)
_TRAINING = (*_LIVER, "train.restoration.steps=2", "train.segmentation.steps=2", "synthesis.solid.copies=4")
_SLICES = _LIVER[:2]
_STUDY = ("gpus=cpu", "edge_mm=2", "diameters_mm=[20, 40, 60]", "contrasts_hu=[[-80, -50], [30, 50]]")
SHORTER: dict[tuple[str, ...], tuple[str, ...]] = {
    ("liver", "run"): _TRAINING,
    ("liver", "train"): _TRAINING,
    ("liver", "prepare"): _TRAINING,
    ("liver", "ablate"): _LIVER,
    ("liver", "evaluate"): _SLICES,
    ("liver", "export-slices"): _SLICES,
    ("liver", "sensitivity"): _STUDY,
    ("zsad", "run"): ("gpus=cpu", "seeds=[0, 1]"),
    ("zsad", "score"): ("gpus=cpu",),
    ("zsad", "compare"): ("gpus=cpu", "seeds=[0, 1]"),
    ("zsad", "train"): ("gpus=cpu",),
}
"""Settings that are appended to a command, so that it takes seconds."""


class Failed(AssertionError):
    """A block that did not do what its page says."""


def shortened(words: Sequence[str]) -> list[str]:
    """Return the words of a command with its shorter settings appended."""
    extra = SHORTER.get(tuple(words[:2]), ())
    if words[:2] == ["zsad", "train"]:
        extra += ("seeds=[0]",)
    return [*words, *(word for pair in extra for word in ("--set", pair))]


@dataclass
class Runner:
    """A folder in which a page's blocks are run one after the other."""

    folder: Path
    load: Callable[[Path], Any]
    """Loads a configuration; raises for a bad one."""
    output: str = ""
    """Output of the last bash block."""
    python: list[str] = field(default_factory=list)
    """Python blocks so far, which share a process."""

    def run(self, block: Block) -> None:
        """Run a block by its language. Raises Failed."""
        if block.language == "bash":
            self.output = self._bash(block)
        elif block.language == "yaml":
            self._yaml(block)
        elif block.language == "python":
            self._python(block)
        elif block.language == "text":
            self._compare(block)
        else:
            raise Failed(f"{block.place}: a block of {block.language or 'no language'} cannot be run")

    def _bash(self, block: Block) -> str:
        lines = logical_lines(block.text)
        if all(re.match(r"(adflows|export \w+=\S+$)", line) for line in lines) and not re.search(
            r"\$\(|[|<>]|[^&]&&", block.text
        ):
            return "".join(self._line(block, line) for line in lines)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            capture_output=True, encoding="utf-8", check=False, cwd=self.folder,
            env=os.environ | {"PATH": f"{self._shim()}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"{block.place}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr

    def _line(self, block: Block, line: str) -> str:
        words = [os.path.expandvars(word) for word in arguments(line)]
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ[name] = value
            return ""
        code, out = run_in_process(shortened(words[1:]))
        expected = int(found[1]) if (found := re.search(r"# exit code (\d)", line)) else 0
        if code != expected:
            raise Failed(f"{block.place}: {line}: exit code {code}\n{out}")
        return out

    def _shim(self) -> Path:
        folder = self.folder.parent / "bin"
        folder.mkdir(exist_ok=True)
        for name, what in (("adflows", f"{sys.executable} -m tests.docs.shim"), ("python", sys.executable)):
            shim = folder / name
            shim.write_text(f'#!/bin/sh\nexec {what} "$@"\n', encoding="utf-8")
            shim.chmod(0o755)
        return folder

    def _yaml(self, block: Block) -> None:
        if block.title is None:
            raise Failed(f"{block.place}: a yaml block needs the title of its file")
        path = self.folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text + "\n", encoding="utf-8")
        self.load(path)

    def _python(self, block: Block) -> None:
        self.python.append(block.text)
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(self.python)],
            capture_output=True, encoding="utf-8", check=False, cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"{block.place}: {done.stderr}")
        self.output = done.stdout

    def _compare(self, block: Block) -> None:
        """Compare shown output with the last block's: the words of each line, not its figures and keys."""
        given = [_skeleton(line, self.folder) for line in self.output.replace("\r", "\n").splitlines()]
        for line in block.text.splitlines():
            pattern = re.escape(_skeleton(line, self.folder)).replace(re.escape("..."), ".*")
            if not any(re.fullmatch(pattern, each) for each in given) and line.strip() not in ("", "..."):
                raise Failed(f"{block.place}: not in the output: {line}\n{self.output}")


def _skeleton(line: str, folder: Path) -> str:
    line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).replace(str(folder), SHOWN_FOLDER)
    line = re.sub(r"\bct-[0-9a-f]{12}\b", "ct-ID", line)
    line = _NUMBER.sub("0", _KEY.sub("KEY", line)).replace("undefined", "0")
    line = re.sub(r"\b0 (ms|s|min|h|B|kB|MB|GB)( 0 (min|s))?\b", "0 unit", line)
    return " ".join(line.split())


def run_in_process(words: Sequence[str]) -> tuple[int, str]:
    """Run the command line without Prefect; return its exit code and its output and messages."""
    from flows.cli.app import main
    from flows.machine.terminal import terminal

    out = io.StringIO()
    code, argv, local = 0, sys.argv, os.environ.get("ADFLOWS_LOCAL")
    sys.argv, os.environ["ADFLOWS_LOCAL"] = ["adflows", *words], "1"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
        if local is None:
            os.environ.pop("ADFLOWS_LOCAL")
        terminal.enabled = False
    return code, out.getvalue()


def load_configuration(path: Path) -> None:
    """Load a configuration of any kind, which its keys tell. Raises ConfigError."""
    from flows.machine.environment import find_config

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "inbox" in values:
        from medad.config.inbox import load_inbox

        load_inbox(path)
    elif "base" in values:
        from medad.config.ablation import load as load_ablation

        load_ablation(path, {}, lambda base: find_config(Path(base), "liver"))
    elif "healthy" in values:
        from medad.config.sensitivity import load_sensitivity

        load_sensitivity(path, {})
    elif "systems" in values or "method" in values:
        from zsad.config.settings import load as load_images

        load_images(path, {})
    else:
        from medad.config.liver import load as load_liver

        load_liver(path, {})
