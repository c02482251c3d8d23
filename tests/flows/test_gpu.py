"""One holder a device: threads, processes, kill -9, and which lock a GPU has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import gpu
from flows.cache import ArtefactStore, Step
from flows.jobs import DeviceJob
from flows.progress import StoppedError, stopping
from medad.errors import ConfigError

HOLDER = """
import sys, time
from pathlib import Path
from flows.gpu import device_slot
with device_slot("cpu") as device:
    Path(sys.argv[1]).write_text(device)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slots"
    monkeypatch.setenv("ADFLOWS_SLOTS", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def hold(mark: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(mark), str(seconds)])


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_two_processes_never_hold_one_device(tmp_path: Path) -> None:
    first = hold(tmp_path / "first", 600)
    wait_for((tmp_path / "first").exists)
    second = hold(tmp_path / "second", 0)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1.5)
    assert not (tmp_path / "second").exists()
    os.kill(first.pid, signal.SIGKILL)  # the kernel frees it
    first.wait()
    assert second.wait(timeout=30) == 0
    assert (tmp_path / "second").read_text(encoding="utf-8") == "cpu"


def test_threads_hold_it_one_after_another() -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with gpu.device_slot("cpu"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1] * 5


def test_an_error_gives_the_slot_back() -> None:
    with pytest.raises(ZeroDivisionError), gpu.device_slot("cpu"):
        raise ZeroDivisionError
    with gpu.device_slot("cpu") as device:
        assert device == "cpu"


def test_each_gpu_is_a_slot_and_any_free_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "devices_of", lambda _: ("cuda:0", "cuda:1"))
    with gpu.device_slot("auto") as first, gpu.device_slot("auto") as second:
        assert {first, second} == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize(
    ("visible", "device", "name"),
    [
        ("", "cuda:1", "gpu-1"),
        ("2,3", "cuda:1", "gpu-3"),
        ("GPU-8f2e, GPU-77aa", "cuda:0", "gpu-GPU-8f2e"),
        ("2", "cpu", "cpu"),
    ],
)
def test_a_gpu_has_one_lock_however_it_is_numbered(
    visible: str, device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu._lock_name(device) == name


def test_which_devices_a_setting_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def with_gpus(count: int, name: str) -> tuple[str, ...]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        return gpu.devices_of(name)

    assert with_gpus(0, "auto") == with_gpus(2, "cpu") == ("cpu",)
    assert with_gpus(2, "auto") == with_gpus(2, "cuda") == ("cuda:0", "cuda:1")
    assert with_gpus(2, "cuda:1") == ("cuda:1",)
    for count, name in ((0, "cuda"), (0, "cuda:0"), (2, "cuda:2")):
        with pytest.raises(ConfigError, match="GPU"):
            with_gpus(count, name)


def test_a_flow_that_is_ended_stops_waiting() -> None:
    with gpu.device_slot("cpu"):
        stopping.set()
        try:
            with pytest.raises(StoppedError), gpu.device_slot("cpu"):
                pass
        finally:
            stopping.clear()


def test_a_folder_that_cannot_be_is_one_line(slots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots.write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("ADFLOWS_SLOTS", str(slots / "below"))
    with pytest.raises(ConfigError, match="ADFLOWS_SLOTS"), gpu.device_slot("cpu"):
        pass


def test_waiting_for_a_device_is_no_part_of_a_steps_time(cache: Path) -> None:
    class Waiting(DeviceJob):
        device = "cpu"
        step = Step("waiting", 1, (), ())

        def inputs(self) -> dict[str, object]:
            return {}

        def run_on(self, out: Path, device: str) -> None:
            (out / "device").write_text(device, encoding="utf-8")

    job = Waiting()
    store = ArtefactStore(cache)
    ready = threading.Event()

    def busy() -> None:
        with gpu.device_slot("cpu"):
            ready.set()
            time.sleep(1.0)

    thread = threading.Thread(target=busy)
    thread.start()
    ready.wait()
    ref = store.build(job.step, job.inputs(), lambda out: job.make(out, key=""))
    thread.join()
    assert store.sidecar(ref).seconds < 0.5
    assert (cache / ref.path / "device").read_text(encoding="utf-8") == "cpu"
