"""Batches with sections of lesions in three dimensions: which copies, where, and how they are flipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from medad.anomalies.copies import COPIES, NO_SHIFT
from medad.base.errors import ConfigError
from medad.config.liver import LiverSettings
from medad.networks.batches import HealthySlices, LesionSections, draw_batch, load_slices
from tests.medad.prepared import SIDE, save_slices, tiny_settings
from tests.seeded import generator

PHASE = {"epochs": 1, "batch_size": 4}


def _settings(**train: Any) -> LiverSettings:
    return tiny_settings(
        preprocess={"equalise": False, "standardise": "median"},
        synthesis={"kind": "solid_lesions"},
        train={"restoration": PHASE, "segmentation": PHASE} | train,
    )


def _data(slices: int = 3, copies: int = 4) -> HealthySlices:
    """Return slices whose copies have their own shift: 10 times the slice, plus the copy, plus 1, in a corner."""
    organ = torch.zeros(slices, 1, SIDE, SIDE, dtype=torch.bool)
    organ[..., 4:28, 3:20] = True
    pixels = torch.where(organ, 100, 0).to(torch.uint8)
    mask = torch.zeros(slices, copies, SIDE, SIDE, dtype=torch.bool)
    mask[..., 5:9, 4:12] = True
    number = 10 * torch.arange(slices)[:, None] + torch.arange(copies)[None] + 1
    shift = torch.where(mask, number[..., None, None], 0) + NO_SHIFT
    return HealthySlices(pixels, organ, torch.full((slices,), 2.0), 0.85, LesionSections(shift.to(torch.uint8), mask))


def test_each_slice_gets_one_of_its_own_copies_and_all_are_drawn() -> None:
    data = _data()
    chosen = torch.arange(3).repeat(40)
    batch, clean = draw_batch(data, chosen, _settings(), generator(), None)
    assert torch.equal(clean, data.pixels[chosen].float()), "the restoration's target is the healthy slice"
    added = (batch.image - clean).flatten(1)
    assert torch.equal(batch.mask, data.lesions.mask[chosen, :1] if data.lesions else batch.mask)
    number = added.max(1).values
    assert torch.equal((number - 1).div(10, rounding_mode="floor"), chosen.float())
    assert set(((number - 1) % 10).tolist()) == {0, 1, 2, 3}
    assert torch.equal(added != 0, batch.mask.flatten(1))


def test_flips_turn_slice_and_lesion_together() -> None:
    data = _data()
    batch, clean = draw_batch(data, torch.zeros(64, dtype=torch.long), _settings(flip=True), generator(), None)
    assert data.lesions is not None
    mask, organ = data.lesions.mask[0, :1], data.pixels[0] > 0
    seen = set()
    for image, lesion, healthy in zip(batch.image, batch.mask, clean, strict=True):
        flips = [(), (-1,), (-2,), (-1, -2)]
        [match] = [axes for axes in flips if torch.equal(mask.flip(axes), lesion)]
        assert torch.equal(healthy > 0, organ.flip(match))
        assert torch.equal((image - healthy) != 0, lesion)
        seen.add(match)
    assert len(seen) == 4


def test_grey_values_stay_in_their_range() -> None:
    data = _data()
    assert data.lesions is not None
    for value, end in ((0, 0.0), (255, 255.0)):
        pixels = torch.full_like(data.pixels, 250 if value else 5)
        extreme = LesionSections(torch.full_like(data.lesions.shift, value), data.lesions.mask)
        batch, _ = draw_batch(
            replace(data, pixels=pixels, lesions=extreme), torch.arange(3), _settings(), generator(), None
        )
        assert (batch.image == end).all()


def test_augmentation_is_in_the_target_and_the_lesion_is_not() -> None:
    augmentation = {"offset_hu": 30.0, "noise_hu": (0.0, 0.0)}
    data = _data()
    batch, clean = draw_batch(data, torch.arange(3), _settings(augmentation=augmentation), generator(), None)
    assert not torch.equal(clean, data.pixels.float())
    within = (clean > 20) & (clean < 220)
    assert torch.allclose((batch.image - clean)[~batch.mask & within], torch.tensor(0.0), atol=1e-3)
    assert (batch.image - clean)[batch.mask & within].min() > 0.5


def test_training_without_copies_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs copies"):
        draw_batch(replace(_data(), lesions=None), torch.arange(2), _settings(), generator(), None)


def test_sections_are_loaded_slice_by_slice_in_the_order_of_the_cases(tmp_path: Path) -> None:
    folders = []
    for number, count in ((1, 2), (2, 3)):
        folder = tmp_path / str(number)
        organ = np.ones((count, SIDE, SIDE), bool)
        save_slices(folder, np.full(organ.shape, 100, np.uint8), organ, grey_per_hu=0.85)
        shift = np.zeros((2, count, SIDE, SIDE), np.uint8)
        shift += np.array([[100 * number + 10 * copy + z for z in range(count)] for copy in range(2)], np.uint8)[
            ..., None, None
        ]
        mask = np.zeros(shift.shape, bool)
        mask[..., number] = True
        save_file({"shift": shift, "mask": np.packbits(mask, axis=-1)}, folder / COPIES)
        folders.append(folder)
    data = load_slices(folders, torch.device("cpu"), folders)
    assert data.lesions is not None
    assert data.lesions.shift.shape == (5, 2, SIDE, SIDE)
    expected = [[100, 110], [101, 111], [200, 210], [201, 211], [202, 212]]
    assert data.lesions.shift[:, :, 0, 0].tolist() == expected
    assert data.lesions.mask[0, 0].any(0).nonzero().tolist() == [[1]]
    assert data.lesions.mask[4, 1].any(0).nonzero().tolist() == [[2]]
