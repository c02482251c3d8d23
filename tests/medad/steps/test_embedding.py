"""Pooled features against loops, and principal components against the eigenvectors of the covariance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from medad.config.anomalies import SynthesisSettings
from medad.config.liver import NetSettings
from medad.networks import nets
from medad.steps.embedding import KINDS, liver_features, principal_components, read_features, write_features
from medad.steps.examples import EXAMPLES, write_examples
from tests.medad.prepared import write_prepared


class _Halves(nn.Module):
    """A network with 2 x 2 means of the input and their negatives as deepest features."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = _MeanAndNegative()
        self.back = nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up: torch.Tensor = self.back(self.deep(x))
        return up[:, :1]


class _MeanAndNegative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = nn.functional.avg_pool2d(x, 2)
        return torch.cat((mean, -mean), 1)


def test_features_are_averaged_over_the_liver() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    organ = rng.random((3, 8, 8)) < 0.4
    found = liver_features(_Halves(), pixels, organ, torch.device("cpu"), 2)
    for n in range(3):
        total = weight = 0.0
        for row in range(0, 8, 2):
            for col in range(0, 8, 2):
                cell = (slice(row, row + 2), slice(col, col + 2))
                share = organ[n][cell].mean()
                total += share * pixels[n][cell].mean() / 255
                weight += share
        assert found[n] == pytest.approx([total / weight, -total / weight], rel=1e-5)


def test_components_are_the_covariances_directions() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(50, 4)) * [5, 3, 1, 0.1] + [7, 0, 0, 0]
    plane, explained = principal_components(features)
    values = np.linalg.eigvalsh(np.cov(features.T))[::-1]
    assert explained == pytest.approx(tuple(values[:2] / values.sum()))
    np.testing.assert_allclose(plane.var(axis=0, ddof=1), values[:2])
    np.testing.assert_allclose(plane.mean(axis=0), 0, atol=1e-9)
    moved, _ = principal_components(features + 100)
    np.testing.assert_allclose(moved, plane, atol=1e-8)


def test_what_has_no_spread_lies_at_the_origin() -> None:
    for features in (np.zeros((0, 3)), np.ones((1, 3)), np.ones((4, 3))):
        plane, explained = principal_components(features)
        assert (plane == 0).all()
        assert explained == (0.0, 0.0)


@pytest.fixture
def restoration(tmp_path: Path) -> Path:
    settings = NetSettings(widths=(8, 16, 32), groups=4)
    folder = tmp_path / "restoration"
    folder.mkdir()
    net = nets.build("restoration", settings, torch.Generator().manual_seed(0))
    nets.save(folder / "model.safetensors", net, "restoration", settings)
    return folder


SYNTHESIS = SynthesisSettings(blur_sigma_px=4.0, ellipse_px=3, threshold_grey=150)


def test_all_three_kinds_are_described(tmp_path: Path, restoration: Path) -> None:
    training = write_prepared(tmp_path / "train", slices=6)
    tested = write_prepared(tmp_path / "test", slices=5, tumour=2)
    out = tmp_path / "out"
    out.mkdir()
    write_features([training], [(tested, tested)], restoration, SYNTHESIS, 0, out, device="cpu")
    found = read_features(out)
    assert (len(found["tumour"]), len(found["healthy"])) == (2, 3)
    assert 0 < len(found["synthesised"]) <= 6
    assert {found[kind].shape[1] for kind in KINDS} == {32}, "the deepest level's width"


def test_examples_are_spoilt_only_under_their_masks(tmp_path: Path, restoration: Path) -> None:
    training = write_prepared(tmp_path / "train", slices=6)
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        out.mkdir()
        write_examples([training], restoration, SYNTHESIS, 0, 2, out, device="cpu")
    arrays = load_file(first / EXAMPLES)
    assert 1 <= len(arrays["clean"]) <= 2
    mask = arrays["mask"].astype(bool)
    assert mask.any(axis=(1, 2)).all()
    assert not (mask & ~arrays["organ"].astype(bool)).any()
    np.testing.assert_array_equal(arrays["clean"][~mask], arrays["spoilt"][~mask])
    assert (arrays["clean"][mask] != arrays["spoilt"][mask]).any()
    assert (first / EXAMPLES).read_bytes() == (second / EXAMPLES).read_bytes()
