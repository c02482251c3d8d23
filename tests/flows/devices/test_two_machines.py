"""Runs on two machines: the same results as on one, nothing lost with a machine, and refusals in one line."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.live_server import HANGS_S, family, wait_for
from tests.flows.two_machines import TLS, TwoMachines, two_machines, why_not, write_certificates, write_token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.skipif(bool(why_not()), reason=why_not())]

MEASURED = re.compile(r"seconds|memory|_s$|_s_")
"""Names of values that a run measures: times, and the largest memory of a process."""
MEASURING = {"manifest.json", "report.html", "report.json", "curve.json", "summary.csv", "systems.csv"}
"""Files with such values. All others are equal byte by byte."""
REPORTS = {"report", "zsad-compare"}
"""Steps that show such values."""
SYSTEMS = [{"system": "clip"}, {"system": "winclip"}, {"system": "dual"}]


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any], new_images: Callable[..., Any]
) -> Iterator[Site]:
    """Yield two machines with a server and data, and the results of a run with threads on one of them."""
    root = tmp_path_factory.mktemp("site")
    world, images = new_world(root / "ct", train=1, test=2), new_images(root / "images")
    values = yaml.safe_load(images.config.read_text(encoding="utf-8"))
    values["encoders"] = {"main": values.pop("encoder")}
    values["systems"] = SYSTEMS
    del values["method"], values["maps"]
    images.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    with two_machines(root, **write_certificates(root / "tls"), **write_token(root)) as machines:
        machines.start_server()
        made = Site(machines, world.config, images.config)
        for command in made.commands:
            made.run(command, "threads", cache=root / "alone")
        yield made


class Site:
    """Two machines and what runs on them."""

    def __init__(self, machines: TwoMachines, liver: Path, images: Path) -> None:
        self.machines = machines
        self.commands = (("liver", "run", str(liver)), ("zsad", "compare", str(images)))

    def arguments(self, command: tuple[str, ...], name: str, *more: str) -> list[str]:
        return [*command, "--json", "--out", str(self.machines.root / name), *more]

    def run(self, command: tuple[str, ...], name: str, *more: str, cache: Path | None = None) -> dict[str, Any]:
        own = {} if cache is None else {"ADFLOWS_CACHE": str(cache)}
        done = self.machines.adflows("left", *self.arguments(command, name, *more), more=own)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def check_equal(self, name: str) -> None:
        """Check that a run made the same artifacts and files as the one with threads."""
        root = self.machines.root
        alone, shared = artifacts(root / "alone"), artifacts(root / "cache")
        assert alone.keys() == shared.keys()
        assert {key: digest for key, digest in alone.items() if key[0] not in REPORTS} == {
            key: digest for key, digest in shared.items() if key[0] not in REPORTS
        }
        first, other = (files(root / folder) for folder in ("threads", name))
        assert first.keys() == other.keys()
        assert {path for path in first if first[path] != other[path]} <= {
            path for path in first if Path(path).name in MEASURING
        }
        for path in first:
            if Path(path).name in MEASURING - {"manifest.json", "report.html"}:
                assert numbers(path, first[path]) == numbers(path, other[path]), path


def artifacts(cache: Path) -> dict[tuple[str, str], str]:
    """Return the digests of all artifacts by step and key."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in cache.glob("*/*/artifact.json")]
    return {(one["step"], one["key"] if one["step"] not in REPORTS else ""): one["digest"] for one in found}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbers(path: str, content: bytes) -> Any:
    """Return the values of a file without the measured ones."""
    text = content.decode()
    return unmeasured(list(csv.DictReader(text.splitlines())) if path.endswith(".csv") else json.loads(text))


def unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: unmeasured(each) for name, each in value.items() if not MEASURED.search(name)}
    return [unmeasured(each) for each in value] if isinstance(value, list) else value


def refusal(site: Site, options: list[str], more: Mapping[str, str] | None = None) -> str:
    """Run a flow that cannot run, and return its line."""
    done = site.machines.adflows("left", *site.arguments(site.commands[0], "refused", *options), more=more)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.strip().splitlines()
    return line


def test_a_run_refuses_a_worker_that_lacks_what_it_needs(site: Site) -> None:
    machines = site.machines
    address = machines.start_dask()
    first = len(machines.started) - 1
    options = ["--set", "engine=dask", "--set", f"engine_address={address}"]
    assert "no worker yet" in refusal(site, options)
    cache = machines.root / "cache"
    cache.mkdir(exist_ok=True)
    worker = machines.start_dask_worker("right", "other-cache.log", hide=cache)
    assert refusal(site, options).startswith(f"adflows: worker on right: {cache} is not the cache of the run; ")
    machines.end([worker])
    worker = machines.start_dask_worker("right", "other-code.log", more={"PYTHONPATH": str(machines.root)})
    assert re.match(r"adflows: worker on (right|10\.77\.0\.2): (adflows is|cannot load)", refusal(site, options))
    machines.end([worker])
    foreign = {f"{TLS}{name}": "" for name in ("CA_FILE", "CLIENT__CERT", "CLIENT__KEY")}
    assert f"no dask cluster answers at {address} (TLS expects" in refusal(site, options, foreign)
    machines.end(machines.started[first:])


def test_a_worker_of_prefect_refuses_to_start_without_its_server_secret_or_cache(site: Site) -> None:
    machines = site.machines
    closed = machines.root / "file"
    closed.touch()
    for more, words in (
        ({"PREFECT_API_URL": "http://10.77.0.1:9/api"}, "does not answer"),
        ({"ADFLOWS_CACHE": str(closed)}, "cannot be used as the cache"),
    ):
        done = machines.adflows("right", "worker", "--check", more=more)
        assert (done.returncode, done.stdout) == (2, "")
        [line] = done.stderr.strip().splitlines()
        assert words in line
    assert machines.adflows("right", "worker", "--check").returncode == 0


@pytest.fixture(scope="module", params=["dask", "ray"])
def cluster(request: pytest.FixtureRequest, site: Site) -> Iterator[tuple[str, Site, list[str]]]:
    """Yield an engine, the site, and the options of a run on a cluster over both machines."""
    machines, engine = site.machines, request.param
    before = len(machines.started)
    if engine == "dask":
        address = machines.start_dask()
        for machine in ("left", "right"):
            machines.start_dask_worker(machine, f"dask-{machine}.log")
    else:
        address = machines.start_ray()
    yield engine, site, ["--set", f"engine={engine}", "--set", f"engine_address={address}"]
    machines.end(machines.started[before:])


def test_results_are_those_of_threads(cluster: tuple[str, Site, list[str]]) -> None:
    engine, site, options = cluster
    for command in site.commands:
        found = site.run(command, engine, "--refresh", *options)
        assert (found["cached"], found["failures"]) == (0, [])
    site.check_equal(engine)


def test_a_machine_killed_in_the_middle_loses_nothing(cluster: tuple[str, Site, list[str]]) -> None:
    engine, site, options = cluster
    machines, name = site.machines, f"{engine}-killed"
    liver, images = site.commands
    right, cache = machines.started[-1], machines.root / "cache"
    run = subprocess.Popen(
        machines.command("left", sys.executable, "-m", "flows", *site.arguments(liver, name, "--refresh", *options)),
        env=machines.environment("left"), cwd=machines.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8",
    )  # fmt: skip
    wait_for("it computes", lambda: holders(cache, "right") or run.poll() is not None, 240, pause_s=0.01)
    killed = holders(cache, "right")
    for pid in family(right.pid):
        os.kill(pid, signal.SIGKILL)
    out, err = run.communicate(timeout=HANGS_S)
    assert run.returncode == 0, err
    assert killed, "the right machine computed"
    assert json.loads(out)["failures"] == []
    site.run(images, name, "--refresh", *options)
    site.check_equal(name)


def holders(cache: Path, machine: str) -> list[Path]:
    """Return the locks of artifacts that a machine makes."""
    found = []
    for path in (cache / "locks").glob("*.lock"):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        found += [path] * text.endswith(f" on {machine}")
    return found
