"""The command line as a process that logs the artifacts it makes. It can kill itself at a given place.

python -m tests.flows.inbox_driver LOG [--die PLACE] liver inbox ...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

PLACES = ("prepare", "segment", "report", "publish", "published", "overview", "fail")


def main() -> None:
    # a shell without job control starts background processes with this signal ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log, place = sys.argv.pop(1), ""
    if sys.argv[1] == "--die":
        place = sys.argv[2]
        assert place in PLACES
        del sys.argv[1:3]

    def note(*words: str) -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (" ".join(words) + "\n").encode())
        os.close(descriptor)

    from flows.machine.own_server import prepare_prefect

    prepare_prefect()
    from flows.inbox.results import FailedCase, OutFolder
    from flows.runs import run_folder as publish
    from flows.store.artifacts import ArtifactStore

    def die_at(reached: str) -> None:
        if reached == place:
            os.kill(os.getpid(), signal.SIGKILL)

    move, fail, swap, write = ArtifactStore._move_into_place, OutFolder.fail, publish._replace_folder, OutFolder._write

    def noted_move(self: ArtifactStore, work: Path, final: Path) -> None:
        die_at(final.parent.name)  # made, but not yet in place
        move(self, work, final)
        note("made", final.parent.name, final.name)

    def noted_fail(self: OutFolder, failure: FailedCase) -> None:
        die_at("fail")
        fail(self, failure)
        note("failed", failure.case)

    def noted_swap(work: Path, final: Path) -> None:
        die_at("publish")
        swap(work, final)
        die_at("published")

    def noted_write(self: OutFolder, name: str, text: str) -> None:
        die_at("overview")
        write(self, name, text)

    replaced: Any = (noted_move, noted_fail, noted_swap, noted_write)
    ArtifactStore._move_into_place, OutFolder.fail, publish._replace_folder, OutFolder._write = replaced  # type: ignore[method-assign]
    from flows.cli.app import main as adflows

    adflows()


if __name__ == "__main__":
    main()
