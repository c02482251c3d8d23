"""Write random features of a category to disk, and make the other inputs of a system."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from zsad.clip.feature_store import CLASS_TOKENS, INDEX, FeatureIndex, FeatureStore, ImageRows, output_file
from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import EncoderSettings
from zsad.scorers.interface import CategoryFeatures

GRID, DIM, PATCH_PX = 4, 6, 8


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random vectors of length 1."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def digest_of(name: object) -> str:
    return hashlib.sha256(f"image {name}".encode()).hexdigest()


def write_features(
    folder: Path,
    crops: Sequence[int],
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[object] | None = None,
) -> FeatureStore:
    """Write features of images with the given numbers of crops. `tensors` has one row per crop, by file name."""
    folder.mkdir(parents=True)
    size = GRID * PATCH_PX
    rows, first = [], 0
    for name, count in zip(range(len(crops)) if names is None else names, crops, strict=True):
        width = size + (count - 1) * PATCH_PX
        rows.append(
            ImageRows(
                sha256=digest_of(name),
                height=size,
                width=width,
                canvas=(size, width),
                offsets=tuple((0, crop * PATCH_PX) for crop in range(count)),
                first_row=first,
                rows=count,
            )
        )
        first += count
    for file, values in tensors.items():
        np.save(folder / file, values.numpy())
    index = FeatureIndex(
        size_px=size,
        grid=GRID,
        dim=DIM,
        model="random",
        random_weights=True,
        identity={},
        images=tuple(rows),
        problems=(),
        outputs={
            file.removeprefix("output-").removesuffix(".npy"): tuple(values.shape[1:])
            for file, values in tensors.items()
            if file.startswith("output-")
        },
    )
    (folder / INDEX).write_text(index.model_dump_json(by_alias=True), encoding="utf-8")
    return FeatureStore(folder)


def random_tensors(crops: int, outputs: Mapping[str, tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    """Return random outputs. All have length 1 except `tokens`, which is not normalised."""
    tensors = {
        CLASS_TOKENS: unit(crops, DIM, seed=seed),
        output_file(PATCHES): unit(crops, GRID**2, DIM, seed=seed + 1),
        **{
            output_file(name): unit(crops, *shape, seed=seed + 2 + i) for i, (name, shape) in enumerate(outputs.items())
        },
    }
    if "tokens" in outputs:
        tensors[output_file("tokens")] *= 3.7
    return tensors


def category_features(store: FeatureStore, **changes: Any) -> CategoryFeatures:
    values: dict[str, Any] = {
        "store": store,
        "text": unit(2, store.dim, seed=99),
        "references": np.empty((len(store), 0), dtype=np.int64),
        "shots": None,
        "paths": tuple(Path(f"{number}.png") for number in range(len(store))),
        "category": "carpet",
        "encoder": EncoderSettings(seed=0),
        "checkpoint": None,
        "seed": 0,
        "device": torch.device("cpu"),
        "batch_size": 4,
    }
    return CategoryFeatures(**(values | changes))
