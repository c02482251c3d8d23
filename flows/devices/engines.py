"""What carries a run's tasks: threads of its own process, or the workers of Dask or Ray, as its settings say.

A task runner belongs to a flow before its parameters are known, so the flows have one that becomes the chosen engine's
when the first of them is. A step that needs a device asks the engine for the resource GPU; that no two are on one
device, also of different runs, is up to the slots of `flows.devices.slots` on each machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.devices.slots import allowed_devices
from flows.machine.environment import worker_count
from flows.store.step import Call
from medad.base.errors import ConfigError
from medad.base.settings import ANY_MACHINE, MachineSettings

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import RunInput

GPU_RESOURCE = "GPU"
"""The resource that a Dask worker offers for each device it may use; Ray has one of this name already."""
LOCALHOST = "127.0.0.1"
RAY_DEFAULTS = {
    # nothing leaves the machine
    "RAY_USAGE_STATS_ENABLED": "0",
    # which GPU a task has is up to its slot
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}
RAY_OWN_CLUSTER = {
    # what Ray does on desktop systems: its own cluster of one machine talks on 127.0.0.1 and not on all addresses
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # as nice as the run itself, like threads and Dask's workers: at Ray's own 15 its steps starve on a busy machine
    "RAY_worker_niceness": "0",
}
"""Both only where the environment is silent, and read at Ray's import."""

AnyTaskRunner = TaskRunner[PrefectFuture[Any]]


class EngineTaskRunner(AnyTaskRunner):
    """The task runner of every flow."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._chosen: AnyTaskRunner | None = None
        self._stack = contextlib.ExitStack()
        self._engine = "threads"

    def duplicate(self) -> EngineTaskRunner:
        return type(self)()

    def use(self, machine: MachineSettings) -> None:
        """Start the engine that the settings name; once in a flow. Raises ConfigError."""
        if self._chosen is None:
            self._chosen = self._stack.enter_context(_start_engine(machine))
            self._engine = machine.engine

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

    def cancel_all(self) -> None:
        """Cancel what has not begun."""
        if isinstance(self._chosen, ThreadPoolTaskRunner):
            self._chosen.cancel_all()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        try:
            self._stack.__exit__(exc_type, exc_value, traceback)
        finally:
            self._chosen = None
            super().__exit__(exc_type, exc_value, traceback)


TASK_RUNNER = EngineTaskRunner()


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

    # a worker starts processes for its devices, which daemons may not
    dask.config.set({"distributed.worker.daemon": False})
    devices = len(allowed_devices(machine.gpus))
    specification = {
        number: {
            "cls": Nanny,
            "options": {"nthreads": 1, "host": LOCALHOST, "dashboard_address": None, "dashboard": False}
            | ({"resources": {GPU_RESOURCE: 1}} if number < devices else {}),
        }
        for number in range(max(workers, devices))
    }
    scheduler = {"cls": Scheduler, "options": {"host": LOCALHOST, "dashboard_address": None, "dashboard": False}}
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
    """Within, what is submitted asks the engine for a device, or for none."""
    if engine == "dask" and wanted:
        import dask

        with dask.annotate(resources={GPU_RESOURCE: 1}):
            yield
    elif engine == "ray":
        from prefect_ray.context import remote_options

        # unlimited calls: by default Ray ends a worker after each task that had a GPU, lest it keep the memory.
        # Here only steps' processes touch it, and a new worker has to load the libraries before each step
        with remote_options(num_cpus=1, num_gpus=1 if wanted else 0, max_calls=0):
            yield
    else:
        yield
