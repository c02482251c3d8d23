"""Example slices of a trained restoration network: clean, corrupted, restored (figures 3.2 and 3.5 of the thesis)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.numpy import save_file
from torch import Tensor

from medad.anomalies.synthesis import Synthesised
from medad.base.devices import keep_freed_memory, pick_device
from medad.config.anomalies import SynthesisSettings
from medad.config.liver import DatasetSettings, LiverSettings

if TYPE_CHECKING:
    from medad.networks.batches import HealthySlices

EXAMPLES = "examples.safetensors"
CANDIDATES_PER_SLICE = 8
"""Slices corrupted per requested example: Algorithm 1 leaves most slices without an anomaly."""


@torch.inference_mode()
def write_examples(
    prepared: Sequence[Path],
    restoration: Path,
    synthesis: SynthesisSettings,
    seed: int,
    count: int,
    out: Path,
    *,
    copies: Sequence[Path] = (),
    device: str = "auto",
    largest_batch: int = 8,
) -> None:
    """Corrupt training slices as training does, restore them, and write some that contain an anomaly.

    The choice of slices depends on the seed and the number of slices, not on the networks. Rows with equal
    preprocessing and synthesis therefore show the same slices.

    Parameters
    ----------
    prepared
        Folders of healthy cases.
    restoration
        Folder of the trained restoration network.
    synthesis, seed
        Settings of the row's training.
    count
        Number of slices to write. Fewer are written if fewer contain an anomaly, possibly none.
    out
        Existing folder. examples.safetensors is written to it: `clean`, `spoilt` (corrupted) and `restored` (grey, u8
        [K, S, S]), `mask` and `organ` (u8 [K, S, S], 0 or 1).
    copies
        Folders of copies with lesions, one for each of `prepared`. They are needed for synthesis kind `solid_lesions`.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    largest_batch
        Most slices that are restored at a time.
    """
    # reports import this module too, and need no networks
    from medad.networks import nets
    from medad.networks.batches import load_slices

    place = pick_device(device)
    keep_freed_memory()
    # choose slices on the CPU, so that all devices show the same
    data = load_slices(prepared, torch.device("cpu"), copies)
    generator = torch.Generator().manual_seed(seed)
    area = data.organ.sum((1, 2, 3))
    large = torch.nonzero(area >= area.float().median())[:, 0]
    chosen = large[torch.randperm(len(large), generator=generator)][: count * CANDIDATES_PER_SLICE]
    batch, clean = draw_anomalies(data, chosen, synthesis, generator)
    with_anomaly = torch.nonzero(batch.mask.flatten(1).any(1))[:count, 0]
    net = nets.fold_standardisation(nets.load(restoration / "model.safetensors", "restoration")[0]).to(place).eval()
    spoilt = batch.image[with_anomaly]
    restored = [nets.restore(net, part.to(place) / 255).float().cpu() for part in torch.split(spoilt, largest_batch)]
    grey = torch.cat(restored).clamp(0, 1) * 255 if restored and len(spoilt) else torch.zeros_like(spoilt)
    arrays = {
        "clean": clean[with_anomaly],
        "spoilt": spoilt,
        "restored": grey,
        "mask": batch.mask[with_anomaly],
        "organ": data.organ[chosen][with_anomaly],
    }
    save_file({name: _as_uint8(value) for name, value in arrays.items()}, out / EXAMPLES)


def draw_anomalies(
    data: HealthySlices, chosen: Int64[Tensor, " B"], synthesis: SynthesisSettings, generator: torch.Generator
) -> tuple[Synthesised, Float[Tensor, "B 1 S S"]]:
    """Return slices with pseudo anomalies as in training, but without augmentation, and the clean slices."""
    from medad.networks.batches import draw_batch

    none = DatasetSettings(root="-", layout="btcv")
    plain = LiverSettings(name="examples", train_data=none, test_data=none)
    return draw_batch(data, chosen, plain.model_copy(update={"synthesis": synthesis}), generator, None)


def _as_uint8(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values[:, 0].float().round().to(torch.uint8).numpy())
