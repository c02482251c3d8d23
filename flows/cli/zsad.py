"""`adflows zsad ...`: the image flow, scoring, comparison, training, prompts and metrics of any tool's maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.image_settings import copy_threshold, load_settings, settings_of_method
from flows.cli.options import (
    EXIT_USER_ERROR,
    DryRun,
    Json,
    Name,
    Quiet,
    Refresh,
    Runs,
    Set,
    Verbose,
    complete_config,
    example,
    parse_overrides,
    prepare_command,
    prepare_terminal,
    print_and_exit,
    run_flow,
)
from flows.machine.environment import prepare_numpy
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError, group_lines

if TYPE_CHECKING:
    from zsad.config.run import PromptSettings

app = typer.Typer(
    help="""Score images for anomalies, compare and train systems.

    The zero-shot systems need no training on the images: they compare image patches with texts, and with reference
    images. `run` scores and evaluates a data set; `score` scores your own images.
    """,
    epilog=example("adflows zsad score photos/ -o scored", "adflows zsad run musc --data data/mvtec"),
    no_args_is_help=True,
)


def complete_method(incomplete: str) -> list[str]:
    """Complete names of methods."""
    from zsad.config.systems import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def complete_method_or_config(incomplete: str) -> list[str]:
    """Complete names of methods and of configurations."""
    return [*complete_method(incomplete), *complete_config("zsad")(incomplete)]


ORACLE_LABELS = {"f1max": "f1max at oracle threshold", "f1max_threshold": "oracle threshold (of labels)"}
"""Names that `evaluate` prints for figures that need the labels to choose their threshold."""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="A YAML file, or a name in configs/zsad, such as dual_clip. Default: the best encoder of this machine.",
        autocompletion=complete_config("zsad"),
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of images, in MVTec AD's, VisA's or another layout. Default: the configuration's."
    ),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        "--seed", help="Random seed of references and pseudo anomalies. Repeatable. Default: the configuration's."
    ),
]


@app.command(epilog=example("adflows zsad run musc --data data/mvtec"))
def run(
    method: Annotated[
        str,
        typer.Argument(
            help="A method, such as dual, musc, winclip; or a configuration: a YAML file, or a name in configs/zsad.",
            autocompletion=complete_method_or_config,
        ),
    ],
    data: Data = None,
    config: ConfigOption = None,
    name: Name = None,
    seed: Seeds = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score and evaluate a data set with one method.

    Encodes the images, scores them once per seed, and computes metrics if there are labels. A method by its name
    needs --data. A configuration may name the method, the encoder and the data.

    Writes the report, heat maps and scores to OUT/zsad/NAME.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    values = parse_overrides(
        overrides, name=name, seeds=seed or None, data__root=None if data is None else str(data.absolute())
    )
    from zsad.config.systems import METHODS

    if method in METHODS:
        if data is None and config is None:
            raise ConfigError(f"run {method}: --data is needed; it is the folder of the images")
        settings = settings_of_method(method, config, values)
    else:
        settings = settings_of_method(None, Path(method), values)
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import zsad

    folder = ensure_writable(out / "zsad" / settings.name)
    print_and_exit(run_flow(zsad, settings=settings, out=folder, refresh=refresh, dry_run=dry_run), as_json=as_json)


@app.command(epilog=example("adflows zsad score photos/ -o scored"))
def score(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of images.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Run folder to write: scores.csv, anomaly maps, flagged images, report.")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="Method, such as musc, dual, winclip. Default: the best for the encoder.",
            autocompletion=complete_method,
        ),
    ] = None,
    normal: Annotated[
        list[Path] | None,
        typer.Option(
            "--normal", help="Folder or file of good photographs, with which the images are compared. Repeatable."
        ),
    ] = None,
    config: ConfigOption = None,
    category: Annotated[
        str | None, typer.Option(help="Name of the object in the images, for the prompts. Default: the folder's name.")
    ] = None,
    threshold: Annotated[
        Path | None, typer.Option(help="Flag by the threshold in this file, which --save-threshold wrote.")
    ] = None,
    save_threshold: Annotated[
        Path | None, typer.Option(help="Write the threshold to this file, to judge later images in the same way.")
    ] = None,
    npy: Annotated[bool, typer.Option("--npy", help="Write the anomaly maps as .npy files instead of TIFF.")] = False,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score your own images.

    All images must show the same kind of object; labels are not needed. A higher score means more anomalous. With
    --normal, images are compared with good photographs, and the threshold comes from these. Otherwise images are
    compared with each other or with prompts, and the highest tenth is flagged.

    The first seed of the configuration is used.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    values = parse_overrides(overrides, data__category=category)
    settings = settings_of_method(method, config, values, few_shot=bool(normal))
    system = settings.method
    if normal and not system.accepts_shots:
        from zsad.config.systems import few_shot_methods

        raise ConfigError(f"--normal: {system.title} cannot use normal images; others can: {few_shot_methods()}")
    if (save_threshold or threshold) and system.compares_images:
        rule = f"{system.title} compares the images with each other, so a threshold fits only these images"
        alone = system.accepts_shots and not system.model_copy(update={"shots": 1}).compares_images
        raise ConfigError(rule + "; add --normal" * alone)
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import ScoreRequest
    from flows.zsad.flow import score as score_flow

    request = ScoreRequest(
        images=tuple(path.absolute() for path in images),
        normal=tuple(path.absolute() for path in normal or ()),
        category=category,
        out=ensure_writable(out),
        threshold=None if threshold is None else threshold.absolute(),
        npy=npy,
    )
    if save_threshold is not None:
        ensure_writable(save_threshold)
    outcome = run_flow(score_flow, request=request, settings=settings, refresh=refresh, dry_run=dry_run)
    lines = []
    if save_threshold is not None and not dry_run:
        lines.append(copy_threshold(request.out / "threshold.json", save_threshold))
    print_and_exit(outcome, as_json=as_json, lines=lines)


@app.command(epilog=example("adflows zsad compare compare_demo --methods clip,winclip --seeds 3"))
def compare(
    config: Annotated[
        Path,
        typer.Argument(
            help="A YAML file, or a name in configs/zsad, e.g. compare, compare_demo.",
            autocompletion=complete_config("zsad"),
        ),
    ] = Path("compare"),
    methods: Annotated[str, typer.Option(help="Systems to compare, with commas, e.g. clip,winclip; or all.")] = "all",
    data: Data = None,
    name: Name = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds: 3 means 0, 1, 2. Default: the configuration's.")
    ] = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compare systems on the same images.

    Scores the same images with every system of the configuration, and evaluates them. The default configuration has
    the published settings.

    Writes tables, paired tests, scores, maps and computing times to OUT/zsad-compare/NAME.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    values = parse_overrides(
        overrides,
        name=name,
        seeds=None if seeds is None else list(range(seeds)),
        data__root=None if data is None else str(data.absolute()),
    )
    settings = load_settings(config, values).select_systems(methods)
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import compare as compare_flow

    folder = ensure_writable(out / "zsad-compare" / settings.name)
    print_and_exit(
        run_flow(compare_flow, settings=settings, out=folder, refresh=refresh, dry_run=dry_run), as_json=as_json
    )


@app.command(epilog=example("adflows zsad train april_gan --on data/visa --config compare"))
def train(
    method: Annotated[str, typer.Argument(help="System to train: april_gan, anomalyclip, or its label in CONFIG.")],
    on: Annotated[Path, typer.Option("--on", help="Folder of labelled images with masks to train on.")],
    config: Annotated[
        Path,
        typer.Option("--config", "-c", help="Configuration of the system: a YAML file, or a name in configs/zsad."),
    ] = Path("compare"),
    name: Name = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train a learned system on labelled images.

    Trains on one data set so that the system can score others. Writes checkpoint.safetensors to OUT/zsad-train/NAME.
    Use it with the setting `checkpoint` of the system.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    from zsad.config.system_base import LearnedSettings

    values = parse_overrides(overrides, name=name, data__root=str(on.absolute()))
    settings = load_settings(config, values).select_systems(method)
    if len(settings.systems) != 1 or not isinstance(settings.systems[0], LearnedSettings):
        raise ConfigError(f"{method}: expected one system that is trained: april_gan or anomalyclip, or a label of one")
    system = settings.systems[0]
    settings = settings.model_copy(
        update={"name": name or f"{system.system}-{settings.name}"[:64], "ablations": (), "auxiliary": None}
    )
    from flows.runs.run_folder import ensure_writable
    from flows.zsad.flow import TRAINED_FILES
    from flows.zsad.flow import train as train_flow

    folder = ensure_writable(out / "zsad-train" / settings.name)
    outcome = run_flow(train_flow, settings=settings, out=folder, refresh=refresh, dry_run=dry_run)
    checkpoint = folder.absolute() / TRAINED_FILES[0]
    print_and_exit(outcome, as_json=as_json, lines=[f"checkpoint: {checkpoint}"] if checkpoint.is_file() else [])


@app.command(epilog=example("adflows zsad prompts metal_nut"))
def prompts(
    category: Annotated[str, typer.Argument(help="Name of the object in the images, e.g. metal_nut.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="YAML file, or name in configs/zsad, with prompt settings. Default: built-in ones."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the prompts of a category.

    Prints every text that the text encoder reads for this category: first the normal ones, then the anomalous ones.
    """
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


@app.command(epilog=example("adflows zsad evaluate maps/ masks/ --set max_fpr=0.3"))
def evaluate(
    maps: Annotated[Path, typer.Argument(help="Folder of anomaly maps: .npy or .tiff files of floats.")],
    masks: Annotated[
        Path, typer.Argument(help="Folder of masks with the same names, e.g. PNG; values above 0 are anomalous.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override an `evaluation` setting, e.g. max_fpr=0.3. Repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute metrics of anomaly maps of any tool.

    Compares maps with ground-truth masks and prints AUROC, AP, F1max with its oracle threshold, and AUPRO. The
    figures are exact; scores are not binned. Exit code 2 if a map or mask cannot be used.
    """
    prepare_terminal(as_json=as_json)
    prepare_numpy()
    from medad.base.settings import parse_settings
    from zsad.config.run import EvaluationSettings
    from zsad.steps.evaluate_maps import evaluate_folders

    settings = parse_settings(EvaluationSettings, parse_overrides(overrides), source="--set")
    found = evaluate_folders(maps, masks, settings)
    for line in group_lines(found.problems):
        terminal.failure(line)
    for line in found.notes:
        terminal.line(line)
    if as_json:
        answer = {
            "image": found.image.model_dump(mode="json"),
            "pixel": found.pixel.model_dump(mode="json"),
            "problems": [{"id": problem.case_id, "rule": problem.rule} for problem in found.problems],
            "notes": list(found.notes),
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
