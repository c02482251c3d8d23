"""`adflows liver ...`: the flow, its stages and its single steps."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import inbox as cli_inbox
from flows.cli import studies
from flows.cli.options import (
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
from flows.machine.environment import find_config
from medad.base.errors import ConfigError
from medad.config.by_hand import BY_HAND, IN_ORDER, HandStepName

if TYPE_CHECKING:
    from medad.config.liver import LiverSettings

app = typer.Typer(help="Liver tumours in CT, learned from healthy livers alone.", no_args_is_help=True)
app.command(name="inbox")(cli_inbox.inbox)
app.command(name="ablate")(studies.ablate)
app.command(name="sensitivity")(studies.sensitivity)

MASK_RULE = (
    "a liver mask is needed: --liver MASK, on the scan's own grid. One way to get it: "
    "TotalSegmentator -i SCAN -o FOLDER --task total --roi_subset liver, then --liver FOLDER/liver.nii.gz. "
    "Any segmentation will do whose liver value is given by --liver-label (default 1)"
)

Config = Annotated[Path, typer.Argument(help="A YAML file, or a name in configs/liver: thesis, small, demo.")]
Seed = Annotated[int | None, typer.Option(help="Seed of training.")]
Train = Annotated[Path | None, typer.Option("--train", help="Folder of the training data set.")]
Test = Annotated[Path | None, typer.Option("--test", help="Folder of the test data set.")]
Liver = Annotated[list[Path] | None, typer.Option("--liver", help="Liver mask on the scan's grid.")]
LiverLabel = Annotated[list[int] | None, typer.Option("--liver-label", help="Value(s) of liver in the mask.")]
Model = Annotated[Path, typer.Option("--model", help="Folder of a run with trained networks.")]


def load_settings(config: Path, overrides: dict[str, Any]) -> LiverSettings:
    """Read a configuration. Raises ConfigError."""
    from medad.config.liver import load

    return load(find_config(config, "liver"), overrides)


def _path_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@app.command()
def run(
    config: Config,
    train: Train = None,
    test: Test = None,
    name: Name = None,
    seed: Seed = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Everything: prepare, train, segment, evaluate, report."""
    prepare_command(verbose=verbose)
    values = parse_overrides(
        overrides, name=name, seed=seed, train_data__root=_path_text(train), test_data__root=_path_text(test)
    )
    settings = load_settings(config, values)
    from flows.liver.flow import liver
    from flows.runs.run_folder import ensure_writable

    folder = ensure_writable(out / "liver" / settings.name)
    print_and_exit(run_flow(liver, settings=settings, out=folder, refresh=refresh, dry_run=dry_run), as_json=as_json)


@app.command()
def prepare(
    config: Config,
    train: Train = None,
    test: Test = None,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prepare all cases of a configuration and list them: finds bad files before a night of training."""
    prepare_command(verbose=verbose)
    values = parse_overrides(overrides, train_data__root=_path_text(train), test_data__root=_path_text(test))
    settings = load_settings(config, values)
    from flows.liver.flow import prepare as prepare_flow

    outcome = run_flow(prepare_flow, settings=settings, refresh=refresh, dry_run=dry_run)
    lines = []
    for use in ("train", "test"):
        for case in outcome.details.get(use, []):
            facts = json.loads((Path(case["folder"]) / "case.json").read_text(encoding="utf-8"))
            lines.append(f"{use:<5} {case['case']:<20} {facts['slices']:>4} slices  {facts['liver_ml']:>6.0f} mL liver")
            lines += [f"      {warning}" for warning in facts["warnings"]]
    print_and_exit(outcome, as_json=as_json, lines=lines)


@app.command(name="export-slices")
def export_slices(
    config: Config,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write: liver/test, liver/ground_truth.")],
    train: Train = None,
    test: Test = None,
    with_training: Annotated[
        bool, typer.Option("--with-training", help="Also liver/train/good, the training cases' slices.")
    ] = False,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the prepared slices of a configuration's test cases as PNG with tumour masks, in MVTec AD's layout."""
    prepare_command(verbose=verbose)
    values = parse_overrides(overrides, train_data__root=_path_text(train), test_data__root=_path_text(test))
    settings = load_settings(config, values)
    from flows.liver.flow import export_slices as export_flow
    from flows.runs.run_folder import ensure_writable
    from medad.steps.export_slices import CATEGORY

    target = out.absolute() / CATEGORY
    if target.exists():
        raise ConfigError(f"{target}: already there; slices of two exports would be one data set")
    if not dry_run:
        ensure_writable(target)
    outcome = run_flow(export_flow, settings=settings, with_training=with_training, refresh=refresh, dry_run=dry_run)
    exported = outcome.details.get("exported", [])
    if exported:
        _copy_pictures(exported, target)
    lines = [f"{each['case']:<20} {each['slices']:>4} slices" for each in exported]
    print_and_exit(outcome, as_json=as_json, lines=lines)


@app.command(name="train")
def train_command(
    config: Config,
    train: Train = None,
    name: Name = None,
    seed: Seed = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prepare the training cases and train both phases; the run folder holds the model."""
    prepare_command(verbose=verbose)
    values = parse_overrides(overrides, name=name, seed=seed, train_data__root=_path_text(train))
    settings = load_settings(config, values)
    from flows.liver.flow import train as train_flow
    from flows.runs.run_folder import ensure_writable

    folder = ensure_writable(out / "liver" / settings.name)
    print_and_exit(
        run_flow(train_flow, settings=settings, out=folder, refresh=refresh, dry_run=dry_run), as_json=as_json
    )


@app.command()
def evaluate(
    config: Config,
    model: Model,
    test: Test = None,
    name: Name = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Segment and evaluate a configuration's test cases with the networks of an earlier run."""
    prepare_command(verbose=verbose)
    from flows.liver.run_folder import settings_of_run

    of_model = settings_of_run(model)
    values = parse_overrides(overrides, name=name, test_data__root=_path_text(test))
    settings = load_settings(config, values)
    if settings.preprocess != of_model.preprocess:
        raise ConfigError(f"{config}: `preprocess` differs from what the model in {model} was trained with")
    if (out / "liver" / settings.name).absolute() == model.absolute():
        raise ConfigError(f"{model}: would be written over; give the evaluation another --name")
    from flows.liver.flow import evaluate as evaluate_flow
    from flows.runs.run_folder import ensure_writable

    folder = ensure_writable(out / "liver" / settings.name)
    print_and_exit(
        run_flow(
            evaluate_flow, settings=settings, model=model.absolute(), out=folder, refresh=refresh, dry_run=dry_run
        ),
        as_json=as_json,
    )


@app.command()
def segment(
    scans: Annotated[list[Path], typer.Argument(metavar="SCAN...", help="NIfTI, MHD, NRRD, or a DICOM folder.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write: masks, probabilities, report.")],
    liver: Liver = None,
    liver_label: LiverLabel = None,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Segment scans with the networks of an earlier run. Give --liver once for each scan, in the same order."""
    prepare_command(verbose=verbose)
    masks = liver or []
    if not masks:
        raise ConfigError(MASK_RULE)
    if len(masks) != len(scans):
        raise ConfigError(f"{len(scans)} scans but {len(masks)} liver masks: give --liver once for each scan, in order")
    from flows.liver.run_folder import settings_of_run, settings_over
    from flows.runs.run_folder import ensure_writable
    from medad.config.liver import DatasetSettings

    if model.resolve() == out.resolve():
        raise ConfigError(f"{out}: would be written over; give another folder than the model's")
    of_model = settings_of_run(model)
    wanted = parse_overrides(overrides)
    settings = settings_over(of_model, wanted, model=model, source="--set")
    # these scans, and not the data the model's run was tested on, where lesions may have been inserted
    data = DatasetSettings(
        root="-",
        layout="folder",
        images="*",
        labels="*",
        liver_labels=tuple(liver_label or [1]),
        affine_from=wanted.get("test_data.affine_from", "agree"),
        affine_mismatch=wanted.get("test_data.affine_mismatch", "error"),
        pseudonyms=True,
    )
    settings = settings.model_copy(update={"test_data": data, "name": f"segmented-by-{settings.name}"[:64]})
    from flows.liver.flow import SegmentRequest
    from flows.liver.flow import segment as segment_flow

    request = SegmentRequest(
        scans=tuple(path.absolute() for path in scans),
        liver_masks=tuple(path.absolute() for path in masks),
        model=model.absolute(),
        out=ensure_writable(out),
    )
    print_and_exit(
        run_flow(segment_flow, request=request, settings=settings, refresh=refresh, dry_run=dry_run), as_json=as_json
    )


@app.command()
def step(
    name: Annotated[HandStepName, typer.Argument(metavar="STEP", help=IN_ORDER)],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="What the step before wrote; for window a CT.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, or a folder to write it into.")],
    liver: Annotated[Path | None, typer.Option("--liver", help="Liver mask, for roi and slice.")] = None,
    liver_label: LiverLabel = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A preprocess setting, as slice_px=128.")
    ] = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """One preprocessing step by hand; each takes what the one before it wrote."""
    prepare_command(verbose=verbose)
    if BY_HAND[name].needs_liver and liver is None:
        raise ConfigError(MASK_RULE)
    from pydantic import ValidationError

    from medad.config.liver import PreprocessSettings

    try:
        settings = PreprocessSettings.model_validate(parse_overrides(overrides))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--set {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    from flows.liver.flow import StepRequest, hand_step

    request = StepRequest(
        name=name,
        source=source.absolute(),
        liver=None if liver is None else liver.absolute(),
        liver_labels=tuple(liver_label or [1]),
        settings=settings,
    )
    outcome = hand_step.plan(request, refresh) if dry_run else hand_step.local(request, refresh)
    lines = []
    if folder := outcome.details.pop("folder", None):
        written = _copy_result(Path(folder), out)
        outcome.details["written"] = str(written)
        lines.append(f"wrote {written}")
    print_and_exit(outcome, as_json=as_json, lines=lines)


def _copy_pictures(exported: list[dict[str, Any]], target: Path) -> None:
    """Copy all cases' pictures, their names headed by the case's id, and count slices in the place of folders."""
    work = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        for each in exported:
            folder, each["slices"] = Path(each.pop("folder")), 0
            for picture in sorted(folder.rglob("*.png")):
                below = picture.relative_to(folder)
                copy = work / below.with_name(f"{each['case']}-{below.name}")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, copy)
                each["slices"] += below.parts[0] != "ground_truth"
        work.rename(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy_result(folder: Path, out: Path) -> Path:
    """Copy a step's one result to where the user wants it. Raises ConfigError for another kind of file."""
    from medad.ct.io import atomic_path

    result = next(path for path in sorted(folder.iterdir()) if path.name != "artifact.json")
    ending = ".nii.gz" if result.name.endswith(".nii.gz") else result.suffix
    if out.is_dir() or not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        out = out / result.name
    elif not out.name.endswith(ending):
        raise ConfigError(f"{out}: this step writes a {ending} file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        shutil.copyfile(result, temporary)
    return out.absolute()
