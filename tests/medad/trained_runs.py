"""Run folders of the liver flow with tiny networks, as `adflows liver train` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from medad.base.manifest import MANIFEST
from medad.config.liver import (
    DatasetSettings,
    InferenceSettings,
    LiverSettings,
    NetSettings,
    PostprocessSettings,
    PreprocessSettings,
)
from medad.networks import nets

NET = NetSettings(widths=(8, 8, 8), groups=4)
SETTINGS = LiverSettings(
    name="tiny",
    train_data=DatasetSettings(root="-", layout="btcv"),
    test_data=DatasetSettings(root="-", layout="btcv"),
    preprocess=PreprocessSettings(slice_px=64),
    restoration=NET,
    segmentation=NET,
    inference=InferenceSettings(batch_size=4),
    postprocess=PostprocessSettings(threshold=0.5, min_lesion_mm3=200),
    viewer=False,
)


def write_run(folder: Path) -> Path:
    """Write a run folder of networks with seeded random weights. Tests check where results go, not their quality."""
    for role in nets.PHASES:
        (folder / "model" / role).mkdir(parents=True)
        net = nets.build(role, NET, torch.Generator().manual_seed(1))
        nets.save(folder / "model" / role / "model.safetensors", net, role, NET)
    manifest = {"name": SETTINGS.name, "settings": SETTINGS.model_dump(mode="json")}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def trained(folder: Path) -> Path:
    """Write a run folder with tiny networks and short training curves."""
    run = write_run(folder)
    for net in (run / "model").iterdir():
        curve = {"phase": net.name, "epochs": 1, "steps": [1], "loss": [0.5]}
        (net / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
    return run
