"""The command line as a process of its own that notes what it makes: `python -m tests.flows.inbox_driver LOG ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    log = sys.argv.pop(1)

    def note(*words: str) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (" ".join(words) + "\n").encode())
        os.close(descriptor)

    from flows.settings import prepare_prefect

    prepare_prefect()
    from flows.cache import ArtefactStore
    from flows.inbox_folder import FailedCase, OutFolder

    move, fail = ArtefactStore._move_into_place, OutFolder.fail

    def noted_move(self: ArtefactStore, work: Path, final: Path) -> None:
        move(self, work, final)
        note("made", final.parent.name, final.name)

    def noted_fail(self: OutFolder, failure: FailedCase) -> None:
        fail(self, failure)
        note("failed", failure.case)

    replaced: Any = (noted_move, noted_fail)
    ArtefactStore._move_into_place, OutFolder.fail = replaced  # type: ignore[method-assign]
    from flows.__main__ import main as adflows

    adflows()


if __name__ == "__main__":
    main()
