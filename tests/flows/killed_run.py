"""The command line, killed with signal 9 at one exact place: `python killed_run.py PLACE STEP ARGUMENTS...`.

PLACE is one of:

- `making`: the step's folder is half written;
- `sealing`: its files are complete, but the artifact is not sealed;
- `moving`: the old artifact is removed, and the new one is not in place;
- `moved`: the artifact is in place, but Prefect does not know it;
- `copying`, `listing`, `swapping`: the run folder is being written, and STEP is `-`.
"""

# mypy: disable-error-code="assignment, method-assign, func-returns-value"

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def arm(place: str, step: str) -> None:
    from flows.devices import child
    from flows.runs import run_folder as publish
    from flows.store.artifacts import ArtifactStore
    from flows.store.step import STEPS, load_steps

    def is_it(folder: Path) -> bool:
        return folder.name.startswith(f"{step}-") or folder.parent.name == step

    def when(function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def wrapped(self: ArtifactStore, *arguments: Any, **options: Any) -> Any:
            hit = any(isinstance(value, Path) and is_it(value) for value in arguments)
            if hit and not after:
                die()
            result = function(self, *arguments, **options)
            return die() if hit else result

        return wrapped

    if place == "making":
        load_steps("flows.liver", "flows.zsad")
        is_device = STEPS[step].kind is not None
        messages, send = child._receive_messages, child._Worker.send

        def noted(self: Any, order: Any, slot: Any) -> None:
            self.step = order.call.step.name
            send(self, order, slot)

        child._Worker.send = noted

        def first_message(worker: Any, *arguments: Any) -> Iterator[Any]:
            for message in messages(worker, *arguments):
                if is_device and worker.step == step:
                    die()
                yield message

        child._receive_messages = first_message
        build = ArtifactStore.build

        def half(self: ArtifactStore, kind: Any, parts: Any, body: Any, **options: Any) -> Any:
            def broken(out: Path) -> Any:
                (out / "half").write_bytes(b"half")
                die()

            return build(self, kind, parts, broken if kind.name == step and not is_device else body, **options)

        ArtifactStore.build = half
    elif place == "sealing":
        seal = ArtifactStore._seal

        def sealed(kind: Any, *arguments: Any) -> Any:
            return die() if kind.name == step else seal(kind, *arguments)

        ArtifactStore._seal = staticmethod(sealed)
    elif place == "moving":

        def only_out(self: ArtifactStore, work: Path, final: Path) -> None:
            if is_it(final):
                if final.exists():
                    final.replace(work.with_name(f"{work.name}.old"))
                die()
            move(self, work, final)

        move = ArtifactStore._move_into_place
        ArtifactStore._move_into_place = only_out
    elif place == "moved":
        ArtifactStore._move_into_place = when(ArtifactStore._move_into_place, after=True)
    elif place == "copying":
        copy = publish._copy_files
        publish._copy_files = lambda copies, work: copy(list(copies)[:1], work) or die()
    elif place == "listing":
        publish._write_manifest = die
    else:
        assert place == "swapping"
        replace = Path.replace

        def once(self: Path, target: Any) -> Any:
            done = replace(self, target)
            return die() if self.suffix == ".new" or Path(target).suffix == ".old" else done

        publish._replace_folder = _armed(publish._replace_folder, once)


def _armed(swap: Callable[..., None], replace: Callable[..., Any]) -> Callable[..., None]:
    def armed(*arguments: Any) -> None:
        Path.replace = replace
        swap(*arguments)

    return armed


if __name__ == "__main__":
    from flows.machine.own_server import prepare_prefect

    prepare_prefect()
    arm(sys.argv[1], sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    from flows.cli.app import main

    main()
