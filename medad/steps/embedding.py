"""Embedding of tumour, healthy and synthesised slices in a plane (figure 3.1 C of the thesis).

A slice is represented by the deepest features of the restoration network, averaged over the liver. The thesis uses
t-SNE and does not name its features. Principal components are used here instead. They are a linear projection without
free parameters and need no additional library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, UInt8
from numpy import ndarray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from medad.base.devices import keep_freed_memory, pick_device
from medad.base.errors import InputError
from medad.config.anomalies import SynthesisSettings
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.steps.examples import draw_anomalies

FEATURES = "features.safetensors"
KINDS = ("tumour", "healthy", "synthesised")
MAX_SLICES = 300
"""Largest number of slices per kind; more points would hide each other in the plot."""


@torch.inference_mode()
def liver_features(
    net: nn.Module,
    pixels: UInt8[ndarray, "N S S"],
    organ: Bool[ndarray, "N S S"],
    device: torch.device,
    largest_batch: int,
) -> Float32[ndarray, "N D"]:
    """Return the deepest features of a restoration network, averaged over the liver of each slice.

    The deepest features have the smallest height and width. They are the output of the encoder in both architectures.

    Parameters
    ----------
    net
        A restoration network on `device`.
    pixels, organ
        Prepared slices, grey 0..255, and their liver masks. The mask is averaged to the size of the features and used
        as a weight, so the result does not depend on the size of the liver.
    """
    per_batch = []
    for start in range(0, len(pixels), largest_batch):
        part = slice(start, start + largest_batch)
        query = torch.from_numpy(pixels[part])[:, None].to(device).float() / 255
        features = _deepest_features(net, query).float()
        share = torch.from_numpy(organ[part])[:, None].to(device).float()
        share = functional.adaptive_avg_pool2d(share, (features.shape[-2], features.shape[-1]))
        per_batch.append(((features * share).sum((2, 3)) / share.sum((2, 3)).clamp_min(1e-6)).cpu().numpy())
    return np.concatenate(per_batch) if per_batch else np.zeros((0, 1), np.float32)


def _deepest_features(net: nn.Module, query: Float[Tensor, "B 1 S S"]) -> Float[Tensor, "B D h w"]:
    """Return the output of the last module with the smallest height and width."""
    # reports import this module too, and need no networks
    from medad.networks import nets

    smallest = query

    def store_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal smallest
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() <= smallest.shape[2:].numel():
            smallest = output

    handles = [module.register_forward_hook(store_output) for module in net.modules() if not list(module.children())]
    try:
        nets.restore(net, query)
    finally:
        for handle in handles:
            handle.remove()
    return smallest


def write_features(
    training: Sequence[Path],
    tested: Sequence[tuple[Path, Path]],
    restoration: Path,
    synthesis: SynthesisSettings,
    seed: int,
    out: Path,
    *,
    copies: Sequence[Path] = (),
    device: str = "auto",
    largest_batch: int = 8,
) -> None:
    """Write features of test slices with tumour, test slices without tumour, and synthesised training slices.

    Parameters
    ----------
    training
        Folders of healthy cases. Their slices are corrupted as in training. Slices without an anomaly are left out.
    tested
        For each test case, its prepared folder and the folder with truth.safetensors.
    restoration
        Folder of the trained restoration network.
    synthesis, seed
        Settings of the network's training.
    out
        Existing folder. features.safetensors is written to it: a tensor f32 [N, D] for each of `KINDS`, with at most
        `MAX_SLICES` slices.
    copies
        Folders of copies with lesions, one for each of `training`. They are needed for synthesis kind `solid_lesions`.

    Raises
    ------
    InputError
        A file cannot be read.
    """
    from medad.networks import nets

    place = pick_device(device)
    keep_freed_memory()
    rng = np.random.default_rng(seed)
    net = nets.fold_standardisation(nets.load(restoration / "model.safetensors", "restoration")[0]).to(place).eval()
    found: dict[str, tuple[list[ndarray], list[ndarray]]] = {kind: ([], []) for kind in KINDS}
    for prepared, evaluated in tested:
        slices = load_prepared(prepared / PREPARED).slices
        tumour = load_file(evaluated / "truth.safetensors")["tumour"].any(axis=(1, 2))
        for kind, chosen in (("tumour", tumour), ("healthy", ~tumour)):
            found[kind][0].append(slices.pixels[chosen])
            found[kind][1].append(slices.organ[chosen])
    pixels, organ = _synthesised_slices(training, copies, synthesis, seed)
    found["synthesised"][0].append(pixels)
    found["synthesised"][1].append(organ)
    arrays = {}
    for kind, (all_pixels, all_organs) in found.items():
        pixels, organ = np.concatenate(all_pixels), np.concatenate(all_organs)
        shown = np.sort(rng.permutation(len(pixels))[:MAX_SLICES])
        arrays[kind] = liver_features(net, pixels[shown], organ[shown], place, largest_batch)
    width = max(array.shape[1] for array in arrays.values())
    empty = np.zeros((0, width), np.float32)
    save_file({kind: np.ascontiguousarray(one) if len(one) else empty for kind, one in arrays.items()}, out / FEATURES)


def _synthesised_slices(
    training: Sequence[Path], copies: Sequence[Path], synthesis: SynthesisSettings, seed: int
) -> tuple[ndarray, ndarray]:
    """Return corrupted training slices that contain an anomaly, as grey values, and their liver masks."""
    from medad.networks.batches import load_slices

    data = load_slices(training, torch.device("cpu"), copies)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.pixels), generator=generator)
    pixels, organs = [], []
    for part in torch.split(order, 32):
        organ = data.organ[part]
        batch, _ = draw_anomalies(data, part, synthesis, generator)
        with_anomaly = batch.mask.flatten(1).any(1)
        pixels.append(batch.image[with_anomaly, 0].round().to(torch.uint8).numpy())
        organs.append(organ[with_anomaly, 0].numpy())
        if sum(map(len, pixels)) >= MAX_SLICES:
            break
    return np.concatenate(pixels), np.concatenate(organs)


def read_features(folder: Path) -> dict[str, Float32[ndarray, "N D"]]:
    """Read the features that `write_features` wrote, by kind. Raises InputError."""
    try:
        arrays = load_file(folder / FEATURES)
        return {kind: arrays[kind] for kind in KINDS}
    except (OSError, KeyError, ValueError) as error:
        raise InputError(folder / FEATURES, f"features cannot be read ({error})") from error


def principal_components(
    features: Float64[ndarray, "N D"],
) -> tuple[Float64[ndarray, "N 2"], tuple[float, float]]:
    """Return coordinates along the two directions of largest variance, and each direction's share of the variance.

    Shares are in 0..1. The largest weight of each direction is positive. With fewer than two samples or no variance,
    all values are zero.
    """
    centred = features - features.mean(axis=0) if len(features) else features
    plane = np.zeros((len(features), 2))
    if len(features) < 2 or not centred.any():
        return plane, (0.0, 0.0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    total = float(np.square(values).sum())
    shares = [0.0, 0.0]
    for axis in range(min(2, len(values))):
        direction = directions[axis] * np.sign(directions[axis][np.abs(directions[axis]).argmax()])
        plane[:, axis] = centred @ direction
        shares[axis] = float(np.square(values[axis]) / total)
    return plane, (shares[0], shares[1])
