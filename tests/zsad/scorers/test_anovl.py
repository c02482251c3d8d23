"""Tests of AnoVL's adaptation against a literal transcription with torch's Linear and AdamW, one image at a time."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from medad.base.errors import InputError
from tests.zsad.feature_sets import DIM, GRID, category_features, digest_of, random_tensors, write_features
from zsad.clip.feature_store import FeatureStore, output_file
from zsad.scorers.anovl import score as anovl
from zsad.scorers.anovl.settings import AnoVl
from zsad.scorers.dual.adapt import crop_generator
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import CategoryFeatures, Scored

CROPS = (1, 2, 1, 2, 1, 1)
N = GRID**2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_features(tmp_path_factory.mktemp("query") / "f", CROPS, random_tensors(sum(CROPS), {}, seed=1))


def _by_number(given: CategoryFeatures, settings: AnoVl) -> dict[int, Scored]:
    return {one.number: one for one in anovl.score(given, settings)}


def _literal(given: CategoryFeatures, number: int, settings: AnoVl) -> torch.Tensor:
    """Compute the module's formulas for one image, patch by patch, in double precision."""
    assert given.text is not None
    q = [token for crop in given.store.patches(number).double() for token in crop]
    t_n, t_a = given.text.double()
    generators = [crop_generator(given.seed, given.store.digests[number], crop) for crop in range(CROPS[number])]
    g = torch.nn.Linear(DIM, DIM, bias=False, dtype=torch.float64)
    torch.nn.init.eye_(g.weight)
    optimiser = torch.optim.AdamW(g.parameters(), lr=settings.learning_rate)

    def share(token: torch.Tensor) -> torch.Tensor:
        normal, anomalous = torch.exp(token @ t_n / settings.tau), torch.exp(token @ t_a / settings.tau)
        return anomalous / (normal + anomalous)

    def adapted(token: torch.Tensor) -> torch.Tensor:
        token = (g(token) + token) / 2
        return share(token / token.norm())

    labels = [share(token) for token in q]
    for _ in range(settings.steps):
        noise = [settings.noise * n for own in generators for n in torch.randn(N, DIM, generator=own).double()]
        soft = hard = torch.zeros((), dtype=torch.float64)
        for patch, token in enumerate(q):
            a_t, a_noisy = adapted(token), adapted(token + noise[patch])
            soft = soft - (labels[patch] * torch.log(a_t) + (1 - labels[patch]) * torch.log(1 - a_t)) / len(q)
            hard = hard - (torch.log(a_noisy) + torch.log(1 - a_t)) / len(q)
        optimiser.zero_grad()
        torch.autograd.backward(soft + hard / 2)
        optimiser.step()
    return _mean(torch.stack([adapted(token) for token in q]).detach().reshape(-1, GRID, GRID), settings.mean_patches)


def _mean(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Average each value over its square of patches, with the nearest value of the map for places outside it."""
    found, reach = torch.empty_like(maps), range(-(side // 2), side // 2 + 1)
    for crop, row, column in product(range(len(maps)), range(GRID), range(GRID)):
        around = [
            maps[crop, min(max(row + down, 0), GRID - 1), min(max(column + right, 0), GRID - 1)]
            for down in reach
            for right in reach
        ]
        found[crop, row, column] = sum(around) / len(around)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        AnoVl(),
        AnoVl(tau=0.07),
        AnoVl(steps=3, learning_rate=0.03, noise=0.5, tau=0.2),
        AnoVl(noise=0.0, steps=2, mean_patches=1),
    ],
)
def test_adaptation_is_the_objective_literally(store: FeatureStore, settings: AnoVl) -> None:
    given = category_features(store, seed=5)
    scored, before = _by_number(given, settings), _by_number(given, settings.model_copy(update={"steps": 0}))
    for number in range(3):
        expected = _literal(given, number, settings)
        moved = (expected - before[number].map).abs().max()
        assert moved > 1e-4, "the comparison would be empty"
        assert (scored[number].map - expected).abs().max() < 1e-3 * moved + 1e-6


def test_without_steps_it_is_the_text_alone(store: FeatureStore) -> None:
    given = category_features(store)
    assert given.text is not None
    for number, one in _by_number(given, AnoVl(steps=0)).items():
        expected = text_scores(store.patches(number), given.text, 1.0).reshape(-1, GRID, GRID)
        torch.testing.assert_close(one.map, _mean(expected, 3))
        classes = text_scores(store.class_tokens(number), given.text, 1.0)
        assert one.score == pytest.approx(classes.double().mean().item(), abs=1e-6)


def test_the_image_score_is_not_adapted(store: FeatureStore) -> None:
    plain, adapted = (_by_number(category_features(store), AnoVl(steps=steps)) for steps in (0, 5))
    assert [one.score for one in adapted.values()] == [one.score for one in plain.values()]


def test_order_batch_and_company_change_nothing(store: FeatureStore, tmp_path: Path) -> None:
    together = _by_number(category_features(store, batch_size=64), AnoVl())
    assert sorted(together) == list(range(6))
    for batch_size in (1, 3):
        for number, one in _by_number(category_features(store, batch_size=batch_size), AnoVl()).items():
            torch.testing.assert_close(one.map, together[number].map, rtol=1e-5, atol=1e-6)
    tensors = random_tensors(sum(CROPS), {}, seed=1)
    rows, order = [[0], [1, 2], [3], [4, 5], [6], [7]], [4, 1, 5]
    some = {name: values[[row for i in order for row in rows[i]]] for name, values in tensors.items()}
    other = write_features(tmp_path / "f", [CROPS[i] for i in order], some, order)
    for place, one in _by_number(category_features(other), AnoVl()).items():
        torch.testing.assert_close(one.map, together[order[place]].map, rtol=1e-5, atol=1e-6)


def test_seed_and_content_decide_the_noise(store: FeatureStore, tmp_path: Path) -> None:
    first, again, other = (_by_number(category_features(store, seed=seed), AnoVl(noise=0.5)) for seed in (1, 1, 2))
    assert torch.equal(first[0].map, again[0].map)
    assert not torch.allclose(first[0].map, other[0].map, rtol=0, atol=1e-5)
    tensors = {name: values[:1].repeat_interleave(3, dim=0) for name, values in random_tensors(8, {}, seed=1).items()}
    alike = _by_number(category_features(write_features(tmp_path / "f", (1, 1, 1), tensors, "aab")), AnoVl(noise=0.5))
    torch.testing.assert_close(alike[0].map, alike[1].map)
    assert not torch.allclose(alike[0].map, alike[2].map, rtol=0, atol=1e-5)


def test_many_steps_tell_tokens_from_noise() -> None:
    """L_hard makes clean patches more normal, and noisy patches less normal than clean ones."""
    generator = torch.Generator().manual_seed(0)
    text = torch.eye(2, 32)
    middle = torch.ones(32)
    patches = normalize(middle + 0.1 * torch.randn(2, 64, 32, generator=generator), dim=-1)
    labels = text_scores(patches, text, 1.0)
    generators = [[crop_generator(0, digest_of(image), 0)] for image in range(2)]
    settings = AnoVl(steps=200, learning_rate=3e-3, noise=0.3)
    adapted = anovl.adapt_to_noise(patches, labels, text, generators, settings)
    assert (adapted.mean(1) < labels.mean(1) - 0.01).all()


def test_features_without_the_second_path_are_told(tmp_path: Path) -> None:
    tensors = random_tensors(1, {"window-2": (9, DIM)}, seed=0)
    del tensors[output_file("patches")]
    without = write_features(tmp_path / "without", (1,), tensors)
    with pytest.raises(InputError, match=r"output-patches\.npy: the features were made without this output"):
        list(anovl.score(category_features(without), AnoVl()))


def test_nothing_is_left_behind(store: FeatureStore) -> None:
    state = torch.random.get_rng_state()
    (first, *_) = anovl.score(category_features(store), AnoVl())
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not drawn from"
    assert not first.map.requires_grad
    assert store.patches(0).shape == (1, N, DIM)
    assert (store.folder / output_file("patches")).exists()
