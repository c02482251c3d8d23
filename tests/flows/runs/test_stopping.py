"""A command that is stopped or killed while it waits for a device, and the zombies that a flow leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.devices import slots as gpu
from tests.flows.live_server import MARK, kill_marked, processes, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
ZOMBIES = """
import ctypes, subprocess, sys, time
from pathlib import Path
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # adopt the orphans, as `adflows serve` does
subprocess.run(sys.argv[1:], check=True)
for _ in range(100):
    time.sleep(0.1)
    children = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    mine = [state for state, parent, *_ in children if int(parent) == {pid}]
    if set(mine) <= {"Z"}:
        break
print(*mine)
"""
FLOW = """
import sys
from pathlib import Path
from flows.devices.child import compute_in_child
from tests.flows.device_jobs import probing
if __name__ == "__main__":
    compute_in_child(probing("x"), Path(sys.argv[1]), "key")
"""


class Command:
    """A command that waits for the CPU, which this process has."""

    def __init__(self, folder: Path) -> None:
        self.mark, self.log = str(folder), folder / "log"
        environment = os.environ | {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
            "ADFLOWS_CACHE": str(folder / "cache"),
        }
        with self.log.open("w", encoding="utf-8") as log:
            script = str(ROOT / "tests" / "flows" / "runs" / "stopped_run.py")
            self.process = subprocess.Popen([sys.executable, script], env=environment, stdout=log, stderr=log)
        wait_for("it waits for the CPU", self._waits, 200)
        assert any("temporary_server" in command for command in processes(self.mark).values()), (
            "it has a temporary server"
        )

    def _waits(self) -> bool:
        assert self.process.poll() is None, self.said
        return "waiting for the CPU: run night of user" in self.said

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder for a command. This process has the CPU's slot for short steps meanwhile."""
    monkeypatch.setenv("ADFLOWS_SLOTS", str(tmp_path / "slots"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with gpu.device_slot("cpu", training=False, run="night"):
        yield tmp_path
    kill_marked(str(tmp_path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_while_it_waits_says_so_and_leaves_nothing(
    folder: Path, number: signal.Signals, code: int
) -> None:
    command = Command(folder)
    command.process.send_signal(number)
    assert command.process.wait(60) == code
    assert command.said.splitlines()[-1] == "adflows: stopped by the user"
    assert "Traceback" not in command.said
    assert "internal error" not in command.said
    assert processes(command.mark) == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])  # the second as a crash of native code
def test_the_temporary_server_ends_with_a_command_that_is_killed_or_crashes(
    folder: Path, number: signal.Signals
) -> None:
    command = Command(folder)
    command.process.send_signal(number)
    assert command.process.wait(60) == -number
    wait_for("its server is gone", lambda: processes(command.mark) == {}, 10)


def test_a_flow_with_a_device_step_leaves_no_zombies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOWS_SLOTS", str(tmp_path / "slots"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "flow.py"
    script.write_text(FLOW, encoding="utf-8")
    (tmp_path / "out").mkdir()
    adopter = ZOMBIES.replace("{pid}", "__import__('os').getpid()")
    command = [sys.executable, "-c", adopter, sys.executable, str(script), str(tmp_path / "out")]
    left = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout.split()
    assert left == []
