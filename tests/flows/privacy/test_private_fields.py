"""Every private field of every settings class: a marked name in it appears in no stored or shown output."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from prefect import Flow
from pydantic import BaseModel

from flows.inbox.flow import liver_inbox
from flows.liver.ablate import ablate
from flows.liver.flow import LiverMaskRequest, SegmentRequest, liver, liver_mask, segment
from flows.liver.hand_steps import StepRequest, hand_step
from flows.liver.sensitivity import SensitivityRequest, sensitivity
from flows.runs.run_folder import RunFolder, publish_run_folder
from flows.runs.runner import LocalRunner
from flows.server.deployments import case_step, liver_nightly, zsad_weekly
from flows.zsad.flow import ScoreRequest, compare, score, zsad
from medad.base.manifest import MANIFEST
from medad.base.private import Private, field_types, is_private, nested_types
from medad.base.settings import Settings
from medad.config.ablation import AblationSettings, RowSettings, SweepSettings
from medad.config.inbox import InboxSettings
from medad.config.liver import LiverSettings, PreprocessSettings
from medad.config.sensitivity import SensitivitySettings
from medad.reports.ablation.report import write_ablation_report
from medad.reports.run.report import write_report as write_liver_report
from medad.reports.sensitivity.report import write_sensitivity_report
from medad.steps.results import AblationResults
from zsad.config.settings import ZsadSettings
from zsad.reports.compare.report import write_compare_report
from zsad.reports.run.outputs import write_score_outputs
from zsad.reports.run.report import write_report as write_zsad_report

SECRET = "doe_jane"
FOLDER = f"/share/{SECRET}"
SCANS: dict[str, Any] = {
    "root": FOLDER,
    "layout": "folder",
    "images": f"{SECRET}/*.nii",
    "labels": f"{SECRET}/*.seg",
    "liver_labels": [1],
    "cases": [SECRET, "lits-17"],
    "patients": f"({SECRET})",
}
CHANGES = {f"test_data.{key}": value for key, value in SCANS.items()} | {"synthesis.texture.folder": FOLDER}
LIVER = {"name": "x", "train_data": SCANS, "test_data": SCANS, "synthesis": {"texture": {"folder": FOLDER}}}
IMAGES = {"root": FOLDER, "masks": FOLDER}
# the name of a weights file is shown
ENCODER = {"model": f"local-dir:{FOLDER}"}, {"model": "ViT-B-16", "weights": f"{FOLDER}/b.pt"}
FILES = dict.fromkeys(("clipseg", "sam", "salient"), f"{FOLDER}/b.pt") | {"trust_salient": True}
SETTINGS: dict[str, Settings] = {
    "liver": LiverSettings.model_validate(LIVER),
    "ablation": AblationSettings.model_validate(
        {
            "name": "x",
            "base": LIVER,
            "set": CHANGES,
            "rows": [
                {"name": "a", "label": "A", "set": CHANGES},
                {"name": "b", "label": "B", "set": LIVER | {"name": "y"}},
            ],
        }
    ),
    "sensitivity": SensitivitySettings.model_validate(
        {
            "healthy": SCANS,
            "settings": {"synthesis": LIVER["synthesis"], "synthesis.texture.folder": FOLDER},
        }
    ),
    "inbox": InboxSettings.model_validate(
        {
            "name": "x",
            "inbox": f"{FOLDER}/in",
            "out": f"{FOLDER}/out",
            "model": f"{FOLDER}/model",
            "scans": f"{SECRET}/*.nii",
            "livers": f"{SECRET}/*.seg",
            "settings": {"synthesis.texture.folder": FOLDER},
        }
    ),
    "inbox, automatic livers": InboxSettings.model_validate(
        {
            "name": "x",
            "inbox": f"{FOLDER}/in",
            "out": f"{FOLDER}/out",
            "model": f"{FOLDER}/model",
            "scans": f"{SECRET}/*.nii",
            "liver_model": f"{FOLDER}/liver.ts",
        }
    ),
    "inbox, node": InboxSettings.model_validate(
        {
            "name": "x",
            "inbox": f"{FOLDER}/in",
            "out": f"{FOLDER}/out",
            "scans": "*",
            "listen": {
                "callers": ["PACS"],
                "tls": {name: f"{FOLDER}/{name}.pem" for name in ("certificate", "key", "peers")},
            },
        }
    ),
    "zsad": ZsadSettings.model_validate(
        {
            "name": "x",
            "data": IMAGES,
            "encoder": ENCODER[0],
            "method": {"system": "dual", "adapt": {"textures": FOLDER}},
        }
    ),
    "zsad, weights": ZsadSettings.model_validate(
        {"name": "x", "data": IMAGES, "encoder": ENCODER[1], "method": {"system": "dual"}}
    ),
    "compare": ZsadSettings.model_validate(
        {
            "name": "x",
            "data": IMAGES,
            "auxiliary": IMAGES,
            "encoders": {"main": ENCODER[0], "other": ENCODER[1]},
            "systems": [
                {"system": "anomalyclip", "checkpoint": f"{FOLDER}/c.safetensors"},
                {"system": "april_gan", "checkpoint": f"{FOLDER}/c.safetensors"},
                {"system": "segmentation", **FILES},
                {"system": "dual", "adapt": {"textures": FOLDER}},
            ],
        }
    ),
}
PATH = Path(FOLDER)
REQUESTS: tuple[BaseModel, ...] = (
    SegmentRequest(scans=(PATH,), liver_masks=(PATH,), liver_model=PATH, model=PATH, out=PATH),
    LiverMaskRequest(scan=PATH, liver_model=PATH),
    StepRequest(names=("window",), source=PATH, liver=PATH, liver_labels=(1,), settings=PreprocessSettings()),
    SensitivityRequest(model=PATH, out=PATH),
    ScoreRequest(images=(PATH,), normal=(PATH,), category=None, out=PATH, threshold=PATH),
)
FLOWS: tuple[Flow[..., Any], ...] = (
    *(
        one.prefect
        for one in (ablate, compare, hand_step, liver, liver_inbox, liver_mask, score, segment, sensitivity, zsad)
    ),
    *(case_step, liver_nightly, zsad_weekly),
)
CONFIG_MODULES = [
    ".".join(path.with_suffix("").parts[-3:])
    for package in ("medad", "zsad")
    for path in (Path(__file__).parents[3] / package / "config").glob("*.py")
]
SUSPECT = frozenset(
    (
        *("case", "cases", "checkpoint", "clipseg", "dir", "file", "files", "folder", "folders", "images", "inbox"),
        *("labels", "liver", "livers", "mask", "masks", "model", "out", "path", "paths", "patient", "patients", "root"),
        *("salient", "sam", "scan", "scans", "textures", "weights"),
    )
)
"""Words in the names of fields that may contain a path, or a name from a path."""


def subclasses(model: type[Settings]) -> Iterator[type[Settings]]:
    for each in model.__subclasses__():
        if each.__module__.split(".")[0] in ("flows", "medad", "zsad"):
            yield each
        yield from subclasses(each)


def models_in(kind: Any) -> Iterator[type[BaseModel]]:
    for part in nested_types(kind):
        if inspect.isclass(part) and issubclass(part, BaseModel):
            yield part
            for inner in field_types(part).values():
                yield from models_in(inner)


def stored_models() -> set[type[BaseModel]]:
    """Return all settings classes, and all models that are parameters of a flow."""
    for name in CONFIG_MODULES:
        importlib.import_module(name)
    found: set[type[BaseModel]] = set(subclasses(Settings))
    for flow in FLOWS:
        for kind in get_type_hints(flow.fn, include_extras=True).values():
            found |= {one for one in models_in(kind) if one.__module__.split(".")[0] in ("flows", "medad", "zsad")}
    return found


def holds_private(kind: Any) -> bool:
    return any(isinstance(part, Private) for part in nested_types(kind))


def is_text(kind: Any) -> bool:
    return any(part is str or (inspect.isclass(part) and issubclass(part, Path)) for part in nested_types(kind))


def marked_fields(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the class and name of each private field of a model that contains the secret."""
    if isinstance(value, BaseModel):
        for name, kind in field_types(type(value)).items():
            inner = getattr(value, name)
            if holds_private(kind) and SECRET in str(inner):
                yield type(value).__name__, name
            yield from marked_fields(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from marked_fields(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from marked_fields(inner)


def test_a_field_that_may_hold_a_path_is_private() -> None:
    """Every field with such a name, or of type Path, must have a type of `medad.base.private`."""
    models = stored_models()
    assert {LiverSettings, SensitivityRequest, ScoreRequest, ZsadSettings} <= models
    open_fields = [
        f"{model.__name__}.{name}"
        for model in models
        for name, kind in field_types(model).items()
        if not holds_private(kind)
        and is_text(kind)
        and (not SUSPECT.isdisjoint(name.split("_")) or any(part is Path for part in nested_types(kind)))
    ]
    assert not open_fields, "give these a type of medad.base.private"


def test_every_private_field_is_marked_here() -> None:
    marked = {field for one in (*SETTINGS.values(), *REQUESTS) for field in marked_fields(one)}
    wanted = {
        (model.__name__, name)
        for model in stored_models()
        if not any(issubclass(other, model) for other in stored_models() - {model})
        for name, kind in field_types(model).items()
        if holds_private(kind)
    }
    assert len(wanted) > 30
    assert wanted <= marked


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_as_json_hold_no_name_and_are_valid(settings: Settings) -> None:
    assert SECRET in str(settings.model_dump())
    for text in (json.dumps(settings.public()), settings.model_dump_json()):
        assert SECRET not in text
    if not isinstance(settings, InboxSettings):  # these settings require different folders; nothing reads them back
        assert type(settings).model_validate(settings.public()).public() == settings.public()


@pytest.mark.parametrize("value", [*SETTINGS.values(), *REQUESTS], ids=lambda value: type(value).__name__)
def test_parameters_as_prefect_stores_them_hold_no_name(value: BaseModel) -> None:
    stored = liver.prefect.serialize_parameters({"value": value})
    assert stored["value"]
    assert SECRET not in json.dumps(stored)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_manifests_hold_no_name(settings: Settings, cache: Path, tmp_path: Path) -> None:
    publish_run_folder(RunFolder(tmp_path / "run", settings, (), dict, 1.0), LocalRunner())
    assert SECRET not in (tmp_path / "run" / MANIFEST).read_text(encoding="utf-8")


ZSAD = ("zsad", "zsad, weights")
REPORTS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "liver run": (
        ("liver",),
        lambda out, settings: write_liver_report(
            out, settings=settings, results=[], failures=[], restoration=None, segmentation=None, versions={}, notes=[]
        ),
    ),
    "ablation": (
        ("ablation",),
        lambda out, settings: write_ablation_report(
            out, settings=settings, results=AblationResults(variants=[]), versions={}
        ),
    ),
    "sensitivity": (
        ("sensitivity",),
        lambda out, settings: write_sensitivity_report(out, settings=settings, results=[], versions={}),
    ),
    "zsad run": (
        ZSAD,
        lambda out, settings: write_zsad_report(
            out, settings=settings, categories=[], failures=[], versions={}, notes=[]
        ),
    ),
    "zsad score": (
        ZSAD,
        lambda out, settings: write_score_outputs(
            out, settings=settings, category=None, failures=[], versions={}, notes=[]
        ),
    ),
    "compare": (
        ("compare",),
        lambda out, settings: write_compare_report(out, settings=settings, systems=[], versions={}),
    ),
}


@pytest.mark.parametrize(
    ("report", "name"), [(report, name) for report, (names, _) in REPORTS.items() for name in names]
)
def test_reports_hold_no_name(report: str, name: str, tmp_path: Path) -> None:
    REPORTS[report][1](tmp_path, SETTINGS[name])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "report.json"} <= names
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes().lower(), path.name
    shown = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["settings"]
    assert "(private path)" in json.dumps(shown), "the settings are listed, and private values are marked as withheld"


@pytest.mark.parametrize("key", ["train_data.root", "train_data", "test_data.patients", "synthesis.texture"])
def test_nothing_private_is_swept_over(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is private and cannot be swept; write one row per value instead"):
        SweepSettings(name="a", label="A", key=key, values=(FOLDER,))


def test_the_value_of_an_unknown_field_is_withheld() -> None:
    assert not is_private(None)
    row = RowSettings(name="a", label="A", set={"test_data.rot": FOLDER})
    assert SECRET not in row.model_dump_json()
