"""The flows that a server runs by schedule or from a form in Prefect's UI; prefect.yaml says when and where.

Each runs an existing flow's body inside itself: a subflow would take a second longer and be a second row in the UI.
What is typed into a form is stored in clear and seen by whoever reaches the server, so that a form names no file:
configurations go by name, scans by the pseudonyms of the register (`adflows ids`).

Prefect checks what was typed against the schema of these signatures before it makes a run. No flow is tried again by
Prefect: a night of training that failed would fail again. What was done is cached, and the next run goes on from there.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from prefect import Flow
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.inbox.flow import liver_inbox
from flows.liver import steps
from flows.machine.environment import config_names, named_config, runs_root
from flows.privacy.log_filter import path_filter
from flows.runs.outcome import Outcome
from flows.runs.prefect_flow import prefect_flow
from flows.runs.run_folder import ensure_writable
from flows.runs.runner import new_runner
from flows.store.artifacts import SIDECAR
from flows.store.references import Ref
from medad.base.errors import ConfigError
from medad.base.settings import ANY_MACHINE
from medad.config.by_hand import BY_HAND, IN_ORDER, HandStepName
from medad.config.liver import PreprocessSettings

_CONFIG_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_CASE_PATTERN = "^[a-z0-9][a-z0-9-]{2,63}$"
OF_ABLATION = "ablation"
"""What names of configurations begin with that hold many runs and not one."""
_DEFAULTS = PreprocessSettings()


def _form(title: str, description: str, *, choices_of: str | None = None) -> dict[str, Any]:
    """What the form shows: Prefect keeps neither title nor description of a parameter's own annotation, but this.

    `choices_of` a flow makes a list to choose from: the configurations that were there when the deployment was applied.
    """
    names = [name for name in config_names(choices_of) if not name.startswith(OF_ABLATION)] if choices_of else []
    return {"title": title, "description": description} | ({"enum": names} if names else {})


_CONFIG = "A YAML file by its name, from configs/{} or from {} in the administrator's folder. A new one is in this list"
_CONFIG += " after the next `adflows deploy`."

LiverConfig = Annotated[
    str,
    Field(
        pattern=_CONFIG_PATTERN,
        json_schema_extra=_form("Configuration", _CONFIG.format("liver", "liver"), choices_of="liver"),
    ),
]
ZsadConfig = Annotated[
    str,
    Field(
        pattern=_CONFIG_PATTERN,
        json_schema_extra=_form("Configuration", _CONFIG.format("zsad", "zsad"), choices_of="zsad"),
    ),
]
Name = Annotated[
    Annotated[str, Field(pattern=_CONFIG_PATTERN)] | None,
    Field(
        json_schema_extra=_form(
            "Name of the run",
            "Its folder, whose earlier run it replaces. Empty: the configuration's. No patient's name.",
        )
    ),
]
Seed = Annotated[
    Annotated[int, Field(ge=0, lt=2**31)] | None,
    Field(json_schema_extra=_form("Seed", "Another seed trains again. Empty: the configuration's.")),
]
Seeds = Annotated[
    Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=20)] | None,
    Field(
        json_schema_extra=_form(
            "Seeds", "Of references and pseudo anomalies, a pass for each. Empty: the configuration's."
        )
    ),
]
Refresh = Annotated[
    bool, Field(json_schema_extra=_form("Compute all again", "Also what is cached; training takes as long as it did."))
]
CaseId = Annotated[
    str,
    Field(
        pattern=_CASE_PATTERN,
        json_schema_extra=_form(
            "Case",
            "The pseudonym that `adflows ids add` gave the scan; `adflows ids ls` lists them. Never a file's name.",
        ),
    ),
]
StepName = Annotated[
    HandStepName,
    Field(json_schema_extra=_form("Step", f"{IN_ORDER}. The steps before it are made where they are not cached.")),
]
RefreshStep = Annotated[
    bool, Field(json_schema_extra=_form("Compute the step again", "Steps before it stay as they are cached."))
]


class StepSettings(BaseModel):
    """Values of the preprocessing steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    window_low_hu: Annotated[
        float, Field(title="Window from, HU", description="Becomes grey 0.", ge=-2000, le=4000)
    ] = _DEFAULTS.window_hu[0]
    window_high_hu: Annotated[
        float, Field(title="Window to, HU", description="Becomes grey 255.", ge=-2000, le=4000)
    ] = _DEFAULTS.window_hu[1]
    slice_px: Annotated[
        int, Field(title="Side of a slice, pixels", description="A multiple of 16.", ge=32, le=1024, multiple_of=16)
    ] = _DEFAULTS.slice_px
    min_liver_px: Annotated[
        int, Field(title="Least liver in a slice, pixels", description="Slices with less are left out.", ge=1)
    ] = _DEFAULTS.min_liver_px
    lift_dark: Annotated[
        bool, Field(title="Lift dark liver", description="Keeps equalised dark liver apart from the background.")
    ] = _DEFAULTS.lift_dark

    def settings(self) -> PreprocessSettings:
        """As the steps take them. Raises ConfigError."""
        try:
            return PreprocessSettings(
                window_hu=(self.window_low_hu, self.window_high_hu),
                slice_px=self.slice_px,
                min_liver_px=self.min_liver_px,
                lift_dark=self.lift_dark,
            )
        except ValidationError as error:
            raise ConfigError(f"settings: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def _deployed(name: str, run_name: str) -> Callable[[Callable[..., Outcome]], Flow[..., Any]]:
    """Make a flow of Prefect of a body; its state says in one line which case failed first, and why."""

    def deploy(body: Callable[..., Outcome]) -> Flow[..., Any]:
        @functools.wraps(body)
        def told(*args: Any, **kwargs: Any) -> Outcome:
            outcome = body(*args, **kwargs)
            if not outcome.failures:
                return outcome
            first = outcome.failures[0]
            text = f"{outcome.message}. First: {first.case_id}, {first.stage}: {first.rule}"
            return replace(outcome, summary=" ".join(text.split()))

        return prefect_flow(told, name, run_name)

    return deploy


_DEFAULT_VALUES = StepSettings()
Values = Annotated[
    StepSettings,
    Field(json_schema_extra=_form("Values", "Results of other values are of no use to a model trained with these.")),
]


@_deployed("liver", "liver {config}")
def liver_nightly(
    config: LiverConfig = "thesis", name: Name = None, seed: Seed = None, refresh: Refresh = False
) -> Outcome:
    """Liver tumours: prepare, train, segment, evaluate, report. What has not changed is taken from the cache."""
    from flows.liver.flow import liver
    from medad.config.liver import load

    settings = load(named_config(config, "liver"), _given(name=name, seed=seed))
    return liver.body(settings, ensure_writable(runs_root() / "liver" / settings.name), refresh)


@_deployed("zsad", "zsad {config}")
def zsad_weekly(
    config: ZsadConfig = "dual_clip", name: Name = None, seeds: Seeds = None, refresh: Refresh = False
) -> Outcome:
    """Anomalies in industrial images: features, scores seed by seed, metrics, report. Nothing is trained."""
    from flows.zsad.flow import zsad
    from zsad.config.run import load

    settings = load(named_config(config, "zsad"), _given(name=name, seeds=seeds))
    return zsad.body(settings, ensure_writable(runs_root() / "zsad" / settings.name), refresh)


@_deployed("liver-step", "{step} of {case_id}")
def case_step(
    case_id: CaseId,
    step: StepName = "window",
    settings: Values = _DEFAULT_VALUES,
    refresh: RefreshStep = False,
) -> Outcome:
    """One preprocessing step of a registered scan; the steps before it are made where they are not cached."""
    from flows.privacy.case_ids import resolve

    case, values = resolve(case_id), settings.settings()
    names = tuple(BY_HAND)
    names = names[: names.index(step) + 1]
    if case.liver is None and any(BY_HAND[name].needs_liver for name in names):
        raise ConfigError(f"case {case_id} is registered without a liver mask, which {step} needs")
    for path in (case.scan, case.liver):
        if path is not None:
            path_filter.learn(path, case_id)
    runner = new_runner(ANY_MACHINE, refresh=False)
    source, ref = case.scan, None
    for name in names:
        runner.refresh = refresh and name == step
        liver = case.liver if BY_HAND[name].needs_liver else None
        ref = runner.run(case_id, steps.hand_step(name, source, liver, case.liver_labels, values))
        if ref is None:
            break
        source = _result(ref)
    details = {}
    if ref is not None:
        written = _hand_over(source, runs_root() / "steps" / case_id / step)
        details["written"] = str(written)
        create_markdown_artifact(f"{step} of {case_id}: `{written}`", key="liver-step")
    return Outcome.from_runner(runner, details=details, useful=ref is not None)


segment_inbox = liver_inbox.prefect


def _result(ref: Ref) -> Path:
    """A step's one file."""
    return next(path for path in sorted(ref.folder().iterdir()) if path.name != SIDECAR)


def _hand_over(result: Path, folder: Path) -> Path:
    """Copy it out of the cache, whole or not at all."""
    from medad.base.storage import atomic_path

    ensure_writable(folder)
    folder.mkdir(exist_ok=True)
    with atomic_path(folder / result.name) as temporary:
        shutil.copyfile(result, temporary)
    return folder / result.name


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
