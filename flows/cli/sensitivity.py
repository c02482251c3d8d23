"""`adflows liver sensitivity`: planted lesions of known size and contrast, looked for by a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DryRun, Json, Name, Refresh, Set, Verbose, conclude, parse_overrides, run_flow, start
from medad.base.errors import ConfigError


def sensitivity(
    model: Annotated[Path, typer.Argument(help="Folder of a run with trained networks.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write: report, tables, a row a lesion.")],
    healthy: Annotated[
        Path | None,
        typer.Option("--healthy", help="Folder of healthy scans, in BTCV's layout unless --set says other."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file with a study's settings; without one the defaults.")
    ] = None,
    allow_training_cases: Annotated[
        bool,
        typer.Option("--allow-training-cases", help="Go on with scans the model was trained on; the report says so."),
    ] = False,
    name: Name = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sizes, shapes and places.")] = None,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Plant lesions into healthy scans and measure what share a model finds, by size, contrast and place."""
    start(verbose=verbose)
    from medad.base.settings import put_over
    from medad.config.sensitivity import load_sensitivity, parse_sensitivity

    root = None if healthy is None else str(healthy)
    values = parse_overrides(overrides, name=name, seed=seed, healthy__root=root)
    if config is not None:
        study = load_sensitivity(config, values)
    elif root is None:
        raise ConfigError("the study needs healthy scans: --healthy FOLDER, or a --config that names them")
    else:
        study = parse_sensitivity(put_over({"healthy": {"layout": "btcv"}}, values, source="--set"), source="--set")
    from flows.liver.sensitivity import SensitivityRequest, settings_for
    from flows.liver.sensitivity import sensitivity as sensitivity_flow
    from flows.runs.run_folder import writable

    if model.resolve() == out.resolve():
        raise ConfigError(f"{out}: would be written over; give another folder than the model's")
    settings = settings_for(study, model)
    request = SensitivityRequest(model=model.absolute(), out=writable(out), allow_training_cases=allow_training_cases)
    conclude(
        run_flow(sensitivity_flow, request=request, study=study, settings=settings, refresh=refresh, dry_run=dry_run),
        as_json=as_json,
    )
