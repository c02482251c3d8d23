"""The secret of a server: only its owner has it, and it is sent to no other server."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.machine.environment import product_folder
from flows.machine.own_server import (
    CLIENT_VARIABLE,
    ensure_secret,
    only_server,
    read_secret,
    running_server,
    secret_file,
    use_running_server,
)
from medad.base.errors import ConfigError

URL = "http://127.0.0.1:4321/api"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    for name in ("PREFECT_API_URL", CLIENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def test_a_secret_is_random_and_only_its_owner_can_read_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_secret() is None
    first, new = ensure_secret()
    assert new
    assert stat.S_IMODE(secret_file().stat().st_mode) == 0o600
    assert ensure_secret() == (first, False)
    assert read_secret() == first
    monkeypatch.setenv("PREFECT_HOME", str(home.with_name("other")))
    second, _ = ensure_secret()
    user, _, password = second.partition(":")
    assert user == "adflows"
    assert len(password) >= 32
    assert second != first


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_read_is_refused(mode: int) -> None:
    ensure_secret()
    secret_file().chmod(mode)
    with pytest.raises(ConfigError, match="only its owner"):
        read_secret()


def test_a_secret_is_sent_to_the_running_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, _ = ensure_secret()
    use_running_server()
    assert "PREFECT_API_URL" not in os.environ
    with only_server(URL, own_secret=True):
        assert running_server() == (URL, True)
        with monkeypatch.context() as here:
            here.setenv("PREFECT_API_URL", "http://127.0.0.1:4322/api")
            use_running_server()
            assert CLIENT_VARIABLE not in os.environ
        with monkeypatch.context() as here:
            here.setenv("PREFECT_API_URL", "http://localhost:4321/api")
            use_running_server()
            assert os.environ.pop(CLIENT_VARIABLE) == secret
        with monkeypatch.context() as here:
            here.setenv(CLIENT_VARIABLE, "me:mine")
            use_running_server()
            assert os.environ[CLIENT_VARIABLE] == "me:mine"
            assert os.environ.pop("PREFECT_API_URL") == URL
        use_running_server()
        assert (os.environ.pop("PREFECT_API_URL"), os.environ.pop(CLIENT_VARIABLE)) == (URL, secret)
        with pytest.raises(ConfigError, match="another adflows server"), only_server(URL, own_secret=True):
            pass
    assert running_server() is None
    with only_server(URL, own_secret=False):  # the environment of the server has a secret of its own
        use_running_server()
    assert os.environ.pop("PREFECT_API_URL") == URL
    assert CLIENT_VARIABLE not in os.environ


@pytest.fixture
def open_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a home in a folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="adflows-secret-"))
    folder.chmod(0o755)
    monkeypatch.setenv("PREFECT_HOME", str(folder / "home"))
    yield folder / "home"
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_user_does_not_get_the_secret(open_home: Path) -> None:
    ensure_secret()
    open_home.chmod(0o755)
    script = (
        "from flows.machine.own_server import read_secret, running_server\n"
        "print(running_server())\n"
        "read_secret()\n"
    )  # fmt: skip
    with only_server(URL, own_secret=True):
        done = subprocess.run(
            ["setpriv", "--reuid=nobody", "--clear-groups", sys.executable, "-c", script],
            env={"PREFECT_HOME": str(open_home), "PYTHONPATH": str(product_folder())},
            capture_output=True, text=True, check=False, encoding="utf-8",
        )  # fmt: skip
    assert done.stdout == "None\n"
    assert "the secret cannot be read (PermissionError)" in done.stderr
