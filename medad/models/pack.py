"""Packs the model of a run folder into the layout of the package's models.

    python -m medad.models.pack RUN_FOLDER OUT

Weights are stored in half precision. The manifest has settings, versions and digests, but no path and no name of a
case or of a data folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from medad.base.errors import ConfigError, InputError, UserError
from medad.base.manifest import MANIFEST, read_manifest
from medad.base.settings import MACHINE_FIELDS
from medad.base.storage import file_digest, write_bytes
from medad.config.liver import DatasetSettings, LiverSettings
from medad.networks import nets
from medad.steps.trained import FILES, MODEL_FOLDER, Part, TrainedModel, parts_of

SCHEMA = "adflows model 1"


def pack(run: Path, out: Path) -> None:
    """Write the model of a run folder to the folder `out`, which must not exist. Its name becomes the model's.

    Raises
    ------
    ConfigError
        `run` is not a run folder with a complete model, its manifest names no training case, or `out` exists.
    InputError
        A file of the model is damaged, or a weight is too large for half precision.
    """
    trained = TrainedModel.of_run(run)
    if out.exists():
        raise ConfigError(f"{out}: exists already; give the name of a new folder")
    manifest = read_manifest(run)
    inputs = _inputs(manifest)
    if not inputs:
        raise ConfigError(f"{run}: {MANIFEST} names no training case, so tests on training cases would not be noticed")
    for part in parts_of(trained.model):
        target = out / MODEL_FOLDER / part.place / part.file
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(part, target)
    files = sorted(path for path in (out / MODEL_FOLDER).rglob("*") if path.is_file())
    packed = {
        "schema": SCHEMA,
        "name": out.name,
        "settings": _settings(trained.settings, out.name),
        "versions": manifest.get("versions", {}),
        "inputs": inputs,
        "files": {path.relative_to(out).as_posix(): {"sha256": file_digest(path)} for path in files},
    }
    write_bytes(out / MANIFEST, (json.dumps(packed, indent=1) + "\n").encode())


def _inputs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the digests of the training cases. A patient's digest has the key of one machine, so it is left out."""
    rows = [row for row in manifest.get("inputs", ()) if row["use"] == "train"]
    return [
        {"use": "train", "case": f"trained-{number}", "sha256": row["sha256"], "patient": None}
        for number, row in enumerate(rows, start=1)
    ]


def _settings(settings: LiverSettings, name: str) -> dict[str, Any]:
    """Return the settings of the training and the segmentation, without those of the data and the machine."""
    none = DatasetSettings(root="-", layout="btcv")
    neutral = {"name": name, "train_data": none, "test_data": none, "folds": None}
    return settings.model_copy(update=neutral).public(*MACHINE_FIELDS)


def _copy(part: Part[Path], target: Path) -> None:
    """Copy a part. A network is copied in half precision."""
    role = next((role for role in nets.PHASES if role == part.kind), None)
    if role is None:
        shutil.copyfile(part.folder / part.file, target)
        return
    source = part.folder / FILES[role]
    net, shape = nets.load(source, role)
    if not all(bool(weight.half().isfinite().all()) for weight in net.parameters()):
        raise InputError(source, "a weight is too large for half precision")
    nets.save(target, net, role, shape, dtype=torch.float16)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit with code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m medad.models.pack", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN_FOLDER", type=Path, help="run folder of `adflows liver train` or `run`")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, such as medad/models/default")
    given = parser.parse_args(arguments)
    try:
        pack(given.run, given.out)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
