"""`adflows liver listen`: the DICOM node of an inbox, which receives scans and sends results back."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Quiet, Set, Verbose, complete_config, parse_overrides, prepare_terminal
from flows.machine.environment import find_config
from flows.machine.stopping import StoppedError, stopping
from flows.machine.terminal import terminal
from medad.base.errors import ConfigError
from medad.config.inbox import InboxSettings, load_inbox

LOOK_S = 1.0
"""Time between two looks for complete series and for new results."""


def listen(
    config: Annotated[
        Path,
        typer.Argument(
            help="Inbox with `listen`, `send` or both: a YAML file, or the name of one in configs/inbox.",
            autocompletion=complete_config("inbox"),
        ),
    ],
    overrides: Set = None,
    once: Annotated[
        bool, typer.Option("--send", help="Only send the DICOM results that were not sent yet, and end.")
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Receive CT from an archive, and send DICOM results back.

    With `listen` in an inbox's file, fills the inbox: runs a DICOM storage node until Ctrl-C, for callers on its
    lists. With `send`, sends the DICOM results of each segmented case to another node. Segments nothing:
    `adflows liver inbox` or a deployment does.
    """
    prepare_terminal(verbose=verbose, quiet=quiet)
    if importlib.util.find_spec("pynetdicom") is None:
        raise ConfigError("pynetdicom is not installed; pip install 'adflows[listen]'")
    settings = load_inbox(find_config(config, "inbox"), parse_overrides(overrides))
    if settings.listen is None and settings.send is None:
        raise ConfigError(f"{config}: it has neither `listen` nor `send`")
    os.umask(0o077)
    if once:
        _send_once(settings, config)
        return
    _serve(settings)


def _send_once(settings: InboxSettings, config: Path) -> None:
    from flows.cli.options import EXIT_USER_ERROR
    from flows.node.sender import ResultSender

    if settings.send is None:
        raise ConfigError(f"{config}: it has no `send`")
    sender = ResultSender(settings.out_folder, settings.send, terminal.line)
    cases = sender.unsent()
    if not cases:
        terminal.line("all DICOM results were sent before")
    with terminal.waiting("waiting for the node to take the DICOM results"):
        taken = sender.send(cases)
    if not taken:
        raise typer.Exit(EXIT_USER_ERROR)


def _serve(settings: InboxSettings) -> None:
    """Receive and send until the program is stopped."""
    from flows.node.receiver import receiving
    from flows.node.sender import ResultSender
    from flows.node.series_folders import SeriesFolders

    sender = None
    if settings.send is not None:
        sender = ResultSender(settings.out_folder, settings.send, terminal.line)
        send = settings.send
        terminal.line(f"DICOM results go to {send.ae_title} at {send.address}:{send.port}")
    with contextlib.ExitStack() as opened:
        folders = None
        if settings.listen is not None:
            listen = settings.listen
            folders = SeriesFolders(
                settings.inbox_folder, complete_s=listen.complete_s, max_bytes=1e9 * listen.max_waiting_gb
            )
            opened.enter_context(folders.opened())
            port = opened.enter_context(receiving(listen, folders, terminal.line))
            terminal.line(f"{listen.ae_title} listens on {listen.address}:{port}; Ctrl-C ends it")
        while not stopping.wait(LOOK_S):
            if folders is not None:
                for name, count in folders.deliver():
                    terminal.line(f"{name}: {count} slices received")
            if sender is not None:
                sender.send_due()
    raise StoppedError
