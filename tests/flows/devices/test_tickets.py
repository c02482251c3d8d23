"""The queue for devices: its order, also after kills, what others can read of it, and what a waiting step says."""

from __future__ import annotations

import fcntl
import getpass
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.doctor import check_devices
from flows.devices import slots as gpu
from flows.devices.tickets import QUEUE, Entry, read_queue
from flows.machine.stopping import StoppedError, stopping
from flows.store.artifacts import ArtifactStore
from medad.base.errors import LimitError
from tests.flows.conftest import CommandResult
from tests.flows.device_jobs import probing
from tests.flows.live_server import wait_for

STEP = """
import os, sys, time
from pathlib import Path
from flows.devices.slots import device_slot
folder, name = Path(sys.argv[1]), sys.argv[2]
os.setuid(int(sys.argv[3]))
with device_slot("cpu", run=name):
    with (folder / "order").open("a") as order:
        print(name, file=order)
    while not (folder / "go").exists():
        time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slots"
    monkeypatch.setenv("ADFLOWS_SLOTS", str(folder))
    monkeypatch.setattr("flows.devices.lock_queue.NOTICE_S", 0.1)
    return folder


def start(folder: Path, name: str, user: int | None = None) -> subprocess.Popen[bytes]:
    """Start a process that takes the CPU, and wait until it has a ticket."""
    before = len(read_queue(gpu.slot_folder()))
    process = subprocess.Popen(
        [sys.executable, "-c", STEP, str(folder), name, str(os.getuid() if user is None else user)]
    )
    wait_for(f"{name} has a ticket", lambda: len(read_queue(gpu.slot_folder())) > before)
    return process


def order(folder: Path) -> str:
    path = folder / "order"
    return "".join(path.read_text(encoding="utf-8").split()) if path.exists() else ""


def notice(seconds: float = 30.0, limit_h: float = math.inf) -> str:
    """Return the first line of a step that waits for the CPU."""
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        stopping.set()

    try:
        with pytest.raises(StoppedError), gpu.device_slot("cpu", on_wait=stop, limit_h=limit_h):
            pass
    finally:
        stopping.clear()
    return said[0]


def test_threads_get_the_device_in_the_order_in_which_they_asked(slots: Path) -> None:
    got: list[int] = []
    started: list[threading.Thread] = []

    def work(number: int) -> None:
        with gpu.device_slot("cpu"):
            got.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    with gpu.device_slot("cpu"):
        for thread in threads:
            thread.start()
            started.append(thread)
            wait_for("it has a ticket", lambda: len(read_queue(slots)) == len(started) + 1, pause_s=0.01)
    for thread in threads:
        thread.join(timeout=30)
    assert got == list(range(10))
    assert list((slots / QUEUE).iterdir()) == []


def test_a_killed_step_and_a_stopped_one_do_not_block_those_behind_them(tmp_path: Path, slots: Path) -> None:
    steps = [start(tmp_path, name) for name in "abcd"]
    try:
        wait_for("a has the device", lambda: order(tmp_path) == "a")
        os.kill(steps[1].pid, signal.SIGKILL)
        os.kill(steps[2].pid, signal.SIGSTOP)
        (tmp_path / "go").touch()
        wait_for("d has had the device", lambda: order(tmp_path) == "ad")
        os.kill(steps[2].pid, signal.SIGCONT)
        wait_for("c continues", lambda: order(tmp_path) == "adc")
        assert [step.wait(30) for step in steps] == [0, -signal.SIGKILL, 0, 0]
    finally:
        for step in steps:
            step.kill()
            step.wait()
    with gpu.device_slot("cpu"):
        pass
    assert list((slots / QUEUE).iterdir()) == [], "the ticket of the killed step is removed by the next step"


def test_who_has_a_device_is_known_to_all_users_whatever_the_umask(slots: Path) -> None:
    before = os.umask(0o077)
    try:
        with gpu.device_slot("cpu", run="liver tiny"):
            [entry] = read_queue(slots)
            modes = {
                path.name: path.stat().st_mode & 0o7777 for path in (slots, slots / QUEUE, gpu.slot_queue().path("cpu"))
            }
            [ticket] = (slots / QUEUE).iterdir()
            assert ticket.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)
    assert (entry.run, entry.user, entry.pids, entry.has) == ("liver tiny", getpass.getuser(), (os.getpid(),), "cpu")
    assert time.time() - entry.since < 60
    assert modes == {"slots": 0o1777, QUEUE: 0o1777, "cpu.lock": 0o644}


def test_a_waiting_step_says_who_has_the_device() -> None:
    with gpu.device_slot("cpu", run="liver tiny"):
        line = notice()
    assert re.fullmatch(
        rf"waiting for the CPU: run liver tiny of user {getpass.getuser()} has it since \d\d:\d\d", line
    )


def test_it_says_so_once_and_again_if_another_run_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.devices.lock_queue.REPEAT_S", 0.1)
    said: list[str] = []

    def wait() -> None:
        with gpu.device_slot("cpu", on_wait=said.append):
            pass

    waiting = threading.Thread(target=wait)
    with gpu.device_slot("cpu", run="liver tiny") as slot:
        waiting.start()
        wait_for("it said so", lambda: said, pause_s=0.01)
        time.sleep(0.5)
        assert len(said) == 1
        slot.ticket.entry = Entry("zsad scratches", slot.ticket.entry.wants, slot.ticket.entry.pids)
        slot.ticket.got("cpu")
        wait_for("it said so again", lambda: len(said) == 2, pause_s=0.01)
    waiting.join(30)
    assert "zsad scratches" in said[1]


def test_a_step_that_waits_for_its_own_run_says_nothing() -> None:
    said: list[str] = []
    with (
        gpu.device_slot("cpu", run="liver tiny"),
        pytest.raises(LimitError),
        gpu.device_slot("cpu", run="liver tiny", limit_h=0.5 / 3600, on_wait=said.append),
    ):
        pass
    assert said == []


def test_a_stopped_holder_is_named(tmp_path: Path) -> None:
    holder = start(tmp_path, "a")
    try:
        wait_for("a has the device", lambda: order(tmp_path) == "a")
        os.kill(holder.pid, signal.SIGSTOP)
        wait_for("it is stopped", lambda: [entry.stopped for entry in read_queue(gpu.slot_folder())] == [holder.pid])
        assert notice().endswith(f"; its process {holder.pid} is stopped")
    finally:
        holder.kill()
        holder.wait()


def test_a_program_that_holds_the_lock_without_a_ticket_is_named() -> None:
    with gpu.device_slot("cpu"):
        pass
    descriptor = os.open(gpu.slot_queue().path("cpu"), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        line = notice()
    finally:
        os.close(descriptor)
    assert f"process {os.getpid()} of user {getpass.getuser()} has the lock {gpu.slot_queue().path('cpu')}" in line


def test_a_file_of_another_program_in_the_queue_is_no_ticket(slots: Path) -> None:
    queue = slots / QUEUE
    with gpu.device_slot("cpu"):
        pass
    os.mkfifo(queue / "0-fifo")
    held = os.open(queue / "0-text", os.O_RDWR | os.O_CREAT)
    os.write(held, b"[1, 2")
    fcntl.flock(held, fcntl.LOCK_EX)
    with gpu.device_slot("cpu"):
        assert len(read_queue(slots)) == 1
    os.close(held)


def test_waiting_has_a_limit_that_names_the_holder() -> None:
    with (
        gpu.device_slot("cpu", run="liver tiny"),
        pytest.raises(LimitError, match=r"limits.waiting_hours.*run liver tiny of user"),
        gpu.device_slot("cpu", limit_h=0.2 / 3600),
    ):
        pass


def test_a_short_step_runs_beside_a_training_and_a_third_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "memory_bytes", lambda: 16e9)
    with gpu.device_slot("cpu", training=True, run="night"), gpu.device_slot("cpu", training=False, run="photos"):
        assert "run night" in notice()
        with pytest.raises(LimitError, match="run photos"), gpu.device_slot("cpu", training=False, limit_h=0.2 / 3600):
            pass
    monkeypatch.setattr(gpu, "memory_bytes", lambda: 4e9)
    with (
        gpu.device_slot("cpu", training=True),
        pytest.raises(LimitError),
        gpu.device_slot("cpu", training=False, limit_h=0.2 / 3600),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as another user")
def test_two_users_share_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others
        folder, slots = Path(name), Path(name) / "slots"
        folder.chmod(0o777)
        monkeypatch.setenv("ADFLOWS_SLOTS", str(slots))
        with gpu.device_slot("cpu", run="liver tiny"):
            other = start(folder, "other", 65534)
            [entry] = [entry for entry in read_queue(slots) if entry.run == "other"]
            assert (entry.user, entry.has) == ("nobody", "")
        wait_for("the other user has the device", lambda: order(folder) == "other")
        assert "run other of user nobody has it" in notice()
        (folder / "go").touch()
        assert other.wait(30) == 0


def test_a_step_that_waits_for_the_same_result_says_so_and_can_be_stopped(cache: Path) -> None:
    store, call = ArtifactStore(cache), probing("x")
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        stopping.set()

    def wait() -> None:
        with pytest.raises(StoppedError):
            store.build(call.step, call.parts(), lambda out: None, on_wait=stop)

    def body(out: Path) -> None:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(30)
        (out / "what").write_text("made", encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.store.artifacts.NOTICE_S", 0.1)
        store.build(call.step, call.parts(), body)
    stopping.clear()
    [line] = said
    assert re.fullmatch(rf"waiting for process {os.getpid()} on [\w-]+, which makes the same result", line)


def test_devices_and_doctor_show_who_has_a_device_and_who_waits(
    cli: Callable[..., CommandResult], tmp_path: Path, slots: Path
) -> None:
    assert all(line.endswith("free") for line in cli("devices").out.splitlines())
    assert not slots.exists(), "looking changes nothing"
    assert check_devices().found == "all free"
    me, waiting = getpass.getuser(), None
    try:
        with gpu.device_slot("cpu", run="liver tiny"):
            waiting = start(tmp_path, "zsad")
            first, second = cli("devices").out.splitlines()
            held, _ = json.loads(cli("devices", "--json").out)
            doctor = check_devices()
        assert re.fullmatch(
            rf"cpu +run liver tiny of user {me} has it since \d\d:\d\d; waiting: zsad of user {me} since \d\d:\d\d",
            first,
        )
        assert re.fullmatch(r"cpu-short +free", second)
        assert (held["holder"]["run"], held["holder"]["pids"]) == ("liver tiny", [os.getpid()])
        assert (doctor.status, doctor.found[:4]) == ("ok", "cpu:")
        wait_for("zsad has the device", lambda: order(tmp_path) == "zsad")
        os.kill(waiting.pid, signal.SIGSTOP)
        wait_for("doctor warns of the stopped process", lambda: check_devices().status == "warn")
    finally:
        if waiting is not None:
            waiting.kill()
            waiting.wait()
