"""What training draws its batches from: the healthy slices, and generators that depend on nothing but their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from medad import nets
from medad.errors import InputError
from medad.preprocess import load_prepared

PHASE_CODE: dict[nets.Role, int] = {"restoration": 1, "segmentation": 2}
INITIAL, ORDER, BATCH = 0, 1, 2  # what a generator is for


@dataclass(frozen=True)
class HealthySlices:
    """All training slices, on the device.

    Attributes
    ----------
    pixels
        Grey values 0..255.
    organ
        Liver.
    """

    pixels: UInt8[Tensor, "N 1 S S"]
    organ: Bool[Tensor, "N 1 S S"]


def load_slices(prepared: Sequence[Path], device: torch.device) -> HealthySlices:
    """Gather the slices of prepared folders. Raises InputError when there is none at all or the sizes differ."""
    cases = [load_prepared(folder / "prepared.safetensors").slices for folder in prepared]
    cases = [case for case in cases if len(case.z)]
    if not cases:
        raise InputError("training data", "no slice with liver to train on")
    sides = {case.grid.size_px for case in cases}
    if len(sides) > 1:
        raise InputError("training data", f"cases were prepared at different slice sizes: {sorted(sides)} px")
    pixels = torch.from_numpy(np.concatenate([case.pixels for case in cases]))[:, None]
    organ = torch.from_numpy(np.concatenate([case.organ for case in cases]))[:, None]
    return HealthySlices(pixels.to(device), organ.to(device))


def generator_for(seed: int, phase: nets.Role, purpose: int, index: int, device: torch.device) -> torch.Generator:
    """A generator that depends on nothing but its arguments."""
    state = np.random.SeedSequence((seed, PHASE_CODE[phase], purpose, index)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))
