"""The environment of Prefect's clients: this user's server on this machine, and its secret.

The first start writes a random secret to PREFECT_HOME, in a file that only its owner can read. The server, the worker,
`adflows deploy` and all other commands of this user read it from there. Other users need it for the UI and the API.
Whoever has it can run programs as the server's user.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from flows.machine.environment import (
    LIBRARY_DEFAULTS,
    LOCAL_HOSTS,
    PREFECT_DEFAULTS,
    collect_rarely,
    prefect_home,
    prepare_numpy,
)
from flows.machine.locks import try_lock
from medad.base.errors import ConfigError

SERVER_VARIABLE, CLIENT_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"
_SECRET, _LOCK = "adflows-secret", "adflows-serve.lock"
_USER = "adflows"


def secret_file() -> Path:
    """Return the path of the secret."""
    return prefect_home() / _SECRET


def read_secret() -> str | None:
    """Return the secret USER:PASSWORD. None: no server of this user has been started.

    Raises
    ------
    ConfigError
        The file cannot be read, or other users can read or change it.
    """
    path = secret_file()
    try:
        with path.open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            text = file.read().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the secret cannot be read ({type(error).__name__})") from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path}: only its owner may have access to the secret; delete the file to get a new one")
    if ":" not in text:
        raise ConfigError(f"{path}: expected USER:PASSWORD; delete the file to get a new one")
    return text


def ensure_secret() -> tuple[str, bool]:
    """Return the secret, and whether it is new. Raises ConfigError as `read_secret` does."""
    if (known := read_secret()) is not None:
        return known, False
    path = secret_file()
    secret = f"{_USER}:{secrets.token_urlsafe(24)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:  # another process was faster
        return ensure_secret()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); change PREFECT_HOME") from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secret + "\n")
    return secret, True


@contextlib.contextmanager
def only_server(url: str, *, own_secret: bool) -> Iterator[None]:
    """Hold the lock of the database, and publish the server's address in it while the server runs.

    Two servers on one database would both run its schedules. Commands of this user find the server by the lock.
    `own_secret` says whether the server uses the secret of `ensure_secret`.

    Raises
    ------
    ConfigError
        Another server uses the database, or its folder cannot be written to.
    """
    home = prefect_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{home}: cannot be written to ({error.strerror}); change PREFECT_HOME") from error
    try:
        if not try_lock(descriptor):
            raise ConfigError(f"{home}: another adflows server uses this database; change PREFECT_HOME")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"url": url, "own_secret": own_secret}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def running_server() -> tuple[str, bool] | None:
    """Return the API's address of this user's server with this PREFECT_HOME, and whether it uses the file's secret.

    None: no such server runs.
    """
    try:
        with (prefect_home() / _LOCK).open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            if not try_lock(file.fileno(), shared=True):
                values = json.load(file)
                return str(values["url"]), bool(values["own_secret"])
    except (OSError, ValueError, KeyError):
        return None
    return None


def use_running_server() -> None:
    """Let commands use this user's running server and its secret, unless the environment names others.

    The secret is only sent to that server: at any other address, another user may listen.
    """
    if (running := running_server()) is None:
        return
    address, own_secret = running
    url = os.environ.setdefault("PREFECT_API_URL", address)
    same = own_secret and _place(url) == _place(address)
    if same and CLIENT_VARIABLE not in os.environ and (secret := read_secret()) is not None:
        os.environ[CLIENT_VARIABLE] = secret


def _place(url: str) -> tuple[str | None, int | None]:
    parts = urlsplit(url)
    host = LOCAL_HOSTS[0] if parts.hostname in LOCAL_HOSTS else parts.hostname
    with contextlib.suppress(ValueError):
        return host, parts.port
    return host, None


def prepare_prefect(*, verbose: bool = False) -> None:
    """Set the environment that Prefect and the computing libraries read at their import. Call this before.

    Variables that the user has set take precedence. If this user's server runs on this machine, it is used.

    Raises
    ------
    ConfigError
        The secret of that server cannot be used.
    """
    collect_rarely()
    prepare_numpy()
    use_running_server()
    for name, value in (PREFECT_DEFAULTS | LIBRARY_DEFAULTS).items():
        os.environ.setdefault(name, value)
    # requests to a server on this machine must not go through a proxy
    for name in ("no_proxy", "NO_PROXY"):
        if proxied := os.environ.get(name, os.environ.get(name.swapcase(), "")):
            missing = [host for host in LOCAL_HOSTS if host not in proxied.split(",")]
            os.environ[name] = ",".join([proxied, *missing])
        else:
            os.environ[name] = ",".join(LOCAL_HOSTS)
    # for the console only: the server still gets every log line
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if verbose else "CRITICAL")
