"""The flows that a server runs by schedule or from a form in Prefect's UI; prefect.yaml says when and where.

Each flow here runs the body of another flow directly. A subflow would take a second longer and add a row to the UI.

The values of a form are stored in plain text, and every user of the server sees them. So a form never names a file:
configurations are given by name, and scans by their pseudonyms from the register (`adflows ids`).

Prefect checks the values against the schema of these signatures before it creates a run. Prefect does not retry these
flows, because a training that failed would fail again. Results are cached, so the next run continues from them.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from prefect import Flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.inbox.config import ALL_FAILED, InboxRequest
from flows.inbox.flow import liver_inbox
from flows.liver import mask_steps
from flows.liver.hand_steps import needs_liver, result_file, run_steps, steps_between
from flows.liver.liver_masks import describe_mask, find_liver, mask_facts
from flows.machine.environment import config_names, named_config, runs_root
from flows.privacy.log_filter import path_filter
from flows.runs.outcome import Outcome
from flows.runs.prefect_flow import prefect_flow
from flows.runs.run_folder import ensure_writable
from flows.runs.runner import new_runner
from flows.server.overlap import Overlap, one_at_a_time
from medad.base.errors import ConfigError
from medad.base.settings import ANY_MACHINE
from medad.config.header import HeaderSettings
from medad.config.liver import PreprocessSettings
from medad.config.manual_steps import STEPS_HELP, ManualStepName

_CONFIG_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_CASE_PATTERN = "^[a-z0-9][a-z0-9-]{2,63}$"
ABLATION_PREFIX = "ablation"
"""Beginning of the names of configurations that describe many runs instead of one."""
_DEFAULTS = PreprocessSettings()


def _form(title: str, description: str, *, choices_of: str | None = None) -> dict[str, Any]:
    """Return the title and description of a form's field, as a JSON schema.

    Prefect ignores the title and description of a parameter's annotation, but uses this schema. `choices_of` turns the
    field into a list of that flow's configurations at the time when the deployment is applied.
    """
    names = [name for name in config_names(choices_of) if not name.startswith(ABLATION_PREFIX)] if choices_of else []
    return {"title": title, "description": description} | ({"enum": names} if names else {})


_CONFIG = "Name of a YAML file from configs/{} or from {} in the administrator's folder. A new file appears here"
_CONFIG += " after the next `adflows deploy`."


def _config_field(title: str, flow: str) -> Any:
    """Return the field of a form for the name of a flow's configuration."""
    return Field(pattern=_CONFIG_PATTERN, json_schema_extra=_form(title, _CONFIG.format(flow, flow), choices_of=flow))


LiverConfig = Annotated[str, _config_field("Configuration", "liver")]
ZsadConfig = Annotated[str, _config_field("Configuration", "zsad")]
InboxConfig = Annotated[str, _config_field("Inbox", "inbox")]
Retry = Annotated[
    tuple[Annotated[str, Field(pattern=_CASE_PATTERN)], ...],
    Field(
        max_length=1000,
        json_schema_extra=_form("Cases to try again", f"Ids of cases. `{ALL_FAILED}` means all failed cases."),
    ),
]
Name = Annotated[
    Annotated[str, Field(pattern=_CONFIG_PATTERN)] | None,
    Field(
        json_schema_extra=_form(
            "Name of the run",
            "Run folder; an earlier run in it is replaced. If empty, the configuration's name is used. "
            "No patient names.",
        )
    ),
]
Seed = Annotated[
    Annotated[int, Field(ge=0, lt=2**31)] | None,
    Field(
        json_schema_extra=_form(
            "Seed", "Another seed starts a new training. If empty, the configuration's seed is used."
        )
    ),
]
Seeds = Annotated[
    Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=20)] | None,
    Field(
        json_schema_extra=_form(
            "Seeds",
            "For reference images and pseudo anomalies; one pass per seed. "
            "If empty, the configuration's seeds are used.",
        )
    ),
]
Refresh = Annotated[
    bool,
    Field(
        json_schema_extra=_form(
            "Compute everything again", "Ignore cached results. Training takes its full time again."
        )
    ),
]
CaseId = Annotated[
    str,
    Field(
        pattern=_CASE_PATTERN,
        json_schema_extra=_form(
            "Case",
            "The scan's pseudonym from `adflows ids add`; `adflows ids ls` lists all. Never use a file name.",
        ),
    ),
]
StepName = Annotated[
    ManualStepName,
    Field(json_schema_extra=_form("Step", f"{STEPS_HELP}. Earlier steps run first unless their results are cached.")),
]
RefreshStep = Annotated[
    bool, Field(json_schema_extra=_form("Compute the step again", "Earlier steps are still taken from the cache."))
]


class StepSettings(BaseModel):
    """Settings of the preprocessing steps in a form."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    window_low_hu: Annotated[
        float, Field(title="Window minimum, HU", description="Maps to grey value 0.", ge=-2000, le=4000)
    ] = _DEFAULTS.window_hu[0]
    window_high_hu: Annotated[
        float, Field(title="Window maximum, HU", description="Maps to grey value 255.", ge=-2000, le=4000)
    ] = _DEFAULTS.window_hu[1]
    slice_px: Annotated[
        int, Field(title="Side of a slice, pixels", description="A multiple of 16.", ge=32, le=1024, multiple_of=16)
    ] = _DEFAULTS.slice_px
    min_liver_px: Annotated[
        int, Field(title="Minimum liver in a slice, pixels", description="Slices with less liver are left out.", ge=1)
    ] = _DEFAULTS.min_liver_px
    lift_dark: Annotated[
        bool, Field(title="Lift dark liver", description="Keep dark liver distinct from the background.")
    ] = _DEFAULTS.lift_dark

    def settings(self) -> PreprocessSettings:
        """Return the settings of the preprocessing steps. Raises ConfigError."""
        try:
            return PreprocessSettings(
                window_hu=(self.window_low_hu, self.window_high_hu),
                slice_px=self.slice_px,
                min_liver_px=self.min_liver_px,
                lift_dark=self.lift_dark,
            )
        except ValidationError as error:
            raise ConfigError(f"settings: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def _deployed(
    name: str, run_name: str, overlap: Overlap | None = "wait", lock: str = ""
) -> Callable[[Callable[..., Outcome]], Flow[..., Any]]:
    """Return a decorator that makes a Prefect flow. Its state's message names the first failed case and the reason.

    `overlap` says what a run does while another one of the flow is at work. None: they run side by side. `lock` is a
    pattern with the parameters, and flows with different values of it run side by side. Default: one for the flow.
    """

    def deploy(body: Callable[..., Outcome]) -> Flow[..., Any]:
        @functools.wraps(body)
        def run_body(*args: Any, **kwargs: Any) -> Outcome:
            if overlap is None:
                outcome = body(*args, **kwargs)
            else:
                given = inspect.signature(body).bind(*args, **kwargs)
                given.apply_defaults()
                with one_at_a_time(lock.format(**given.arguments) or name, overlap) as other:
                    if other is not None:
                        return Outcome(0, 0, summary=f"nothing done: {other}")
                    outcome = body(*args, **kwargs)
            if not outcome.failures:
                return outcome
            first = outcome.failures[0]
            text = f"{outcome.message}. First: {first.case_id}, {first.stage}: {first.rule}"
            return replace(outcome, summary=" ".join(text.split()))

        return prefect_flow(run_body, name, run_name)

    return deploy


_DEFAULT_VALUES = StepSettings()
Values = Annotated[
    StepSettings,
    Field(json_schema_extra=_form("Values", "A model needs the values that it was trained with.")),
]


@_deployed("liver", "liver {config}")
def liver_nightly(
    config: LiverConfig = "default", name: Name = None, seed: Seed = None, refresh: Refresh = False
) -> Outcome:
    """Liver tumours: prepare, train, segment, evaluate, report. Unchanged results are taken from the cache."""
    from flows.liver.flow import liver
    from medad.config.liver import load

    settings = load(named_config(config, "liver"), _without_none(name=name, seed=seed))
    return liver.body(settings, ensure_writable(runs_root() / "liver" / settings.name), refresh)


@_deployed("zsad", "zsad {config}")
def zsad_weekly(
    config: ZsadConfig = "dual_clip", name: Name = None, seeds: Seeds = None, refresh: Refresh = False
) -> Outcome:
    """Anomalies in images: features, scores per seed, metrics, report. No training."""
    from flows.zsad.demo_settings import replace_demo
    from flows.zsad.flow import zsad
    from zsad.config.settings import load

    chosen, values = replace_demo(Path(config), _without_none(name=name, seeds=seeds), get_run_logger().warning)
    settings = load(named_config(chosen.name, "zsad"), values)
    return zsad.body(settings, ensure_writable(runs_root() / "zsad" / settings.name), refresh)


@_deployed("liver-step", "{step} of {case_id}", overlap=None)
def case_step(
    case_id: CaseId,
    step: StepName = "window",
    settings: Values = _DEFAULT_VALUES,
    refresh: RefreshStep = False,
) -> Outcome:
    """One preprocessing step of a registered scan. Earlier steps run first unless their results are cached.

    If a step needs a liver mask and none is registered, the liver is found first.
    """
    from flows.privacy.case_ids import resolve

    case, values = resolve(case_id), settings.settings()
    names = steps_between("window", step)
    for path in (case.scan, case.liver):
        if path is not None:
            path_filter.learn(path, case_id)
    runner, folder = new_runner(ANY_MACHINE, refresh=False), runs_root() / "steps" / case_id
    mask, labels, found = case.liver, case.liver_labels, ""
    if mask is None and needs_liver(names):
        made = find_liver(runner, case_id, case.scan, HeaderSettings())
        if made is None:
            return Outcome.from_runner(runner, useful=False)
        mask, labels = made.folder() / mask_steps.LIVER_FILE, mask_steps.FOUND_LABELS
        kept = _copy_result(mask, folder / mask_steps.LIVER_MASK.name)
        if (facts := mask_facts(made)) is not None:
            found = f"\n\n{describe_mask(case_id, facts)} Check `{kept}`; `adflows ids add --liver` takes another mask."
    again = (step,) if refresh else ()
    ref = run_steps(runner, case_id, names, case.scan, mask, labels, values, refresh=again)
    details = {}
    if ref is not None:
        written = _copy_result(result_file(ref), folder / step)
        details["written"] = str(written)
        create_markdown_artifact(f"{step} of {case_id}: `{written}`{found}", key="liver-step")
    return Outcome.from_runner(runner, details=details, useful=ref is not None)


@_deployed("liver-inbox", "inbox {config}", overlap="skip", lock="liver-inbox-{config}")
def segment_inbox(config: InboxConfig = "example", retry: Retry = (), refresh: Refresh = False) -> Outcome:
    """New scans of an inbox: each is segmented once."""
    file = named_config(config, "inbox")  # a form cannot name a file
    return liver_inbox.body(InboxRequest(config=str(file), retry=retry), refresh)


def _copy_result(result: Path, folder: Path) -> Path:
    """Copy a result out of the cache into `folder`, completely or not at all. Returns the copy."""
    from medad.base.storage import atomic_path

    ensure_writable(folder)
    folder.mkdir(exist_ok=True)
    with atomic_path(folder / result.name) as temporary:
        shutil.copyfile(result, temporary)
    return folder / result.name


def _without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
