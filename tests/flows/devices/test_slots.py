"""Slots: one holder per device among threads and processes, also after kill -9; and the lock of each GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows.devices import slots as gpu
from flows.machine.stopping import StoppedError, stopping
from medad.base.errors import ConfigError
from medad.base.settings import Gpus
from tests.flows.live_server import wait_for

HOLDER = """
import sys, time
from pathlib import Path
from flows.devices.slots import device_slot
with device_slot("cpu") as slot:
    Path(sys.argv[1]).write_text(slot.device.name)
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


def test_two_processes_never_hold_one_device(tmp_path: Path) -> None:
    first = hold(tmp_path / "first", 600)
    wait_for("the first holds it", (tmp_path / "first").exists)
    second = hold(tmp_path / "second", 0)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1.5)
    assert not (tmp_path / "second").exists()
    os.kill(first.pid, signal.SIGKILL)  # the kernel frees its lock
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
    with gpu.device_slot("cpu") as slot:
        assert slot.device == gpu.CPU


def test_a_copy_of_the_descriptor_holds_the_device_too() -> None:
    with gpu.device_slot("cpu") as slot:
        copy = os.dup(slot.descriptor)
    assert gpu.slot_queue().try_lock("cpu") is None, "as the child of a killed flow holds it"
    os.close(copy)
    with gpu.device_slot("cpu"):
        pass


def test_each_gpu_is_a_slot_and_any_free_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.PRETEND_VARIABLE, "2")
    with gpu.device_slot("auto") as first, gpu.device_slot("auto") as second:
        assert {first.device.name, second.device.name} == {"gpu-0", "gpu-1"}
    with gpu.device_slot((1,)) as only:
        assert only.device.name == "gpu-1"


@pytest.mark.parametrize(
    ("visible", "number", "device"),
    [
        ("", 1, gpu.Device("gpu-1", "1", "cuda:0")),
        ("2,3", 1, gpu.Device("gpu-3", "3", "cuda:0")),
        ("GPU-8f2e, GPU-77aa", 0, gpu.Device("gpu-GPU-8f2e", "GPU-8f2e", "cuda:0")),
    ],
)
def test_a_gpu_has_one_lock_however_it_is_numbered(
    visible: str, number: int, device: gpu.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpu, "gpu_count", lambda: 2)
    assert gpu.allowed_devices((number,)) == (device,)


def test_which_devices_a_setting_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def with_gpus(count: int, gpus: Gpus) -> list[str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        return [device.name for device in gpu.allowed_devices(gpus)]

    assert with_gpus(0, "auto") == with_gpus(2, "cpu") == ["cpu"]
    assert with_gpus(2, "auto") == ["gpu-0", "gpu-1"]
    assert with_gpus(2, (1,)) == ["gpu-1"]
    for count, gpus in ((0, (0,)), (2, (0, 2))):
        with pytest.raises(ConfigError, match=f"{count} usable GPUs"):
            with_gpus(count, gpus)


def test_a_pretended_machine_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.PRETEND_VARIABLE, "3")
    devices = gpu.allowed_devices("auto")
    assert [device.name for device in devices] == ["gpu-0", "gpu-1", "gpu-2"]
    assert {(device.torch_name, device.visible) for device in devices} == {("cpu", "")}
    monkeypatch.setenv(gpu.PRETEND_VARIABLE, "many")
    with pytest.raises(ConfigError, match="ADFLOWS_PRETEND_GPUS"):
        gpu.allowed_devices("auto")


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
