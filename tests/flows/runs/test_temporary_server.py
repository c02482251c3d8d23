"""The temporary server of a command: its secret, and one line if it does not start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

ASK = """
import json, os, urllib.error, urllib.request
from flows.machine.own_server import prepare_prefect
prepare_prefect()
from flows.runs.temporary_server import use_temporary_server
use_temporary_server()
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    flows = client.read_flows()
try:
    urllib.request.urlopen(urllib.request.Request(os.environ["PREFECT_API_URL"] + "/admin/version"))
    stranger = 200
except urllib.error.HTTPError as error:
    stranger = error.code
import sys
print(json.dumps({"flows": len(flows), "stranger": stranger, "loaded": "prefect.server.api.server" in sys.modules}))
"""

BROKEN = """
import subprocess, sys
import flows.runs.temporary_server as temporary
from flows.machine.own_server import prepare_prefect
from medad.base.errors import ConfigError
prepare_prefect()
temporary._start = lambda *_: subprocess.Popen({command!r})
try:
    temporary.use_temporary_server()
except ConfigError as error:
    print(error)
"""


def run(folder: Path, code: str, **variables: str) -> str:
    own = {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | own | variables, capture_output=True, check=True, encoding="utf-8"
    )
    return done.stdout


def test_only_its_command_can_use_the_temporary_server(tmp_path: Path) -> None:
    assert json.loads(run(tmp_path, ASK)) == {"flows": 0, "stranger": 401, "loaded": False}


@pytest.mark.parametrize(
    ("command", "rule"),
    [
        (["sleep", "60"], "did not answer in 1 s; .*PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"),
        (["false"], "ended with exit code 1"),
    ],
)
def test_a_temporary_server_that_does_not_start_is_one_line(tmp_path: Path, command: list[str], rule: str) -> None:
    said = run(tmp_path, BROKEN.format(command=command), PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="1")
    assert re.fullmatch(f"Prefect: its temporary server {rule}.*\n", said)
