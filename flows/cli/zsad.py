"""`adflows zsad ...`: the flow, scoring of single images, the prompts, and metrics of any tool's maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import (
    EXIT_USER_ERROR,
    DryRun,
    Json,
    Name,
    Refresh,
    Runs,
    Set,
    Verbose,
    parse_overrides,
    prepare_command,
    print_and_exit,
    run_flow,
)
from flows.machine.environment import find_config, prepare_numpy
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError

if TYPE_CHECKING:
    from zsad.config.run import PromptSettings, ZsadSettings

app = typer.Typer(help="Anomalies in industrial images, found without any training.", no_args_is_help=True)

CONFIG_RULE = (
    "--config is needed, since scores are those of its encoder: --config dual_clip --set encoder.weights=FILE "
    "--set encoder.tag=null for work, or --config demo for the embedded model, which is no CLIP"
)

ORACLE_LABELS = {"f1max": "f1max at oracle threshold", "f1max_threshold": "oracle threshold (of labels)"}
"""What `evaluate` prints for figures whose threshold is chosen with the labels."""

Config = Annotated[Path, typer.Argument(help="A YAML file, or a name in configs/zsad: dual_clip, demo.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file, or a name in configs/zsad. Needed.")
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of images: MVTec AD, VisA, or any.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Seed of references and pseudo anomalies; repeatable.")]


def load_settings(config: Path, overrides: dict[str, Any]) -> ZsadSettings:
    """Read a configuration. Raises ConfigError."""
    from zsad.config.run import load

    return load(find_config(config, "zsad"), overrides)


@app.command()
def run(
    config: Config,
    data: Data = None,
    name: Name = None,
    seed: Seeds = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Everything: prompts and images to features, scores for each seed, metrics, report."""
    prepare_command(verbose=verbose)
    values = parse_overrides(
        overrides, name=name, seeds=seed or None, data__root=None if data is None else str(data.absolute())
    )
    settings = load_settings(config, values)
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import zsad

    folder = ensure_writable(out / "zsad" / settings.name)
    print_and_exit(run_flow(zsad, settings=settings, out=folder, refresh=refresh, dry_run=dry_run), as_json=as_json)


@app.command()
def score(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write: scores.csv, maps, report.")],
    config: ConfigOption = None,
    category: Annotated[
        str | None, typer.Option(help="What the images show, in words. Default: the folder's name.")
    ] = None,
    npy: Annotated[bool, typer.Option("--npy", help="Write the float maps as .npy instead of TIFF.")] = False,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score images of one kind; no labels needed. Each is compared with another one of them.

    Of several seeds and systems in the configuration, the first seed and the last system are used.
    """
    if config is None:
        raise ConfigError(CONFIG_RULE)
    prepare_command(verbose=verbose)
    settings = load_settings(config, parse_overrides(overrides, data__category=category))
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import ScoreRequest
    from flows.zsad.flow import score as score_flow

    request = ScoreRequest(
        images=tuple(path.absolute() for path in images), category=category, out=ensure_writable(out), npy=npy
    )
    print_and_exit(
        run_flow(score_flow, request=request, settings=settings, refresh=refresh, dry_run=dry_run), as_json=as_json
    )


@app.command()
def compare(
    config: Annotated[
        Path, typer.Argument(help="A YAML file, or a name in configs/zsad: compare (published settings), compare_demo.")
    ] = Path("compare"),
    methods: Annotated[str, typer.Option(help="Systems, with commas between; or all.")] = "all",
    data: Data = None,
    name: Name = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds: 0, 1, 2 and so on.")] = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """All systems side by side on the same images: tables, tests between them, what each costs."""
    prepare_command(verbose=verbose)
    values = parse_overrides(
        overrides,
        name=name,
        seeds=None if seeds is None else list(range(seeds)),
        data__root=None if data is None else str(data.absolute()),
    )
    from zsad.config.compare import load

    settings = load(find_config(config, "zsad"), values).chosen(methods)
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.compare import compare as compare_flow

    folder = ensure_writable(out / "zsad-compare" / settings.name)
    print_and_exit(
        run_flow(compare_flow, settings=settings, out=folder, refresh=refresh, dry_run=dry_run), as_json=as_json
    )


@app.command()
def train(
    method: Annotated[str, typer.Argument(help="A learned system: april_gan, anomalyclip, or its label.")],
    on: Annotated[Path, typer.Option("--on", help="Folder of labelled images with masks.")],
    config: Annotated[
        Path, typer.Option("--config", "-c", help="A YAML file, or a name in configs/zsad, that has the system.")
    ] = Path("compare"),
    name: Name = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a learned system on labelled images; the checkpoint serves on others (systems: checkpoint)."""
    prepare_command(verbose=verbose)
    from zsad.config.compare import load
    from zsad.config.learned import LearnedSettings

    values = parse_overrides(overrides, name=name, data__root=str(on.absolute()))
    settings = load(find_config(config, "zsad"), values).chosen(method)
    if len(settings.systems) != 1 or not isinstance(settings.systems[0], LearnedSettings):
        raise ConfigError(f"{method}: expected one system that is trained: april_gan or anomalyclip, or a label of one")
    system = settings.systems[0]
    settings = settings.model_copy(
        update={"name": name or f"{system.system}-{settings.name}"[:64], "ablations": (), "auxiliary": None}
    )
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.compare import TRAINED_FILES
    from flows.zsad.compare import train as train_flow

    folder = ensure_writable(out / "zsad-train" / settings.name)
    outcome = run_flow(train_flow, settings=settings, out=folder, refresh=refresh, dry_run=dry_run)
    checkpoint = folder.absolute() / TRAINED_FILES[0]
    print_and_exit(outcome, as_json=as_json, lines=[f"checkpoint: {checkpoint}"] if checkpoint.is_file() else [])


@app.command()
def prompts(
    category: Annotated[str, typer.Argument(help="What the images show, as metal_nut.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A YAML file, or a name in configs/zsad, with prompt settings."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the prompts of a category, normal ones first."""
    from zsad.clip.prompts import ensemble

    found = ensemble(category, _prompt_settings(config))
    if as_json:
        print_result(json.dumps({"category": category, "normal": found.normal, "anomalous": found.anomalous}, indent=1))
        return
    for side in ("normal", "anomalous"):
        texts = getattr(found, side)
        print_result(f"{side} ({len(texts)})")
        for text in texts:
            print_result(f"  {text}")


def _prompt_settings(config: Path | None) -> PromptSettings:
    from zsad.config.run import PromptSettings

    return PromptSettings() if config is None else load_settings(config, {}).prompts


@app.command()
def evaluate(
    maps: Annotated[Path, typer.Argument(help="Folder of anomaly maps: float .npy or .tiff.")],
    masks: Annotated[Path, typer.Argument(help="Folder of PNG masks of the same stems; above 0 is anomalous.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An evaluation setting, as max_fpr=0.3.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Metrics of any tool's maps: AUROC, AP, F1max at its oracle threshold, AUPRO; exact."""
    terminal.enabled = True
    prepare_numpy()
    from medad.base.settings import parse_settings
    from zsad.config.run import EvaluationSettings
    from zsad.steps.evaluate_maps import evaluate_folders

    settings = parse_settings(EvaluationSettings, parse_overrides(overrides), source="--set")
    found = evaluate_folders(maps, masks, settings)
    for problem in found.problems:
        terminal.line(problem.line)
    if as_json:
        answer = {
            "image": found.image.model_dump(mode="json"),
            "pixel": found.pixel.model_dump(mode="json"),
            "problems": [{"id": problem.case_id, "rule": problem.rule} for problem in found.problems],
        }
        print_result(json.dumps(answer, indent=1))
    else:
        for kind in ("image", "pixel"):
            for key, value in getattr(found, kind).model_dump(mode="json").items():
                print_result(f"{kind} {ORACLE_LABELS.get(key, key):<30} {_format_figure(value)}")
    if found.problems:
        raise typer.Exit(EXIT_USER_ERROR)


def _format_figure(value: object) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
