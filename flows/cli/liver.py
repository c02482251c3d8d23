"""`adflows liver ...`: the liver flow, its stages and its preprocessing steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli import inbox as cli_inbox
from flows.cli import liver_mask, liver_step, studies
from flows.cli.copies import copy_pictures
from flows.cli.header_options import AffineFrom, AffineMismatch, SpacingMm, header_settings
from flows.cli.listen import listen
from flows.cli.liver_options import (
    Base,
    Config,
    DefaultModel,
    Devices,
    LiverLabel,
    Model,
    NoViewer,
    Seed,
    Test,
    Train,
    load_settings,
    path_text,
)
from flows.cli.options import (
    DryRun,
    Json,
    Name,
    Quiet,
    Refresh,
    Runs,
    Set,
    Verbose,
    example,
    parse_overrides,
    prepare_command,
    print_and_exit,
    run_flow,
)
from flows.cli.scan_folders import expand_folders
from flows.cli.series import SeriesName, choose_scans, series
from flows.cli.view import view
from medad.base.errors import ConfigError

app = typer.Typer(
    help="""Find liver tumours in CT: train, evaluate, segment.

    The networks are trained on healthy livers only, with synthetic anomalies. `run` does everything; the other
    commands do one part of it, or use a trained model.
    """,
    epilog=example(
        "adflows liver segment scan.nii.gz -o out", "adflows liver run default --train data/btcv --test data/lits"
    ),
    no_args_is_help=True,
)

Liver = Annotated[
    list[Path] | None,
    typer.Option(
        "--liver",
        metavar="auto|MASK",
        help="Liver mask on the scan's grid, once per scan, in the same order. Default: auto, which finds the liver.",
    ),
]


@app.command(epilog=example("adflows liver run default --train data/btcv --test data/lits"))
def run(
    config: Config,
    train: Train = None,
    test: Test = None,
    name: Name = None,
    seed: Seed = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    no_viewer: NoViewer = False,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train, segment, evaluate and report.

    Prepares the training and test scans, trains both networks, segments the test scans and evaluates them. The data
    folders are those of the configuration, unless --train and --test name others.

    Writes the report, pages to scroll through the scans, masks, probabilities and the model to OUT/liver/NAME.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    roots = {"train_data__root": path_text(train), "test_data__root": path_text(test)}
    values = parse_overrides(overrides, name=name, seed=seed, viewer=False if no_viewer else None, **roots)
    settings = load_settings(config, values)
    from flows.liver.flow import liver
    from flows.runs.run_folder import ensure_writable

    folder = ensure_writable(out / "liver" / settings.name)
    print_and_exit(run_flow(liver, settings=settings, out=folder, refresh=refresh, dry_run=dry_run), as_json=as_json)


@app.command(epilog=example("adflows liver prepare default --train data/btcv --test data/lits"))
def prepare(
    config: Config,
    train: Train = None,
    test: Test = None,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Prepare all scans and list them.

    Reads and checks every scan and label of the configuration, and caches the prepared slices. Finds bad files before
    a long training. Prints slices and liver volume in mL per case.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    values = parse_overrides(overrides, train_data__root=path_text(train), test_data__root=path_text(test))
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


@app.command(name="export-slices", epilog=example("adflows liver export-slices hu_small --test data/lits -o slices"))
def export_slices(
    config: Config,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to: liver/test and liver/ground_truth.")],
    train: Train = None,
    test: Test = None,
    with_training: Annotated[
        bool,
        typer.Option("--with-training", help="Also write the slices of the training cases, to liver/train/good."),
    ] = False,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write prepared slices as PNG images.

    Writes the slices of the test cases and their tumour masks in MVTec AD's layout, to OUT/liver. Image tools such as
    `adflows zsad run` can read them. OUT/liver must not exist yet. Cases get pseudonyms.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    values = parse_overrides(overrides, train_data__root=path_text(train), test_data__root=path_text(test))
    settings = load_settings(config, values)
    from flows.liver.flow import export_slices as export_flow
    from flows.runs.run_folder import ensure_writable
    from medad.steps.export_slices import CATEGORY

    target = out.absolute() / CATEGORY
    if target.exists():
        raise ConfigError(f"{target}: exists already; slices of two exports would become one data set")
    if not dry_run:
        ensure_writable(target)
    outcome = run_flow(export_flow, settings=settings, with_training=with_training, refresh=refresh, dry_run=dry_run)
    exported = outcome.details.get("exported", [])
    if exported:
        copy_pictures(exported, target)
    lines = [f"{each['case']:<20} {each['slices']:>4} slices" for each in exported]
    print_and_exit(outcome, as_json=as_json, lines=lines)


@app.command(name="train", epilog=example("adflows liver train default --from default --train data/btcv"))
def train_command(
    config: Config,
    train: Train = None,
    base: Base = None,
    name: Name = None,
    seed: Seed = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train a model.

    Prepares the training scans and trains both networks, the restoration and the segmentation. Writes the model and
    its training curves to OUT/liver/NAME. An interrupted training continues from its last checkpoint.

    With --from, each member of the model starts from that member of another model. The networks and `preprocess` of
    CONFIG must then be those of the other model.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    values = parse_overrides(overrides, name=name, seed=seed, train_data__root=path_text(train))
    settings = load_settings(config, values)
    from flows.liver.flow import train as train_flow
    from flows.liver.run_folder import require_same_model
    from flows.runs.run_folder import ensure_writable
    from medad.config.packaged import model_folder

    folder = ensure_writable(out / "liver" / settings.name)
    if base is not None:
        base = model_folder(base).absolute()
        require_same_model(settings, base, source=str(config))
        if base.resolve() == folder.resolve():
            raise ConfigError(f"{folder}: would be overwritten; give the new model another --name")
    print_and_exit(
        run_flow(train_flow, settings=settings, out=folder, base=base, refresh=refresh, dry_run=dry_run),
        as_json=as_json,
    )


@app.command(epilog=example("adflows liver evaluate default --model runs/liver/default --test data/lits --name lits"))
def evaluate(
    config: Config,
    model: Model,
    test: Test = None,
    name: Name = None,
    overrides: Set = None,
    out: Runs = Path("runs"),
    no_viewer: NoViewer = False,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Evaluate a trained model on test cases.

    Segments the configuration's test cases with the networks in --model and compares the masks with the labels. The
    configuration's `preprocess` settings must be those of the model.

    Writes report, masks and probabilities to OUT/liver/NAME. NAME must differ from the model's.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    from flows.liver.run_folder import require_evaluable
    from medad.config.packaged import model_folder

    model = model_folder(model)
    values = parse_overrides(overrides, name=name, viewer=False if no_viewer else None, test_data__root=path_text(test))
    settings = load_settings(config, values)
    require_evaluable(settings, model, source=str(config))
    if (out / "liver" / settings.name).absolute() == model.absolute():
        raise ConfigError(f"{model}: would be overwritten; give the evaluation another --name")
    from flows.liver.flow import evaluate as evaluate_flow
    from flows.runs.run_folder import ensure_writable

    folder = ensure_writable(out / "liver" / settings.name)
    print_and_exit(
        run_flow(
            evaluate_flow, settings=settings, model=model.absolute(), out=folder, refresh=refresh, dry_run=dry_run
        ),
        as_json=as_json,
    )


@app.command(epilog=example("adflows liver segment scan.nii.gz -o out"))
def segment(
    scans: Annotated[
        list[Path],
        typer.Argument(metavar="SCAN", help="Scans: NIfTI, MHD or NRRD files, or DICOM (folder, zip, or one file)."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write: masks, probabilities and report.")],
    model: DefaultModel = None,
    liver: Liver = None,
    liver_label: LiverLabel = None,
    liver_model: liver_mask.LiverModel = None,
    trust: liver_mask.Trust = False,
    series_name: SeriesName = None,
    affine_from: AffineFrom = None,
    affine_mismatch: AffineMismatch = None,
    spacing_mm: SpacingMm = None,
    names: Annotated[
        Literal["pseudonyms", "original"],
        typer.Option(help="Names of the files in OUT: pseudonyms, or the names of the scans' files."),
    ] = "pseudonyms",
    dicom: Annotated[
        bool,
        typer.Option("--dicom", help="Also write DICOM SEG, SR and PDF, which have the patient's data."),
    ] = False,
    no_viewer: NoViewer = False,
    devices: Devices = None,
    overrides: Set = None,
    refresh: Refresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Segment scans with a trained model.

    Finds the liver of each scan, or takes the masks given with --liver, on the scan's grid. Writes tumour masks, tumour
    probabilities, lesion tables and a report to OUT, and the livers that it found to OUT/liver_masks. No tumour labels
    are needed. SCAN can be a folder of volumes, and --liver a folder of masks with the same names.

    Cases get pseudonyms. With --names original the files in OUT have the names of the scans.
    """
    prepare_command(verbose=verbose, quiet=quiet, as_json=as_json)
    masks: list[Path] = [] if liver in (None, [Path("auto")]) else liver or []
    scans, masks = expand_folders(scans, masks)
    if masks and len(masks) != len(scans):
        raise ConfigError(f"{len(scans)} scans but {len(masks)} liver masks: give --liver once for each scan, in order")
    from flows.liver.run_folder import settings_of_run, settings_with_changes
    from flows.runs.run_folder import ensure_writable
    from medad.config.liver import DatasetSettings
    from medad.config.packaged import model_folder

    run = model_folder(model)
    if run.resolve() == out.resolve():
        raise ConfigError(f"{out}: would be overwritten; give another folder than the model's")
    of_model = settings_of_run(run)
    wanted = parse_overrides(overrides, gpus=devices, viewer=False if no_viewer else None)
    settings = settings_with_changes(of_model, wanted, model=run, source="--set")
    # the given scans replace the test data of the model's run, which may have inserted lesions
    data = DatasetSettings(
        root="-",
        layout="folder",
        images="*",
        labels="*",
        liver_labels=tuple(liver_label or ()),
        **header_settings(affine_from, affine_mismatch, spacing_mm, wanted).model_dump(),
        fill_cavities=True,
        pseudonyms=True,
    )
    settings = settings.model_copy(update={"test_data": data, "name": f"segmented-by-{settings.name}"[:64]})
    from flows.liver.flow import SegmentRequest
    from flows.liver.flow import segment as segment_flow

    request = SegmentRequest(
        scans=tuple(choose_scans(scans, masks or [None] * len(scans), series_name)),
        liver_masks=tuple(path.absolute() for path in masks),
        liver_model=None if liver_model is None else liver_model.absolute(),
        trust=trust,
        model=run.absolute(),
        out=ensure_writable(out),
        dicom=dicom,
        original_names=names == "original",
    )
    print_and_exit(
        run_flow(segment_flow, request=request, settings=settings, refresh=refresh, dry_run=dry_run), as_json=as_json
    )


app.command(
    name="step",
    epilog=example("adflows liver step window scan.nii.gz --liver liver.nii.gz --through equalise -o out.safetensors"),
)(liver_step.step)
app.command(name="series", epilog=example("adflows liver series /media/cd"))(series)
app.command(name="view", epilog=example("adflows liver view segmented"))(view)
app.command(name="mask", epilog=example("adflows liver mask scan.nii.gz -o liver.nii.gz"))(liver_mask.mask)
app.command(name="inbox", epilog=example("adflows liver inbox inbox.yaml --watch 60"))(cli_inbox.inbox)
app.command(name="listen", epilog=example("adflows liver listen inbox.yaml"))(listen)
app.command(name="ablate", epilog=example("adflows liver ablate ablation_hu --train data/btcv --test data/lits"))(
    studies.ablate
)
app.command(
    name="sensitivity", epilog=example("adflows liver sensitivity runs/liver/mine --healthy data/btcv -o found")
)(studies.sensitivity)
