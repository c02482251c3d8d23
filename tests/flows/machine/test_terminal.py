"""The terminal: live bars on a pseudo-terminal, and one line per stage and failure in a log."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import signal
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.machine.terminal import Terminal, Verbosity
from medad.base.progress import Progress

Cli = Callable[..., Any]
TIME = re.compile(r"(\d+ (h|min) )*\d+(\.\d)? (s|min)")


@contextlib.contextmanager
def pseudo_terminal() -> Iterator[Callable[[], str]]:
    """Make standard error a pseudo-terminal. The yielded function returns what was written, without colours."""
    reader, writer = os.openpty()
    tty.setraw(writer)
    parts: list[bytes] = []
    over = threading.Event()

    def collect() -> None:
        while not over.is_set() or select.select([reader], [], [], 0)[0]:
            if select.select([reader], [], [], 0.02)[0]:
                parts.append(os.read(reader, 65536))

    thread = threading.Thread(target=collect)
    thread.start()
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        try:
            with contextlib.redirect_stderr(file):
                yield lambda: re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(parts).decode())
                file.flush()
        finally:
            over.set()
            thread.join()
    os.close(reader)


@pytest.fixture
def screen() -> Terminal:
    """Return a terminal that is on."""
    made = Terminal()
    made.enabled = True
    return made


def calls(screen: Terminal, step: str, number: int, **how: bool) -> None:
    for _ in range(number):
        screen.submitted(step)
        screen.ended(step, **how)


def without_times(text: str) -> list[str]:
    return [TIME.sub("T", line.strip()) for line in text.splitlines()]


def test_a_log_has_one_line_per_stage_and_failure(screen: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with screen.run():
        calls(screen, "prepare", 130, cached=True)
        calls(screen, "segment", 129)
        screen.failure("scan.nii.gz: cut short")
        calls(screen, "segment", 1, failed=True)
        calls(screen, "report", 1)
    assert without_times(capsys.readouterr().err) == [
        "prepare: 130 done, 130 cached, T",
        "scan.nii.gz: cut short",
        "segment: 129 done, 1 failed, T",
        "report: 1 done, T",
    ]


def test_a_stage_ends_in_a_log_when_its_last_call_ends(screen: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with screen.run():
        screen.submitted("prepare")
        screen.submitted("insert")
        screen.ended("prepare")
        assert without_times(capsys.readouterr().err) == ["prepare: 1 done, T"]
        screen.ended("insert")
        assert capsys.readouterr().err == "", "more calls of this step may come"
    assert without_times(capsys.readouterr().err) == ["insert: 1 done, T"]


def test_steps_that_take_turns_have_one_line_each(screen: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with screen.run():
        calls(screen, "prepare", 3)
        with screen.stages({"segment": 3, "evaluate": 2}):
            for case in range(3):
                calls(screen, "segment", 1)
                if case:
                    calls(screen, "evaluate", 1)
        with screen.stages(), screen.stages({"encode": 1}):
            calls(screen, "encode", 1)
            calls(screen, "text", 1)
            calls(screen, "encode", 1)
        assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
            "prepare: 3 done",
            "segment: 3 done",
            "evaluate: 2 done",
            "encode: 2 done",
            "text: 1 done",
        ]


def test_a_terminal_shows_a_bar_per_stage(screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.machine.terminal.SHOWN_AFTER_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with pseudo_terminal() as written:
        with screen.run():
            assert shown(written, "starting")
            with screen.stages({"prepare": 130, "segment": 4}):
                calls(screen, "prepare", 60, cached=True)
                calls(screen, "prepare", 4)
                calls(screen, "prepare", 1, failed=True)
                screen.submitted("segment")
                screen.count("segment", "one", 5, 10)
                assert shown(written, r"prepare +[━╸╺]+ 65 of 130, 60 cached, 1 failed, \d+ s, \d+ s left")
                assert shown(written, r"segment +[━╸╺]+ 0 of 4, 5 of 10 images, \d+ s, \d+ s left")
                with screen.waiting() as say:
                    say("waiting for the CPU: run X has it")
                    assert shown(written, "waiting for the CPU: run X has it")
                screen.ended("segment")
            screen.line("a note")
        assert shown(written, r"prepare: 64 done, 60 cached, 1 failed, \d\.\d s\r?\n")
        assert shown(written, "a note\r?\n")


def shown(written: Callable[[], str], pattern: str) -> bool:
    """Wait until a text is on the pseudo-terminal."""
    for _ in range(200):
        if re.search(pattern, written()):
            return True
        time.sleep(0.02)
    pytest.fail(f"{pattern} is not in {written()[-2000:]}")


def test_a_training_is_one_bar_with_its_loss(screen: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with pseudo_terminal() as written, screen.run():
        screen.submitted("restoration")
        screen.training("restoration", "key", Progress("member 1", 2, 4, 50, 100, 0.125, 60.0))
        assert shown(written, r"restoration +[━╸╺]+ 0 of 1, member 1: epoch 2 of 4, loss 0.1250, \d+ s, \d+ s left")


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        ("quiet", ["a failure"]),
        ("normal", ["a note", "a failure", "fake: 1 done, T"]),
        ("verbose", ["a note", "fake one: cached", "a failure", "fake: 1 done, T"]),
    ],
)
def test_the_verbosity_says_how_much(
    screen: Terminal, capsys: pytest.CaptureFixture[str], verbosity: Verbosity, expected: list[str]
) -> None:
    screen.verbosity = verbosity
    with screen.run():
        screen.line("a note")
        calls(screen, "fake", 1)
        screen.detail("fake one: cached")
        screen.failure("a failure")
    assert without_times(capsys.readouterr().err) == expected


def test_a_wait_is_one_line_in_a_log(
    screen: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.machine.terminal.SHOWN_AFTER_S", 0.05)
    with screen.waiting("a short wait"):
        pass
    with screen.waiting() as first, screen.waiting("waiting for X") as second:
        first("waiting for X")
        time.sleep(0.3)  # the lines come by themselves, also if nobody polls
        second("waiting for X")
        first("waiting for Y")
    time.sleep(0.1)
    assert capsys.readouterr().err.splitlines() == ["waiting for X", "waiting for Y"]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("again", [(), ("--json",), ("--quiet",), ("-v",)])
def test_a_cached_run_is_a_line_per_stage(
    cli: Cli, new_world: Callable[..., Any], tmp_path: Path, again: tuple[str, ...]
) -> None:
    world = new_world(tmp_path, train=3, test=2)
    first = cli("liver", "prepare", world.config)
    assert without_times(first.err) == ["prepare: 5 done, T"]
    assert first.out.splitlines()[-1].startswith("5 tasks: 5 computed, 0 cached, in ")
    second = cli("liver", "prepare", world.config, *again)
    expected = {
        (): ["prepare: 5 done, 5 cached, T"],
        ("-v",): [
            *(f"prepare btcv-000{number}: cached" for number in (1, 2, 3)),
            *(f"prepare lits-{number}: cached" for number in (0, 1)),
            "prepare: 5 done, 5 cached, T",
        ],
    }
    assert without_times(second.err) == expected.get(again, [])
    if again == ("--json",):
        assert second.answer["cached"] == 5


@pytest.mark.usefixtures("cache")
def test_failures_are_printed_beside_json(cli: Cli, new_world: Callable[..., Any], tmp_path: Path) -> None:
    world = new_world(tmp_path, train=2, test=1)
    broken = world.btcv / "img" / "img0001.nii.gz"
    broken.write_bytes(b"no gzip")
    for option in ("--json", "--quiet"):
        ran = cli("liver", "prepare", world.config, option)
        assert ran.code == 2
        [line] = ran.err.splitlines()
        assert line.startswith(f"{broken}: ")


@pytest.mark.usefixtures("cache")
def test_a_command_shows_bars_on_a_terminal(
    new_world: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.cli.app import main
    from medad.steps import cases

    whole = cases.prepare_case

    @functools.wraps(whole)
    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.4)  # longer than the time between two pictures of a bar
        whole(*args, **kwargs)

    monkeypatch.setattr(cases, "prepare_case", slow)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("ADFLOWS_LOCAL", "1")
    world = new_world(tmp_path, train=2, test=1)
    monkeypatch.setattr("sys.argv", ["adflows", "liver", "prepare", str(world.config)])
    with pseudo_terminal() as written:
        code = _exit_code(main)
    assert code == 0
    assert re.search(r"prepare [━╸╺]+ \d of \d", written())
    assert re.search(r"prepare: 3 done, \d+\.\d s", written())


def _exit_code(main: Callable[[], None]) -> object:
    from flows.machine.terminal import terminal

    try:
        main()
    except SystemExit as end:
        return end.code
    finally:
        terminal.enabled = False
    return 0


def test_quiet_and_verbose_exclude_each_other(cli: Cli) -> None:
    for option in ("--quiet", "--json"):
        ran = cli("liver", "prepare", "demo", "-v", option)
        assert ran.code == 2
        assert ran.err == f"adflows: --verbose and {option} exclude each other\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_stopped_run_is_one_line(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int | None
) -> None:
    from flows.cli.options import stopped_in_one_line
    from flows.machine.terminal import terminal

    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    terminal.enabled = True
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped, stopped_in_one_line(), terminal.run():
            signal.raise_signal(number)
    finally:
        terminal.enabled = False
        signal.signal(signal.SIGINT, interrupt)
    assert getattr(stopped.value, "code", None) == code
    assert capsys.readouterr().err.splitlines() == [
        "adflows: stopped by the user; finished steps are cached, and the next run continues"
    ]
    assert signal.getsignal(signal.SIGTERM) is before
