"""Engines that run the tasks of a run: threads of its process, or workers of Dask or Ray.

Prefect needs the task runner of a flow before the flow's parameters are known. `EngineTaskRunner` therefore starts the
engine that the settings name when the first task needs it. A device step requests the resource GPU from the engine.

The slots of `flows.devices.slots` make sure that each device runs one step at a time, also across runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.devices.cluster import GPU_RESOURCE, RunNeeds, check_dask, check_ray, unprotected
from flows.devices.slots import allowed_devices
from flows.machine.environment import worker_count
from flows.machine.terminal import terminal
from flows.store.step import Call
from medad.base.errors import ConfigError
from medad.base.settings import ANY_MACHINE, MachineSettings

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import RunInput

_log = logging.getLogger(__name__)
LOCALHOST = "127.0.0.1"
ON_THIS_MACHINE = {"host": LOCALHOST, "dashboard_address": f"{LOCALHOST}:0", "dashboard": False}
"""Options of a scheduler and its workers that nobody else can reach. Dask serves figures even without a dashboard."""
ANSWER_S = 10.0
"""Time within which a cluster's address must accept a connection."""
RAY_DEFAULTS = {
    # nothing leaves the machine
    "RAY_USAGE_STATS_ENABLED": "0",
    # the slot decides which GPU a task uses
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}
RAY_OWN_CLUSTER = {
    # as on desktop systems: a cluster on one machine listens on 127.0.0.1, not on all addresses
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # the same priority as the run; at Ray's default niceness of 15, steps starve on a busy machine
    "RAY_worker_niceness": "0",
}
"""Environment of a cluster that this run starts. Ray reads both at its import; existing variables take precedence."""

AnyTaskRunner = TaskRunner[PrefectFuture[Any]]


class EngineTaskRunner(AnyTaskRunner):
    """The task runner of every flow. It passes tasks on to the engine that the settings name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._chosen: AnyTaskRunner | None = None
        self._stack = contextlib.ExitStack()
        self._engine = "threads"

    def duplicate(self) -> EngineTaskRunner:
        return type(self)()

    def use(self, machine: MachineSettings, needs: RunNeeds | None = None) -> None:
        """Start the engine that the settings name, once per flow. Check the workers of a running cluster.

        Raises
        ------
        ConfigError
            The engine is not installed, nothing answers at its address, or a worker lacks one of the `needs`.
        """
        if self._chosen is not None:
            return
        if machine.engine_address is None or machine.engine == "threads":
            self._chosen = self._stack.enter_context(_start_engine(machine))
        else:
            self._chosen = self._connect(machine, machine.engine_address, needs)
        self._engine = machine.engine

    def _connect(self, machine: MachineSettings, address: str, needs: RunNeeds | None) -> AnyTaskRunner:
        require_answer(address)
        if warning := unprotected(machine.engine, address):
            terminal.line(warning)
            _log.warning(warning)
        try:
            chosen: Any = self._stack.enter_context(_start_engine(machine))
            if needs is not None:
                if machine.engine == "dask":
                    check_dask(chosen.client, needs)
                else:
                    check_ray(needs)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ConfigError(f"engine_address: no {machine.engine} cluster answers at {address} ({reason})") from error
        return cast("AnyTaskRunner", chosen)

    def submit(
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> PrefectFuture[Any]:
        if self._chosen is None:
            self.use(ANY_MACHINE)
        assert self._chosen is not None
        call = parameters.get("call")
        with _requesting_device(self._engine, isinstance(call, Call) and call.step.kind is not None):
            return self._chosen.submit(task, parameters, wait_for, dependencies)

    @property
    def in_this_process(self) -> bool:
        """Return whether tasks run in threads of this process."""
        return self._engine == "threads"

    def cancel_all(self) -> None:
        """Cancel tasks that have not begun."""
        if isinstance(self._chosen, ThreadPoolTaskRunner):
            self._chosen.cancel_all()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        try:
            self._stack.__exit__(exc_type, exc_value, traceback)
        finally:
            self._chosen = None
            super().__exit__(exc_type, exc_value, traceback)


TASK_RUNNER = EngineTaskRunner()


def require_answer(address: str) -> None:
    """Raise ConfigError unless a program listens at the address of a cluster. The engines take minutes to say so."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise ConfigError(f"engine_address: {address} is not an address such as tls://HOST:8786 or ray://HOST:10001")
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"engine_address: {address} does not answer ({reason}); is the cluster running?") from error


def _start_engine(machine: MachineSettings) -> AnyTaskRunner:
    workers = machine.engine_workers or worker_count()
    if machine.engine == "threads":
        return cast("AnyTaskRunner", ThreadPoolTaskRunner(max_workers=workers))
    start = {"dask": _dask_runner, "ray": _ray_runner}[machine.engine]
    try:
        return start(machine, workers)
    except ImportError as error:
        raise ConfigError(
            f"engine: {machine.engine} is not installed here; pip install 'adflows[{machine.engine}]'"
        ) from error


def _dask_runner(machine: MachineSettings, workers: int) -> AnyTaskRunner:
    from prefect_dask import DaskTaskRunner

    if machine.engine_address is not None:
        return cast("AnyTaskRunner", DaskTaskRunner(address=machine.engine_address))
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    # a worker starts child processes for its devices; a daemon process cannot
    dask.config.set({"distributed.worker.daemon": False})
    devices = len(allowed_devices(machine.gpus))
    specification = {
        number: {
            "cls": Nanny,
            "options": {"nthreads": 1, **ON_THIS_MACHINE}
            | ({"resources": {GPU_RESOURCE: 1}} if number < devices else {}),
        }
        for number in range(max(workers, devices))
    }
    scheduler = {"cls": Scheduler, "options": ON_THIS_MACHINE}
    return cast(
        "AnyTaskRunner",
        DaskTaskRunner(cluster_class=SpecCluster, cluster_kwargs={"workers": specification, "scheduler": scheduler}),
    )


def _ray_runner(machine: MachineSettings, workers: int) -> AnyTaskRunner:
    for name, value in (RAY_DEFAULTS | (RAY_OWN_CLUSTER if machine.engine_address is None else {})).items():
        os.environ.setdefault(name, value)
    from prefect_ray import RayTaskRunner

    if machine.engine_address is not None:
        return cast("AnyTaskRunner", RayTaskRunner(address=machine.engine_address))
    devices = len(allowed_devices(machine.gpus))
    options = {
        "num_cpus": max(workers, devices),
        "num_gpus": devices,
        "include_dashboard": False,
        "log_to_driver": False,
    }
    return cast("AnyTaskRunner", RayTaskRunner(init_kwargs=options))


@contextlib.contextmanager
def _requesting_device(engine: str, wanted: bool) -> Iterator[None]:
    """Make tasks that are submitted inside the `with` block request a device from the engine, or none."""
    if engine == "dask" and wanted:
        import dask

        with dask.annotate(resources={GPU_RESOURCE: 1}):
            yield
    elif engine == "ray":
        from prefect_ray.context import remote_options

        # unlimited calls: by default Ray ends a worker after each GPU task so that the GPU's memory is freed.
        # Here only child processes use the GPU, and a new worker would load the libraries for each step
        with remote_options(num_cpus=1, num_gpus=1 if wanted else 0, max_calls=0):
            yield
    else:
        yield
