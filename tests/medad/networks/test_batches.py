"""Batches of a training step: lesions, augmentation and flips in HU; and the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from medad.base.errors import ConfigError, InputError
from medad.config.liver import LiverSettings
from medad.config.training import PhaseSettings
from medad.networks.batches import HealthySlices, draw_batch, load_slices
from medad.networks.schedule import learning_rate
from medad.networks.train import train_restoration, train_segmentation
from tests.medad.prepared import SIDE, save_slices, tiny_settings
from tests.seeded import generator

PHASE = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "rate": "one_cycle"}


def _settings(**changes: Any) -> LiverSettings:
    values: dict[str, Any] = {
        "preprocess": {"equalise": False, "standardise": "median", "window_hu": (-150, 150), "background": "median"},
        "synthesis": {"kind": "lesions", "lesions": {"empty_share": 0.0}},
        "train": {"restoration": PHASE, "segmentation": PHASE, "flip": True, "augmentation": {}},
    }
    return tiny_settings(**(values | changes))


def _slices(count: int, grey_per_hu: float | None = 0.85) -> HealthySlices:
    place = torch.arange(SIDE)
    organ = ((place[:, None] > 4) & (place[:, None] < 26) & (place[None] > 2) & (place[None] < 20)).expand(
        count, 1, SIDE, SIDE
    )
    ramp = (100 + place[None] + place[:, None]).expand(count, 1, SIDE, SIDE)
    pixels = torch.where(organ, ramp, 128).to(torch.uint8)
    return HealthySlices(pixels, organ, torch.full((count,), 2.0), grey_per_hu)


def test_the_thesiss_batch_is_the_slices_as_they_are() -> None:
    settings = _settings(preprocess={}, synthesis={}, train={"restoration": PHASE, "segmentation": PHASE})
    data = _slices(6, None)
    chosen = torch.tensor([3, 1])
    batch, clean = draw_batch(data, chosen, settings, generator(), None)
    assert torch.equal(clean, data.pixels[chosen].float())
    assert torch.equal(batch.image[~batch.mask], clean[~batch.mask])


def test_mirroring_turns_slice_and_organ_together_and_both_ways() -> None:
    settings = _settings(train={"restoration": PHASE, "segmentation": PHASE, "flip": True})
    data = _slices(64)
    batch, clean = draw_batch(data, torch.arange(64), settings, generator(), None)
    whole = data.pixels[0].float()
    turned = [whole, whole.flip(-1), whole.flip(-2), whole.flip(-1).flip(-2)]
    kinds = torch.tensor([[torch.equal(each, turn) for turn in turned] for each in clean])
    assert kinds.any(1).all()
    assert (kinds.sum(0) > 6).all(), "each about a quarter of 64"
    organ = data.organ[0]
    organs = torch.stack([organ, organ.flip(-1), organ.flip(-2), organ.flip(-1).flip(-2)])
    outside = ~organs[kinds.float().argmax(1)]
    assert not (batch.mask & outside).any()
    assert torch.equal(batch.image[outside], clean[outside]), (
        "lesions lie in the organ, which is flipped with its slice"
    )


def test_variation_is_in_the_target_and_noise_is_not() -> None:
    noisy = {"noise_hu": (15.0, 15.0), "field_hu": 0.0, "vessels": 0, "rim_px": 0.0, "gain_log": 0.0, "offset_hu": 30.0}
    settings = _settings(train={"restoration": PHASE, "segmentation": PHASE, "augmentation": noisy})
    data = _slices(16)
    batch, clean = draw_batch(data, torch.arange(16), settings, generator(), None)
    organ, untouched = data.organ, data.organ & ~batch.mask
    shift = torch.where(organ, clean - data.pixels, 0.0).flatten(1).sum(1) / organ.flatten(1).sum(1)
    assert shift.std() > 5, "the offset changed the target"
    residual = (batch.image - clean)[untouched]
    assert abs(float(residual.std()) - 15 * 0.85) < 3, "the noise is in the query only"


def test_lesions_need_slices_that_are_linear_in_hu() -> None:
    with pytest.raises(ConfigError, match="equalise: false"):
        draw_batch(_slices(2, None), torch.arange(2), _settings(), generator(), None)
    with pytest.raises(ValidationError, match="equalise: false"):
        _settings(preprocess={})
    with pytest.raises(ValidationError, match="equalise: false"):
        _settings(preprocess={}, synthesis={})
    with pytest.raises(ValidationError, match="background median"):
        _settings(preprocess={"background": "median"})
    with pytest.raises(ValidationError, match="snapshot_epochs needs"):
        _settings(train={"restoration": PHASE, "segmentation": PHASE, "snapshot_epochs": 1})


def _save(folder: Path, count: int, spacing_mm: float, grey_per_hu: float | None) -> Path:
    data = _slices(count)
    affine = np.diag([-spacing_mm, -spacing_mm, 5, 1])
    pixels, organ = data.pixels[:, 0].numpy(), data.organ[:, 0].numpy()
    return save_slices(folder, pixels, organ, affine=affine, grey_per_hu=grey_per_hu)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("prepared")
    return [_save(root / f"{spacing_mm} mm", 6, spacing_mm, 0.85) for spacing_mm in (1.0, 3.0)]


def test_every_slice_keeps_its_own_pixel_size(prepared: list[Path]) -> None:
    data = load_slices(prepared, torch.device("cpu"))
    assert data.pixel_mm.tolist() == [1.0] * 6 + [3.0] * 6
    assert data.grey_per_hu == 0.85


def test_slices_of_two_windows_do_not_mix(prepared: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different windows"):
        load_slices([*prepared, _save(tmp_path, 2, 1.0, None)], torch.device("cpu"))


def test_both_phases_train_on_lesions_and_equal_seeds_agree(prepared: list[Path], tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        one, two = tmp_path / f"{name}1", tmp_path / f"{name}2"
        one.mkdir()
        two.mkdir()
        train_restoration(prepared, _settings(), one, device="cpu")
        train_segmentation(prepared, one, _settings(), two, device="cpu")
        weights.append([(folder / "model.safetensors").read_bytes() for folder in (one, two)])
    assert weights[0] == weights[1]


def test_the_one_cycle_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    phase = PhaseSettings(epochs=1, learning_rate=2e-3, rate="one_cycle")
    rates = [learning_rate(phase, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(2e-3 / 25)
    assert rates[30] == max(rates) == pytest.approx(2e-3)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[99] < 2e-3 * 0.001
    assert [learning_rate(phase, 0, 1)] == [pytest.approx(2e-3 / 25)]
    assert {learning_rate(PhaseSettings(epochs=1), step, 9) for step in range(9)} == {1e-4}


def test_training_leaves_the_process_its_smallest_numbers(prepared: list[Path], tmp_path: Path) -> None:
    """Training flushes denormals, but code that runs later in the process must not."""
    train_restoration(prepared, _settings(), tmp_path, device="cpu")
    assert float(torch.tensor([1e-40]) * 1.0) > 0
    assert np.nextafter(np.float32(0), np.float32(1)) * np.float32(1) > 0
