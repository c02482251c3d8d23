"""Two machines on this one: network namespaces with a cable between them. They share the file system.

Each machine has its own host name, its own address and its own device slots. Nothing listens outside of them.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import secrets
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flows.machine.environment import product_folder
from flows.server.serve import SERVER_SETTINGS
from tests.flows.live_server import HANGS_S, family, kill_marked, wait_for

ADDRESSES = {"left": "10.77.0.1", "right": "10.77.0.2"}
"""Machine -> its address."""
API_PORT, DASK_PORT, RAY_PORT = 4421, 4422, 4423
RAY_CLIENT_PORT = 4424
MARK = "ADFLOWS_TEST_MARK"
DASK = (sys.executable, "-m", "dask")
NO_DASHBOARD = ("--dashboard-address", "127.0.0.1:0")
RAY_SIZE = ("--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000")
TLS = "DASK_DISTRIBUTED__COMM__TLS__"


def why_not() -> str:
    """Return why network namespaces cannot be made here. Returns an empty text if they can."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        return "needs root and the programs ip, unshare and hostname"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "this system forbids network namespaces"


def write_certificates(folder: Path) -> dict[str, str]:
    """Write an authority and a certificate of it. Return the environment that makes Dask use them."""
    folder.mkdir(parents=True, exist_ok=True)
    key, authority_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    now = datetime.datetime.now(datetime.UTC)

    def signed(name: x509.Name, public: ec.EllipticCurvePublicKey, *, authority: bool) -> x509.Certificate:
        draft = x509.CertificateBuilder(authority_name, name, public, x509.random_serial_number())
        draft = draft.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        draft = draft.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        hosts = [x509.IPAddress(ipaddress.ip_address(address)) for address in ADDRESSES.values()]
        return draft.add_extension(x509.SubjectAlternativeName(hosts), critical=False).sign(
            authority_key, hashes.SHA256()
        )

    pem = serialization.Encoding.PEM
    texts = {
        "authority.pem": signed(authority_name, authority_key.public_key(), authority=True).public_bytes(pem),
        "machine.pem": signed(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "machine")]), key.public_key(), authority=False
        ).public_bytes(pem),
        "machine.key": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    found = {f"{TLS}CA_FILE": str(folder / "authority.pem"), "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        found |= {f"{TLS}{role}__CERT": str(folder / "machine.pem"), f"{TLS}{role}__KEY": str(folder / "machine.key")}
    return found


def write_token(folder: Path) -> dict[str, str]:
    """Write a token for Ray. Return the environment that makes Ray use it."""
    path = folder / "ray-token"
    path.write_text(secrets.token_hex(32), encoding="utf-8")
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "RAY_worker_niceness": "0",
    }


@dataclass
class TwoMachines:
    """Two machines, and the processes that were started on them."""

    root: Path
    """Folder that both see, with the cache."""
    more: dict[str, str] = field(default_factory=dict)
    """Environment variables of both."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def api(self) -> str:
        return f"http://{ADDRESSES['left']}:{API_PORT}/api"

    def namespace(self, machine: str) -> str:
        return f"adf-{self.mark[:6]}-{machine}"

    def environment(self, machine: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "ADFLOWS", "RAY"))}
        own = {
            "PREFECT_HOME": str(self.root / "home" / machine),
            "PREFECT_API_URL": self.api,
            "ADFLOWS_HOSTS": ADDRESSES["left"],
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "ADFLOWS_CACHE": str(self.root / "cache"),
            "ADFLOWS_SLOTS": str(self.root / "slots" / machine),
            "ADFLOWS_PRIVATE": str(self.root / "private"),
            "ADFLOWS_RUNS": str(self.root / "runs"),
            "PYTHONPATH": str(product_folder()),
            "OMP_NUM_THREADS": "1",
            **dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(["127.0.0.1", "localhost", *ADDRESSES.values()])),
            MARK: self.mark,
        }
        return kept | SERVER_SETTINGS | own | self.more

    def command(self, machine: str, *command: str, hide: Path | None = None) -> list[str]:
        """Return the command that runs a command on a machine. `hide` is a folder that is not mounted there."""
        script = f"hostname {machine} && "
        if hide is not None:
            script += f"mount -t tmpfs none '{hide}' && "
        inside = ["unshare", "--uts", "--mount", "sh", "-c", f'{script}exec "$@"', "sh", *command]
        return ["ip", "netns", "exec", self.namespace(machine), *inside]

    def start(
        self, machine: str, *command: str, log: str, hide: Path | None = None, more: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on a machine. Its output goes to root/LOG."""
        with (self.root / log).open("ab") as out:
            process = subprocess.Popen(
                self.command(machine, *command, hide=hide),
                env=self.environment(machine) | dict(more or {}), cwd=self.root, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(
        self, machine: str, *command: str, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine and return its end."""
        return subprocess.run(
            self.command(machine, *command), env=self.environment(machine) | dict(more or {}), cwd=self.root,
            capture_output=True, encoding="utf-8", timeout=HANGS_S, check=False,
        )  # fmt: skip

    def adflows(
        self, machine: str, *arguments: object, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of adflows on a machine."""
        return self.run(machine, sys.executable, "-m", "flows", *map(str, arguments), more=more)

    def log(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8", errors="replace")

    def start_server(self) -> None:
        """Start a Prefect server on the left machine."""
        where = {"PREFECT_SERVER_API_HOST": ADDRESSES["left"], "PREFECT_SERVER_API_PORT": str(API_PORT)}
        process = self.start("left", sys.executable, "-m", "flows.server.app", log="server.log", more=where)
        probe = f"import urllib.request; urllib.request.urlopen('{self.api}/health', timeout=5)"
        wait_for(
            "the server answers",
            lambda: process.poll() is not None or self.run("right", sys.executable, "-c", probe).returncode == 0,
            180,
        )
        assert process.poll() is None, self.log("server.log")

    def start_dask(self) -> str:
        """Start a scheduler of Dask, with TLS. Return its address."""
        where = ["--protocol", "tls", "--host", ADDRESSES["left"], "--port", str(DASK_PORT)]
        self.start("left", *DASK, "scheduler", *where, *NO_DASHBOARD, log="scheduler.log")
        return f"tls://{ADDRESSES['left']}:{DASK_PORT}"

    def start_dask_worker(
        self, machine: str, log: str, hide: Path | None = None, more: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a worker of Dask for the scheduler, and wait until it has joined."""
        scheduler = f"tls://{ADDRESSES['left']}:{DASK_PORT}"
        options = ["--host", ADDRESSES[machine], "--nthreads", "1", "--resources", "GPU=1", *NO_DASHBOARD]
        more = {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"} | dict(more or {})
        process = self.start(machine, *DASK, "worker", scheduler, *options, log=log, hide=hide, more=more)
        wait_for("the worker joins", lambda: "Registered to" in self.log(log), 90)
        return process

    def start_ray(self) -> str:
        """Start the head of a Ray cluster on the left machine and a node on the right one. Return its address."""
        head = ["--head", f"--port={RAY_PORT}", f"--ray-client-server-port={RAY_CLIENT_PORT}"]
        where = {
            "left": [*head, "--include-dashboard=false"],
            "right": [f"--address={ADDRESSES['left']}:{RAY_PORT}"],
        }
        Path("/tmp/ray").mkdir(exist_ok=True)
        for machine, options in where.items():
            folder, log = self.root / "ray-folders" / machine, f"ray-{machine}.log"
            folder.mkdir(parents=True, exist_ok=True)
            own = [f"--node-ip-address={ADDRESSES[machine]}", *RAY_SIZE, "--block"]
            start = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *own]
            mount = ["sh", "-c", f"mount --bind '{folder}' /tmp/ray && exec \"$@\"", "sh"]
            self.start(machine, *mount, *start, log=log)
            wait_for("Ray runs", lambda log=log: "Ray runtime started" in self.log(log), 120)  # type: ignore[misc]
        return f"ray://{ADDRESSES['left']}:{RAY_CLIENT_PORT}"

    def end(self, processes: Iterable[subprocess.Popen[bytes]]) -> None:
        """End processes that were started here, with all that they started."""
        for process in processes:
            members = family(process.pid) | {process.pid}
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(30)

    def close(self) -> None:
        self.end(reversed(self.started))
        kill_marked(self.mark)


@contextlib.contextmanager
def two_machines(root: Path, **more: str) -> Iterator[TwoMachines]:
    """Yield two machines that reach each other. They and their processes end with the `with` block."""
    machines = TwoMachines(root, more)
    root.mkdir(parents=True, exist_ok=True)
    names = {machine: machines.namespace(machine) for machine in ADDRESSES}

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for machine, name in names.items():
            (root / "home" / machine).mkdir(parents=True, exist_ok=True)
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            names["left"],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names["right"],
        )
        for machine, name in names.items():
            ip("-n", name, "address", "add", f"{ADDRESSES[machine]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield machines
    finally:
        machines.close()
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False)
