"""A real Prefect server and worker in new processes, and flows that wait until a test releases them."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from flows.machine.environment import product_folder
from flows.server.serve import SERVER_SETTINGS

HOST = "testbox"
POOL = "testpool"
HANGS_S = 1200.0
"""Time after which a process counts as hanging, even on a busy machine. On an idle one, none takes two minutes."""
MARK = "ADFLOWS_TEST_MARK"
"""Variable in the environment of every process that a test starts, to find those that are left."""

HELD = '''
import os, time
from pathlib import Path
from prefect import flow, get_run_logger
from flows.runs.server_answer import wait_for_server
from flows.server.overlap import one_at_a_time

FOLDER = Path(os.environ["HELD"])

def wait(mark: str) -> None:
    (FOLDER / f"{mark}.began").touch()
    while not (FOLDER / f"{mark}.go").exists():
        get_run_logger().info("still here")
        print("on standard output", flush=True)
        time.sleep(0.5)

@flow(name="liver-held", flow_run_name="held {mark}", persist_result=False)
def alone(mark: str) -> None:
    """Wait until the test releases the flow, and at its end for the server, as every flow of ours does."""
    wait(mark)
    wait_for_server()

@flow(name="liver-held", flow_run_name="held {mark}", persist_result=False)
def queued(mark: str) -> None:
    """Wait until the test releases the flow. Runs of this flow wait for each other."""
    with one_at_a_time("held", "wait"):
        wait(mark)

@flow(name="liver-quick", persist_result=False)
def quick() -> None:
    """Do nothing."""

@flow(name="liver-failing", persist_result=False)
def failing() -> None:
    """Fail."""
    raise RuntimeError("out of coffee")

@flow(name="others", persist_result=False)
def others() -> None:
    """Fail. This flow does not belong to adflows."""
    raise RuntimeError("not our business")
'''
MODULE = "adflows_held_flows"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def waited_for_cpu_s() -> float:
    """Return the seconds in which processes of this machine waited for a CPU. 0: the kernel does not count."""
    with contextlib.suppress(OSError):
        some = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()[0]
        return int(some.rpartition("total=")[2]) / 1e6
    return 0.0


def wait_for(what: str, true: Callable[[], Any], seconds: float = 60.0, pause_s: float = 0.2) -> Any:
    """Wait until `true()` gives a true value, and return it. Use a short pause if the moment matters.

    The limit is for an idle machine. Time in which programs wait for a CPU counts one tenth, so that a slow machine is
    not taken for a hanging process.
    """
    spent, now, waited = 0.0, time.monotonic(), waited_for_cpu_s()
    while spent < seconds:
        if found := true():
            return found
        time.sleep(pause_s)
        before, now = now, time.monotonic()
        busy, waited = waited_for_cpu_s() - waited, waited_for_cpu_s()
        spent += now - before - 0.9 * min(busy, now - before)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def processes(mark: str) -> dict[int, str]:
    """Return ids and commands of all living processes with a test's mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # a zombie has no command
                    found[int(folder.name)] = command
    return found


def kill_marked(mark: str) -> None:
    """Kill the remaining processes of a test, even if their parent has changed."""
    for pid in processes(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def family(pid: int) -> set[int]:
    """Return a process and its living descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found = {pid} & parents.keys()
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Return the addresses and ports on which these processes listen."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                host, _, port = local.partition(":")
                words = bytes.fromhex(host)  # each word is in the byte order of the machine
                raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                address = ipaddress.ip_address(raw)
                found.add((str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)))
    return found


@dataclass
class Live:
    """A site: the folder of a server, and its running processes."""

    root: Path
    database: str | None = None
    """Connection URL of the database. None: SQLite in the folder."""
    more: dict[str, str] = field(default_factory=dict)
    """Additional environment variables."""
    port: int = field(default_factory=free_port)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Processes of the Prefect servers, in the order in which they were started."""
    answers: list[list[dict[str, str]]] = field(default_factory=list)
    """Answers of `adflows deploy`, in order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def held(self) -> Path:
        return self.root / "held"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment, without the developer's Prefect and the tests' embedded server."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "ADFLOWS"))}
        values = {
            "PREFECT_HOME": str(self.root / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "ADFLOWS_CACHE": str(self.root / "cache"),
            "ADFLOWS_SLOTS": str(self.root / "slots"),
            "ADFLOWS_RUNS": str(self.root / "runs"),
            "ADFLOWS_CONFIGS": str(self.root / "configs"),
            "ADFLOWS_PRIVATE": str(self.root / "private"),
            "PYTHONPATH": os.pathsep.join([str(product_folder()), str(self.root / "checkout")]),
            "HELD": str(self.held),
            "ADFLOWS_DEPLOYMENTS": str(self.root / "checkout" / "prefect.yaml"),
            MARK: self.mark,
        }
        database = {} if self.database is None else {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database}
        return kept | SERVER_SETTINGS | values | database | self.more

    def start(self, *command: str, log: str) -> subprocess.Popen[bytes]:
        """Start a process of this site. Its output goes to root/LOG."""
        self.held.mkdir(parents=True, exist_ok=True)
        with (self.root / log).open("ab") as out:
            process = self._popen(command, out)
        self.started.append(process)
        return process

    def _popen(self, command: tuple[str, ...], out: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command], env=self.environment, cwd=self.root, stdout=out, stderr=subprocess.STDOUT
        )

    def log(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8", errors="replace")

    def start_server(self) -> subprocess.Popen[bytes]:
        process = self.start("-m", "flows.server.app", log="server.log")
        wait_for("the server answers", lambda: process.poll() is not None or self.healthy(), 180)
        assert process.poll() is None, self.log("server.log")
        self.servers.append(process)
        return process

    def kill_server(self) -> None:
        self.servers[-1].kill()
        self.servers[-1].wait(30)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def adflows(self, *arguments: str, code: int = 0, seconds: float = HANGS_S) -> str:
        """Run an adflows command and return its output."""
        done = self._done("-m", "flows", *arguments, seconds=seconds)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    def python(self, script: str) -> str:
        """Run a script as a client of this site's server and return its output."""
        own = f"import os; os.environ['PREFECT_API_AUTH_STRING'] = {self.secret!r}\n" if self.secret else ""
        done = self._done("-c", own + script)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _done(self, *command: str, seconds: float = HANGS_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            encoding="utf-8",
        )

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start `adflows worker` and wait until it polls."""
        process = self.start("-m", "flows", "worker", "--pool", POOL, "--host-name", HOST, log="worker.log")
        wait_for("the worker polls", lambda: f"Worker '{HOST}' started" in self.log("worker.log"), 90)
        return process

    def deploy(self, *arguments: str) -> list[dict[str, str]]:
        """Run `adflows deploy` and return its answer."""
        text = self.adflows("deploy", "--pool", POOL, "--host-name", HOST, "--json", *arguments)
        self.answers.append(json.loads(text))
        return self.answers[-1]

    def deploy_held(self) -> None:
        """Deploy flows that wait, with the limits and the queue of prefect.yaml."""
        folder = self.root / "checkout"
        folder.mkdir(exist_ok=True)
        (folder / f"{MODULE}.py").write_text(HELD, encoding="utf-8")
        values = yaml.safe_load((product_folder() / "prefect.yaml").read_text(encoding="utf-8"))
        ours = {entry["name"]: entry | {"parameters": {}, "schedules": []} for entry in values["deployments"]}
        # off: one process per minute would be half the load of a busy machine
        cron = [{"slug": "now", "cron": "* * * * *", "timezone": "{{ $ADFLOWS_TIMEZONE }}", "active": False}]
        values["deployments"] = [
            ours["liver-nightly"] | {"name": "queued", "entrypoint": f"{MODULE}.queued"},
            ours["segment-inbox"] | {"name": "alone", "entrypoint": f"{MODULE}.alone"},
            ours["liver-nightly"] | {"name": "cron", "entrypoint": f"{MODULE}.quick", "schedules": cron},
            ours["liver-nightly"] | {"name": "failing", "entrypoint": f"{MODULE}.failing"},
            ours["liver-nightly"] | {"name": "others", "entrypoint": f"{MODULE}.others"},
        ]
        (folder / "prefect.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        self.python(
            "import asyncio; from pathlib import Path; from flows.server.deploy import Site, deploy\n"
            f"asyncio.run(deploy(Site(Path({str(folder)!r}), Path({str(folder)!r}), {POOL!r}, {HOST!r}, 30)))"
        )

    @contextlib.contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with SyncPrefectClient(self.url, auth_string=self.secret) as client:
            yield client

    @property
    def secret(self) -> str | None:
        """Return the secret of the site's server. None: it has none."""
        file = self.root / "home" / "adflows-secret"
        return file.read_text(encoding="utf-8").strip() if file.exists() else None

    def ask(self, deployment: str, **parameters: Any) -> FlowRun:
        """Create a run as the UI does when a form is sent."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters)

    def run_of(self, run: FlowRun) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(run.id)

    def state_of(self, run: FlowRun) -> str:
        state = self.run_of(run).state
        return "" if state is None or state.name is None else state.name

    def ended(self, run: FlowRun, seconds: float = 120.0) -> FlowRun:
        """Return a run after it has ended."""

        def final() -> FlowRun | None:
            found = self.run_of(run)
            return found if found.state is not None and found.state.is_final() else None

        found: FlowRun = wait_for(f"run {run.name} ends", final, seconds)
        return found

    def began(self, mark: str) -> None:
        wait_for(f"the flow {mark} began", (self.held / f"{mark}.began").exists)

    def let_go(self, mark: str) -> None:
        (self.held / f"{mark}.go").touch()

    def close(self) -> None:
        """End all processes, those that depend on others first."""
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(120)
        kill_marked(self.mark)
        for process in self.started:
            process.wait(30)


@contextlib.contextmanager
def live(root: Path, **more: Any) -> Iterator[Live]:
    """Yield a site. Its processes end with the `with` block."""
    site = Live(root, **more)
    try:
        yield site
    finally:
        site.close()


def postgres_bin() -> Path | None:
    """Return the folder of PostgreSQL's programs. None: it is not installed."""
    candidates = [Path(found).resolve().parent for found in (shutil.which("initdb"),) if found]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in candidates if (folder / "postgres").is_file()), None)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Start a new database cluster and yield its connection URL."""
    programs = postgres_bin()
    assert programs is not None
    port = free_port()
    root = os.geteuid() == 0
    # it refuses to run as root, and another user cannot read pytest's folders
    user: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if root else {}
    with tempfile.TemporaryDirectory(prefix="adflows-pg-", ignore_cleanup_errors=True) as folder:
        if root:
            shutil.chown(folder, "nobody", "nogroup")
        data = f"{folder}/data"
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
        initdb = [str(programs / "initdb"), "-D", data, "-A", "trust", "-U", "adflows", "--no-sync"]
        subprocess.run(initdb, check=True, **quiet, **user)
        listen = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
        server = subprocess.Popen([str(programs / "postgres"), "-D", data, "-p", str(port), *listen], **quiet, **user)
        try:
            ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
            wait_for("PostgreSQL answers", lambda: subprocess.run(ready, check=False, **quiet).returncode == 0)
            yield f"postgresql+asyncpg://adflows@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
