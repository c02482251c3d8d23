"""The child process of a device step: its environment, its end, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.devices import child
from flows.devices import slots as gpu
from flows.devices.child import ChildTraceback, compute_in_child
from flows.devices.worker import KEPT_BYTES
from flows.machine.stopping import StoppedError, stopping
from flows.store.artifacts import ArtifactStore
from flows.store.step import Call
from medad.base.errors import InputError, LimitError
from medad.base.settings import MachineSettings, TimeLimits
from tests.flows.device_jobs import idle_worker, is_alive, probing
from tests.flows.live_server import wait_for


@pytest.fixture(autouse=True)
def _own_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOWS_SLOTS", str(tmp_path / "slots"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def facts(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "what").read_text(encoding="utf-8"))
    return found


def is_free(name: str = gpu.SHORT_STEPS) -> bool:
    descriptor = gpu.slot_queue().try_lock(name)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def test_it_runs_elsewhere_in_todays_environment_and_sees_its_device_alone(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKER", "set after the server of processes began")
    made = compute_in_child(probing("x"), out, "key")
    found = facts(out)
    assert found["pid"] not in (os.getpid(), os.getppid())
    assert found["group"] == found["pid"], "it leads a process group, so its children end with it"
    assert (found["device"], found["visible"], found["marker"]) == ("cpu", "", os.environ["MARKER"])
    assert (made.device, made.notes) == ("cpu", ())


def test_each_of_two_gpus_gets_one(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = MachineSettings(gpus=(5,))
    made = compute_in_child(probing("x", machine=machine), out, "key")
    assert made.device == "gpu-5"
    assert (facts(out)["device"], facts(out)["visible"]) == ("cuda:0", "5")


def pid_of(call: Call, out: Path) -> int:
    """Run a call and return the process that computed it."""
    compute_in_child(call, out, "key")
    pid: int = facts(out)["pid"]
    return pid


def test_the_steps_of_a_device_share_one_process_and_the_slot_is_free_between_them(out: Path) -> None:
    first = pid_of(probing("x"), out)
    assert is_free(), "another run may use the device now"
    assert pid_of(probing("y"), out) == first


def test_each_device_has_its_own_process(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    calls = {number: probing("x", machine=MachineSettings(gpus=(number,))) for number in (5, 6)}
    pids = {number: pid_of(call, out) for number, call in calls.items()}
    assert pids[5] != pids[6]
    for number, call in calls.items():
        assert pid_of(call, out) == pids[number]
        assert facts(out)["visible"] == str(number)


@pytest.mark.parametrize("act", ["rule", "bug", "exit 3", f"die {int(signal.SIGSEGV)}", "memory 4"])
def test_after_an_error_the_process_is_another_one(out: Path, act: str) -> None:
    before = pid_of(probing("x"), out)
    with contextlib.suppress(InputError, ZeroDivisionError, RuntimeError):
        compute_in_child(probing("x", act), out, "key")
    assert not is_alive(before)
    assert pid_of(probing("x"), out) != before


def test_a_process_that_was_killed_while_it_waited_is_replaced(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pid_of(probing("x"), out)
    os.kill(before, signal.SIGKILL)
    wait_for("it is gone", lambda: not is_alive(before))
    after = pid_of(probing("x"), out)
    os.kill(after, signal.SIGKILL)
    wait_for("it is gone", lambda: not is_alive(after))
    monkeypatch.setattr(child._Worker, "is_fresh", True)  # as if it ended just after this question
    compute_in_child(probing("x"), out, "key")
    assert facts(out)["pid"] not in (before, after)


def test_a_process_that_left_another_one_behind_ends_with_it(out: Path, tmp_path: Path) -> None:
    worker = pid_of(probing("x", f"leave {tmp_path / 'pid'}"), out)
    left = int((tmp_path / "pid").read_text(encoding="utf-8"))
    wait_for("both are gone", lambda: not is_alive(worker) and not is_alive(left))


@pytest.mark.slow
def test_a_process_that_keeps_much_memory_ends(out: Path) -> None:
    little = pid_of(probing("x", "hoard 64"), out)
    much = pid_of(probing("x", f"hoard {KEPT_BYTES >> 20}"), out)
    assert much == little
    wait_for("it is gone", lambda: not is_alive(much))


def test_a_process_without_an_order_ends() -> None:
    connection, other = child._context.Pipe()
    process = child._context.Process(target=idle_worker, args=(other, gpu.CPU, False), daemon=True)
    process.start()
    other.close()
    process.join(60)
    assert process.exitcode == 0
    connection.close()


def test_progress_comes_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    @contextmanager
    def watch(call: Call) -> Iterator[Callable[..., None]]:
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr(child, "progress_callback", watch)
    compute_in_child(probing("x"), out, "key")
    assert seen == [(1, 2), (2, 2)]


def test_an_error_comes_back_as_it_was(out: Path) -> None:
    with pytest.raises(InputError, match="the scan is bad") as told:
        compute_in_child(probing("x", "rule"), out, "key")
    assert told.value.path == Path("/share/scan.nii.gz")
    with pytest.raises(ZeroDivisionError) as bug:
        compute_in_child(probing("x", "bug"), out, "key")
    assert isinstance(bug.value.__cause__, ChildTraceback)
    assert "in probe" in str(bug.value.__cause__), "the traceback names the function"
    with pytest.raises(RuntimeError, match="LocalError: no other process"):
        compute_in_child(probing("x", "unpicklable"), out, "key")
    assert is_free()


@pytest.mark.parametrize(("act", "code"), [("exit 3", "3"), (f"die {int(signal.SIGSEGV)}", "-11")])
def test_a_process_that_just_ends_is_a_bug(out: Path, act: str, code: str) -> None:
    with pytest.raises(RuntimeError, match=f"step probe ended with exit code {code}"):
        compute_in_child(probing("x", act), out, "key")
    assert is_free()


@pytest.mark.parametrize("act", ["hang", "spin"])
def test_a_time_limit_ends_it_whatever_it_does(out: Path, act: str) -> None:
    machine = MachineSettings(limits=TimeLimits(inference_hours=0.5 / 3600))
    with pytest.raises(LimitError, match=r"limits.inference_hours") as told:
        compute_in_child(probing("x", act, machine), out, "key")
    assert "\n" not in str(told.value)
    assert not is_alive(facts(out)["pid"])
    assert is_free()


def test_what_it_started_ends_with_it(out: Path, tmp_path: Path) -> None:
    machine = MachineSettings(limits=TimeLimits(inference_hours=1 / 3600))
    with pytest.raises(LimitError):
        compute_in_child(probing("x", f"grandchild {tmp_path / 'pid'}", machine), out, "key")
    wait_for("the grandchild is gone", lambda: not is_alive(int((tmp_path / "pid").read_text(encoding="utf-8"))))


def test_a_flow_that_is_ended_ends_it(out: Path) -> None:
    threading.Timer(0.5, stopping.set).start()
    try:
        with pytest.raises(StoppedError):
            compute_in_child(probing("x", "spin"), out, "key")
    finally:
        stopping.clear()
    assert not (out / "what").exists() or not is_alive(facts(out)["pid"])
    assert is_free()


@pytest.mark.parametrize(
    ("act", "said"),
    [("memory", "had too little memory for"), ("killed-for-memory", "was killed, probably out of memory, at")],
)
def test_out_of_memory_is_answered_by_smaller_batches(out: Path, act: str, said: str) -> None:
    made = compute_in_child(probing("x", f"{act} 2", batch_size=8), out, "key")
    assert facts(out)["batch_size"] == 2
    assert made.notes == (
        f"cpu {said} batches of 8",
        "tried batches of 4",
        f"cpu {said} batches of 4",
        "tried batches of 2",
    )


def test_then_by_the_cpu_with_whole_batches(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.PRETEND_VARIABLE, "1")
    made = compute_in_child(probing("x", "no-gpu-memory", batch_size=2), out, "key")
    assert (made.device, facts(out)["batch_size"]) == ("cpu", 2)
    assert made.notes[-2:] == ("gpu-0 had too little memory for batches of 1", "tried the CPU with batches of 2")


def test_and_then_it_is_one_line(out: Path) -> None:
    with pytest.raises(LimitError, match="too little memory, even for batches of 1"):
        compute_in_child(probing("x", "memory 0", batch_size=2), out, "key")


def test_the_artifact_tells_where_it_was_made(cache: Path) -> None:
    call = probing("x", "memory 4")
    store = ArtifactStore(cache)
    ref, _ = store.build(call.step, call.parts(), lambda out: compute_in_child(call, out, ""))
    sidecar = store.sidecar(ref)
    assert (sidecar.device, sidecar.notes) == (
        "cpu",
        ("cpu had too little memory for batches of 8", "tried batches of 4"),
    )


def test_waiting_for_a_device_is_no_part_of_a_steps_time(cache: Path, out: Path) -> None:
    compute_in_child(probing("the server of processes is up"), out, "key")
    call = probing("x")
    store = ArtifactStore(cache)
    ready = threading.Event()

    def busy() -> None:
        with gpu.device_slot("cpu", training=False):
            ready.set()
            time.sleep(3.0)

    thread = threading.Thread(target=busy)
    thread.start()
    ready.wait()
    ref, _ = store.build(call.step, call.parts(), lambda folder: compute_in_child(call, folder, ""))
    thread.join()
    assert store.sidecar(ref).seconds < 2.5


FLOW = """
import sys
from pathlib import Path
from flows.devices.child import compute_in_child
from tests.flows.device_jobs import is_alive, probing
if __name__ == "__main__":
    compute_in_child(probing("x", sys.argv[1]), Path(sys.argv[2]), "key")
"""


@pytest.mark.slow
@pytest.mark.parametrize("act", ["hang", "spin"])
def test_it_dies_with_a_flow_that_is_killed_and_holds_the_device_until_then(
    out: Path, tmp_path: Path, act: str
) -> None:
    """Check that a stopped step still holds its device after its flow was killed, because it has the lock too."""
    script = tmp_path / "flow.py"
    script.write_text(FLOW, encoding="utf-8")
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    flow = subprocess.Popen(
        [sys.executable, str(script), act, str(out)],
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        wait_for(
            "the step is at work", lambda: (out / "what").exists() and (out / "what").read_text(encoding="utf-8"), 200
        )
        pid = facts(out)["pid"]
        os.kill(pid, signal.SIGSTOP)
        os.kill(flow.pid, signal.SIGKILL)
        flow.wait()
        time.sleep(0.3)
        assert is_alive(pid)
        assert not is_free(), "the device is in use as long as the child lives"
        os.kill(pid, signal.SIGCONT)
        wait_for("the step's process is gone", lambda: not is_alive(pid))
        wait_for("the device is free", is_free)
    finally:
        flow.kill()
        flow.wait()
