"""Training batches: the healthy slices, and random generators that depend only on seed, phase and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from medad.anomalies.augment import add_noise, augment
from medad.anomalies.copies import NO_SHIFT, load_copies
from medad.anomalies.lesions import Scale
from medad.anomalies.synthesis import Synthesised, synthesise
from medad.anomalies.textures import Textures
from medad.base.errors import ConfigError, InputError
from medad.config.liver import LiverSettings
from medad.networks import nets
from medad.slices.prepared_file import PREPARED, load_prepared

PHASE_CODE: dict[nets.Role, int] = {"restoration": 1, "segmentation": 2}
INITIAL, ORDER, BATCH = 0, 1, 2  # purposes of a generator


@dataclass(frozen=True)
class LesionSections:
    """Sections of lesions in three dimensions through all slices, on the device.

    Attributes
    ----------
    shift
        Grey values to add, plus `NO_SHIFT`, for each copy of each slice.
    mask
        Pixels inside lesions.
    """

    shift: UInt8[Tensor, "N K S S"]
    mask: Bool[Tensor, "N K S S"]


@dataclass(frozen=True)
class HealthySlices:
    """All training slices, on the device.

    Attributes
    ----------
    pixels
        Grey values, 0..255.
    organ
        Liver mask.
    pixel_mm
        Side of a pixel in mm, one value per slice.
    grey_per_hu
        Grey values per HU. None: grey values are not linear in HU.
    lesions
        Sections of lesions in three dimensions, one entry per copy of a slice. None: without copies.
    """

    pixels: UInt8[Tensor, "N 1 S S"]
    organ: Bool[Tensor, "N 1 S S"]
    pixel_mm: Float[Tensor, " N"]
    grey_per_hu: float | None
    lesions: LesionSections | None = None

    def scale(self, chosen: Int64[Tensor, " B"]) -> Scale:
        """Return pixel size and grey values per HU of these slices.

        Raises ConfigError if grey values are not linear in HU.
        """
        if self.grey_per_hu is None:
            raise ConfigError("lesions and augmentation in HU need slices prepared with preprocess.equalise: false")
        return Scale(self.pixel_mm[chosen], self.grey_per_hu)


def load_slices(prepared: Sequence[Path], device: torch.device, copies: Sequence[Path] = ()) -> HealthySlices:
    """Load the slices of prepared folders onto the device.

    Parameters
    ----------
    copies
        Folders that `medad.anomalies.copies.write_copies` wrote, in the order of `prepared`. Empty: none.

    Raises InputError if no slice is found, or if slice sizes or windows differ.
    """
    loaded = [load_prepared(folder / PREPARED) for folder in prepared]
    loaded = [case for case in loaded if len(case.slices.z)]
    if not loaded:
        raise InputError("training data", "no slice with liver to train on")
    cases = [case.slices for case in loaded]
    sides = {case.grid.size_px for case in cases}
    if len(sides) > 1:
        raise InputError("training data", f"cases were prepared at different slice sizes: {sorted(sides)} px")
    pixels = torch.from_numpy(np.concatenate([case.pixels for case in cases]))[:, None]
    organ = torch.from_numpy(np.concatenate([case.organ for case in cases]))[:, None]
    scales = {case.grey_per_hu for case in loaded}
    if len(scales) > 1:
        raise InputError("training data", "cases were prepared with different windows")
    pixel_mm = torch.tensor([case.spacing_mm[0] for case in loaded for _ in case.slices.z])
    lesions = _load_sections(copies, device) if copies else None
    return HealthySlices(pixels.to(device), organ.to(device), pixel_mm.to(device), scales.pop(), lesions)


def _load_sections(copies: Sequence[Path], device: torch.device) -> LesionSections:
    """Load the sections of all copies, slice by slice."""
    loaded = [load_copies(folder) for folder in copies]
    shift = np.concatenate([each.shift.swapaxes(0, 1) for each in loaded])
    mask = np.concatenate([each.mask.swapaxes(0, 1) for each in loaded])
    return LesionSections(torch.from_numpy(shift).to(device), torch.from_numpy(mask).to(device))


def draw_batch(
    data: HealthySlices,
    chosen: Int64[Tensor, " B"],
    settings: LiverSettings,
    generator: torch.Generator,
    textures: Textures | None,
) -> tuple[Synthesised, Float[Tensor, "B 1 S S"]]:
    """Return slices with pseudo anomalies and the target of their restoration, as grey values 0..255.

    The order is: flips, augmentation, pseudo anomaly, noise. Flips and augmentation also change the target; pseudo
    anomaly and noise do not. Without `train.flip` and `train.augmentation` the target is the unchanged slice, as in the
    thesis.
    """
    clean, organ = data.pixels[chosen].float(), data.organ[chosen]
    sections = None
    if settings.synthesis.kind == "solid_lesions":
        sections = _draw_sections(data, chosen, generator)
    if settings.train.flip:
        flipped = torch.rand(2, len(chosen), 1, 1, 1, generator=generator, device=generator.device) < 0.5
        for flip, axis in zip(flipped, (-1, -2), strict=True):
            clean, organ = torch.where(flip, clean.flip(axis), clean), torch.where(flip, organ.flip(axis), organ)
            if sections is not None:
                shift, mask = sections
                sections = torch.where(flip, shift.flip(axis), shift), torch.where(flip, mask.flip(axis), mask)
    augmentation = settings.train.augmentation
    if augmentation is not None:
        clean = augment(clean, organ, data.scale(chosen), augmentation, generator)
    if sections is not None:
        shift, mask = sections
        batch = Synthesised((clean + shift).clamp(0, 255), mask)
    else:
        scale = data.scale(chosen) if settings.synthesis.kind == "lesions" else None
        batch = synthesise(clean, organ, settings.synthesis, generator, textures, scale)
    if augmentation is not None:
        noisy = add_noise(batch.image, organ, data.scale(chosen), augmentation, generator)
        batch = Synthesised(noisy, batch.mask)
    return batch, clean


def _draw_sections(
    data: HealthySlices, chosen: Int64[Tensor, " B"], generator: torch.Generator
) -> tuple[Float[Tensor, "B 1 S S"], Bool[Tensor, "B 1 S S"]]:
    """Return the grey values to add and the lesions' mask of one random copy of each slice."""
    if data.lesions is None:
        raise ConfigError("synthesis.kind solid_lesions needs copies of the healthy scans")
    copies = data.lesions.shift.shape[1]
    copy = torch.randint(0, copies, (len(chosen),), generator=generator, device=generator.device)
    shift = data.lesions.shift[chosen, copy][:, None].float() - NO_SHIFT
    return shift, data.lesions.mask[chosen, copy][:, None]


def generator_for(seed: int, phase: nets.Role, purpose: int, index: int, device: torch.device) -> torch.Generator:
    """Return a random generator that depends only on the arguments."""
    state = np.random.SeedSequence((seed, PHASE_CODE[phase], purpose, index)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))
