"""`adflows liver ablate`: a table of variants instead of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import (
    DryRun,
    Json,
    Name,
    Refresh,
    Runs,
    Set,
    Verbose,
    conclude,
    find_config,
    parse_overrides,
    run_flow,
    start,
)
from medad.base.errors import ConfigError

LINE_FIGURES = {"micro_dice_2d": "micro Dice", "dice_3d_mean": "3-D Dice", "voxel_auroc_mean": "voxel AUROC"}


def ablate(
    config: Annotated[
        Path, typer.Argument(help="A YAML file, or a name in configs/liver: ablation (the thesis's), ablation_small.")
    ],
    train: Annotated[Path | None, typer.Option("--train", help="Folder of the training data set.")] = None,
    test: Annotated[Path | None, typer.Option("--test", help="Folder of the test data set.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many seeds, as 3 for 0, 1, 2; or the seeds, as 0,4,7 (a single one: 4,).")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows and sweeps by name, curve, yardstick, with commas between. Default: all.")
    ] = None,
    name: Name = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train and evaluate variants of a configuration over seeds: tables, tests between them, curves, pictures.

    --set goes over the configuration that all rows are variants of; a row's own values go over that.
    """
    start(verbose=verbose)
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
        settings = settings.chosen(rows)
    from flows.liver.ablate import ablate as ablate_flow
    from flows.runs.run_folder import writable

    folder = writable(out / "liver-ablate" / settings.name)
    outcome = run_flow(ablate_flow, settings=settings, out=folder, refresh=refresh, dry_run=dry_run)
    conclude(outcome, as_json=as_json, lines=[row_line(row) for row in outcome.details.get("rows", [])])


def parse_seeds(text: str) -> list[int]:
    """`3` is how many, `0,4,7` are which. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text}: expected how many, as 3, or which, as 0,4,7")
    if "," in text:
        return [int(part) for part in parts]
    if not int(parts[0]):
        raise ConfigError(f"--seeds {text}: at least one")
    return list(range(int(parts[0])))


def row_line(row: dict[str, Any]) -> str:
    """A row's means on one line."""
    figures = []
    for key, title in LINE_FIGURES.items():
        stat = row[key]
        sd = "" if stat is None or stat["sd"] is None else f" ± {stat['sd']:.3f}"
        figures.append(f"{title} {'undefined' if stat is None else format(stat['mean'], '.3f')}{sd}")
    seeds = "" if row["seeds"] is None else f" ({row['seeds']} seeds)"
    return f"{row['row']:<16} {', '.join(figures)}{seeds}"
