"""The side of `benchmarks/zsad.py` that talks to `anomalib_peer.py`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.zsad_timing import Row

PEER_PROGRAM = Path(__file__).with_name("anomalib_peer.py")


class Anomalib:
    """A running `anomalib_peer.py`. It measures its times itself, and is idle while this process works."""

    def __init__(self, python: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", str(PEER_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        self.versions: dict[str, str] = self.ask("versions")

    def __enter__(self) -> Anomalib:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def ask(self, order: str, **arguments: object) -> Any:
        """Send an order and return the answer. Raise RuntimeError with its last output if the process died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": order} | arguments) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._errors.seek(0)
            raise RuntimeError(f"anomalib's process died at {order}:\n{self._errors.read()[-2000:]}")
        return json.loads(answer)


def skipped_row(part: str, what: str, limit: str) -> Row:
    return Row(part, what, None, "x", limit, None, "skipped: no --anomalib-python")
