"""`adflows liver ablate` compares variants of a configuration. `adflows liver sensitivity` inserts lesions.

The second measures which share of lesions of known size and contrast a model finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import (
    DryRun,
    Json,
    Name,
    Quiet,
    Refresh,
    Runs,
    Set,
    Verbose,
    complete_config,
    parse_overrides,
    prepare_command,
    print_and_exit,
    run_flow,
)
from flows.machine.environment import find_config
from medad.base.errors import ConfigError

LINE_FIGURES = {"micro_dice_2d": "micro Dice", "dice_3d_mean": "3-D Dice", "voxel_auroc_mean": "voxel AUROC"}


def ablate(
    config: Annotated[
        Path,
        typer.Argument(
            help="A YAML file, or a name in configs/liver, e.g. ablation, ablation_small.",
            autocompletion=complete_config("liver"),
        ),
    ],
    train: Annotated[
        Path | None, typer.Option("--train", help="Folder of the training data. Default: the configuration's.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option("--test", help="Folder of the test data. Default: the configuration's.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Number of seeds (3 means 0, 1 and 2), or a list such as 0,4,7. To use only seed 4, give `4,`."
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Rows to compute: names of rows and sweeps, curve, baseline, with commas. Default: all."),
    ] = None,
    name: Name = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compare variants of a configuration.

    Each row of CONFIG is a variant of one base configuration. Every variant is trained and evaluated once per seed.
    --set changes the base configuration; a row's values override it.

    Writes tables, paired tests, learning curves and pictures to OUT/liver-ablate/NAME.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    values = parse_overrides(
        overrides,
        name=name,
        seeds=None if seeds is None else parse_seeds(seeds),
        train_data__root=None if train is None else str(train),
        test_data__root=None if test is None else str(test),
    )
    from medad.config.ablation import load

    settings = load(find_config(config, "liver"), values, lambda base: find_config(Path(base), "liver"))
    if rows is not None:
        settings = settings.select_parts(rows)
    from flows.liver.ablate import ablate as ablate_flow
    from flows.runs.run_folder import ensure_writable

    folder = ensure_writable(out / "liver-ablate" / settings.name)
    outcome = run_flow(ablate_flow, settings=settings, out=folder, refresh=refresh, dry_run=dry_run)
    print_and_exit(outcome, as_json=as_json, lines=[row_line(row) for row in outcome.details.get("rows", [])])


def parse_seeds(text: str) -> list[int]:
    """Return seeds: `3` gives 0, 1 and 2; `0,4,7` gives these. Raise ConfigError for other texts."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text}: expected a number of seeds such as 3, or a list of seeds such as 0,4,7")
    if "," in text:
        return [int(part) for part in parts]
    if not int(parts[0]):
        raise ConfigError(f"--seeds {text}: at least one")
    return list(range(int(parts[0])))


def row_line(row: dict[str, Any]) -> str:
    """Format the means of a row as one line."""
    figures = []
    for key, title in LINE_FIGURES.items():
        stat = row[key]
        sd = "" if stat is None or stat["sd"] is None else f" ± {stat['sd']:.3f}"
        figures.append(f"{title} {'undefined' if stat is None else format(stat['mean'], '.3f')}{sd}")
    seeds = "" if row["seeds"] is None else f" ({row['seeds']} seed{'' if row['seeds'] == 1 else 's'})"
    return f"{row['row']:<16} {', '.join(figures)}{seeds}"


def sensitivity(
    model: Annotated[
        Path, typer.Argument(help="Run folder that contains a trained model, or `default`: the package's model.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Run folder to write: report and tables, with one row per lesion.")
    ],
    healthy: Annotated[
        Path | None,
        typer.Option("--healthy", help="Folder of healthy scans, in BTCV's layout unless healthy.layout is set."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file with the study's settings. Default: built-in ones.")
    ] = None,
    allow_training_cases: Annotated[
        bool,
        typer.Option("--allow-training-cases", help="Accept scans that the model was trained on. The report says so."),
    ] = False,
    name: Annotated[str | None, typer.Option("--name", help="Name of the study, shown in its report.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed of the lesions' sizes, shapes and places. Default: the settings'.")
    ] = None,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure which inserted lesions a model finds.

    Inserts lesions of known size and contrast into healthy scans, segments them and counts the lesions found. Needs
    --healthy, or a --config that names the scans. Reports the sensitivity by size in mm, by contrast in HU and by
    place.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    from medad.base.settings import apply_overrides
    from medad.config.sensitivity import load_sensitivity, parse_sensitivity

    root = None if healthy is None else str(healthy)
    values = parse_overrides(overrides, name=name, seed=seed, healthy__root=root)
    if config is not None:
        study = load_sensitivity(config, values)
    elif root is None:
        raise ConfigError("the study needs healthy scans: give --healthy FOLDER, or a --config that names them")
    else:
        study = parse_sensitivity(
            apply_overrides({"healthy": {"layout": "btcv"}}, values, source="--set"), source="--set"
        )
    from flows.liver.sensitivity import SensitivityRequest, settings_for
    from flows.liver.sensitivity import sensitivity as sensitivity_flow
    from flows.runs.run_folder import ensure_writable
    from medad.config.packaged import model_folder

    model = model_folder(model)
    if model.resolve() == out.resolve():
        raise ConfigError(f"{out}: would be overwritten; give another folder than the model's")
    settings = settings_for(study, model)
    request = SensitivityRequest(
        model=model.absolute(), out=ensure_writable(out), allow_training_cases=allow_training_cases
    )
    print_and_exit(
        run_flow(sensitivity_flow, request=request, study=study, settings=settings, refresh=refresh, dry_run=dry_run),
        as_json=as_json,
    )
