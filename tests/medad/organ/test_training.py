"""The training of the built-in network on a source by construction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medad.organ.network import LiverNet, load_net, logits_of, probability_of
from medad.organ.training.__main__ import save, train
from medad.organ.training.tissues import LIVER, SPLEEN, Source
from medad.organ.training.torsos import PLANE, make_sample
from tests.medad.organ.torso import make_torso


@pytest.fixture(scope="module")
def source() -> Source:
    torso = make_torso((3.0, 3.0, 3.0))
    tissues = torso.liver * np.uint8(LIVER) + torso.organs["spleen"] * np.uint8(SPLEEN)
    return Source(torch.from_numpy(torso.hu), torch.from_numpy(tissues.astype(np.uint8)), 1.0, slab=False)


def test_samples_depend_only_on_the_generator(source: Source) -> None:
    first, second = (make_sample(source, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_samples_show_liver_and_body(source: Source) -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(8):
        hu, liver = make_sample(source, rng)
        assert hu.shape == liver.shape
        assert hu.shape[:2] == PLANE
        assert -1024 <= float(hu.min()) < float(hu.max()) <= 1500
        assert 0 <= float(liver.min()) <= float(liver.max()) <= 1
        shares.append(float(liver.mean()))
    assert max(shares) > 0.05


def test_a_training_writes_weights_that_load(source: Source, tmp_path: Path) -> None:
    net = train([source], 2, 0, tmp_path / "net.safetensors")
    loaded = load_net(tmp_path / "net.safetensors")
    hu = make_sample(source, np.random.default_rng(1))[0].numpy()
    assert probability_of(loaded, hu) == pytest.approx(probability_of(net, hu), abs=0.02)
    again = train([source], 2, 0, tmp_path / "again.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_odd_and_thin_volumes_keep_their_shape(tmp_path: Path) -> None:
    save(LiverNet(), tmp_path / "net.safetensors")
    net = load_net(tmp_path / "net.safetensors")
    for shape in ((17, 15, 1), (8, 9, 3), (24, 24, 24)):
        assert logits_of(net, torch.zeros(shape)).shape == shape
