"""Train the built-in liver network.

    python -m medad.organ.training REFERENCE_FILES BTCV --out FILE [--steps 2000] [--seed 1] [--start FILE]

The shipped weights come from 600 steps with seed 1, and 1400 more with seed 2 and --start.

REFERENCE_FILES is the folder tests/reference_files of TotalSegmentator's source distribution 2.18.0
(`pip download --no-deps --no-binary :all: TotalSegmentator==2.18.0`). BTCV is a folder with AMOS scans 1 and 13.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from medad.base.devices import flush_denormals, keep_freed_memory
from medad.base.storage import atomic_path
from medad.organ.network import LiverNet, load_net, logits_of
from medad.organ.training.tissues import Source, read_sources
from medad.organ.training.torsos import draw_source, make_sample

LEARNING_RATE, LAST_RATE, WARM_UP_STEPS = 2e-3, 1e-5, 50
SMOOTH_VOXELS = 50.0
"""Voxels added to both sides of the Dice loss, so that a sample without liver has a loss."""

_logger = logging.getLogger("medad.organ.training")


def train(sources: list[Source], steps: int, seed: int, out: Path, start: Path | None = None) -> LiverNet:
    """Train a network for `steps` samples, one at a time, and write it to `out` every 200 steps and at the end.

    The loss is cross-entropy plus half the Dice loss. The rate falls along a cosine. `start` names a file of weights to
    continue from. None: random weights.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = LiverNet() if start is None else load_net(start).train()
    optimiser = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=1e-3)
    mean_dice = 0.0
    for step in range(steps):
        fall = 0.5 * (1 + np.cos(np.pi * step / steps)) * min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * fall + LAST_RATE
        hu, liver = make_sample(draw_source(sources, rng), rng)
        loss, dice = _loss(logits_of(net, hu), liver)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        mean_dice += (dice - mean_dice) / min(step + 1, 50)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            _logger.info("step %d of %d: Dice %.3f", step + 1, steps, mean_dice)
            save(net, out)
    return net.eval()


def _loss(logits: Tensor, liver: Tensor) -> tuple[Tensor, float]:
    probability = torch.sigmoid(logits)
    total = (probability**2).sum() + (liver**2).sum() + SMOOTH_VOXELS
    dice = (2 * (probability * liver).sum() + SMOOTH_VOXELS) / total
    return functional.binary_cross_entropy_with_logits(logits, liver) + 0.5 * (1 - dice), float(dice.detach())


def save(net: LiverNet, out: Path) -> None:
    """Write the weights in half precision."""
    with atomic_path(out) as temporary:
        save_file({name: value.detach().half().contiguous() for name, value in net.state_dict().items()}, temporary)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(prog="python -m medad.organ.training", description=__doc__)
    parser.add_argument("reference_files", type=Path)
    parser.add_argument("btcv", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_freed_memory()
    with flush_denormals():
        train(read_sources(given.reference_files, given.btcv), given.steps, given.seed, given.out, given.start)


if __name__ == "__main__":
    main()
