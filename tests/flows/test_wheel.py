"""The wheel: installed into an empty folder, it runs everything without the checkout.

The libraries come from this environment. If the checkout is installed in it, the wheel's folder comes first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.flows.live_server import live

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "medad", "zsad")

IMPORT_AND_RUN = """
import contextlib, importlib, io, json, pkgutil, sys
files, answers = {}, {}
for package in ("flows", "medad", "zsad"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.endswith("__main__"):
            files[found.name] = importlib.import_module(found.name).__file__
for command in json.loads(sys.argv[1]):
    sys.argv, out, code = ["adflows", *command], io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            importlib.import_module("flows.cli.app").main()
        except SystemExit as end:
            code = end.code
    answers[command[0]] = code, json.loads(out.getvalue())
print(json.dumps([files, answers]))
"""
"""Program for one process that does everything, because importing the libraries takes seconds."""


@dataclass(frozen=True)
class Installed:
    """The folder of an installed wheel, and an empty folder to work in."""

    site: Path
    work: Path
    files: dict[str, str] = field(default_factory=dict)
    """Module name -> file, for all imported modules."""
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    """Exit codes and answers of `doctor`, `liver` and `deploy`."""

    @property
    def environment(self) -> dict[str, str]:
        """Return an environment without the developer's Prefect, cache and configurations."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "ADFLOWS"))}
        own = {"PREFECT_HOME": "prefect", "ADFLOWS_CACHE": "cache", "ADFLOWS_PRIVATE": "private"}
        own = {name: str(self.work.parent / folder) for name, folder in own.items()}
        return kept | own | {"PYTHONPATH": str(self.site)}

    def run(self, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, command)], env=self.environment | more, cwd=self.work,
            capture_output=True, text=True, check=False, encoding="utf-8",
        )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build and install the wheel without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run([sys.executable, "-m", *build], cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    install = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile"]
    site = folder / "site"
    subprocess.run([sys.executable, "-m", *install, "--target", str(site), str(wheel)], check=True, cwd=folder)
    (folder / "work").mkdir()
    return Installed(site, folder / "work")


@pytest.fixture(scope="module")
def used(
    installed: Installed, new_world: Callable[..., Any], prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    """Import all of the wheel, run commands, and return the wheel with their results."""
    world = new_world(tmp_path_factory.mktemp("world"), train=1, test=1)
    commands = [
        ["doctor", "--json"],
        ["liver", "run", "small", "--train", str(world.btcv), "--test", str(world.lits), "--dry-run", "--json"],
        ["deploy", "--dry-run", "--json"],
    ]
    done = installed.run("-c", IMPORT_AND_RUN, json.dumps(commands), PREFECT_API_URL=prefect_server)
    assert done.returncode == 0, done.stderr
    return Installed(installed.site, installed.work, *json.loads(done.stdout))


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_file_of_the_packages_and_of_the_product_is_in_it(installed: Installed) -> None:
    for package in PACKAGES:
        assert files_of(ROOT / package) <= files_of(installed.site / package)
    shipped = installed.site / "flows" / "shipped"
    assert {path.name for path in shipped.iterdir()} == {"configs", "deploy", "prefect.yaml"}
    assert files_of(ROOT / "configs") == files_of(shipped / "configs")
    assert {name for name in files_of(ROOT / "deploy") if not name.startswith(".env")} == files_of(shipped / "deploy")
    assert (shipped / "prefect.yaml").read_bytes() == (ROOT / "prefect.yaml").read_bytes()


def test_the_command_is_installed(installed: Installed) -> None:
    done = installed.run(installed.site / "bin" / "adflows", "--help")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("demo", "doctor", "liver", "zsad", "deploy"))


@pytest.mark.slow
def test_every_module_of_it_imports(used: Installed) -> None:
    here = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert used.files.keys() | {*PACKAGES} == {name for name in here if not name.endswith(".__main__")}
    assert all(Path(file).is_relative_to(used.site) for file in used.files.values())


@pytest.mark.slow
def test_the_doctor_examines_it(used: Installed) -> None:
    code, answer = used.answers["doctor"]
    checks = {check["name"]: check for check in answer}
    assert {"Python", "torch", "open_clip", "prefect", "Prefect", "cache", "memory"} <= set(checks)
    assert checks["torch"]["status"] == checks["open_clip"]["status"] == checks["cache"]["status"] == "ok"
    assert code == (2 if any(check["status"] == "fail" for check in checks.values()) else 0)


@pytest.mark.slow
def test_a_configuration_is_found_by_name(used: Installed) -> None:
    code, answer = used.answers["liver"]
    steps = {row["step"]: row["status"] for row in answer["plan"]}
    assert (code, steps["prepare"], steps["report"]) == (0, "make", "follows")


@pytest.mark.slow
def test_deploy_reads_the_wheels_own_prefect_yaml(used: Installed) -> None:
    code, answer = used.answers["deploy"]
    assert code == 0
    assert {row["name"] for row in answer if row["kind"] == "deployment"} == {
        "liver-nightly", "zsad-weekly", "step", "segment-inbox", "inbox-example",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_deployed_flows_run_in_the_folder_of_the_deploy(
    installed: Installed, new_world: Callable[..., Any], tmp_path: Path
) -> None:
    """Run a server and a worker without a checkout. Run folders go to `runs` where `adflows deploy` was called."""
    world = new_world(tmp_path / "world")
    folder = tmp_path / "configs" / "liver"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(world.config.read_text(encoding="utf-8"), encoding="utf-8")
    with live(tmp_path, more={"PYTHONPATH": str(installed.site), "ADFLOWS_RUNS": ""}) as site:
        assert Path(site.python("import flows; print(flows.__file__)").strip()).is_relative_to(installed.site)
        site.start_server()
        site.deploy()
        site.start_worker()
        with site.client() as client:
            [step] = client.read_deployment_by_name("liver/liver-nightly").pull_steps or []
        assert step == {"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}
        ended = site.ended(site.ask("liver/liver-nightly", config="tiny"), 300)
        assert ended.state is not None
        assert ended.state.name == "Completed", ended.state.message
        assert (tmp_path / "runs" / "liver" / "tiny" / "report.html").is_file()
