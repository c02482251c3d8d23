"""`adflows open`: look at a run's report in a browser on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import prepare_terminal
from flows.machine.environment import runs_root
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError


def open_run(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder, or a folder of runs. Default: $ADFLOWS_RUNS, else runs.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1. 0: any free one.")] = 0,
) -> None:
    """Open a run's report, or the page of all runs.

    Serves the folder on 127.0.0.1 until Ctrl-C and prints the address, which works once and in one browser. From
    another machine, forward the port: ssh -L PORT:127.0.0.1:PORT.
    """
    prepare_terminal()
    folder = runs_root() if run is None else run
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    from flows.server.open_run import open_folder

    server, listening, address = open_folder(folder, port)
    print_result(address)
    terminal.line("open this address in a browser; Ctrl-C ends it")
    with listening:
        server.run(sockets=[listening])
