"""Tests of CLIP and WinCLIP against their formulas in plain loops, and from image files to scores."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from medad.base.errors import InputError
from medad.base.storage import file_digest
from tests.zsad.feature_sets import DIM, GRID, category_features, random_tensors, unit, write_features
from tests.zsad.learned_sets import cosine, dot
from tests.zsad.tiny_clip import noise_images, tiny_encoder
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import CLASS_TOKENS, INDEX, FeatureStore, output_file, read_text
from zsad.config.run import PromptSettings
from zsad.data.images import crop_image, read_image
from zsad.scorers.clip import score as clip
from zsad.scorers.clip.settings import Clip, ClipAc
from zsad.scorers.interface import CategoryFeatures, Scored
from zsad.scorers.scores_file import SystemScores
from zsad.scorers.winclip import score as winclip
from zsad.scorers.winclip.settings import WinClip
from zsad.steps.encode import encode_category_text, encode_images
from zsad.steps.score import score_system

CROPS = (1, 3, 1, 2)
WIDTH = 9
OUTPUTS = {
    "plain": (GRID**2, DIM),
    "tokens": (GRID**2, WIDTH),
    "raw": (GRID**2, WIDTH),
    **{f"window-{side}": ((GRID - side + 1) ** 2, DIM) for side in (1, 2, 3, 4)},
}
Vector = Sequence[float]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_features(tmp_path_factory.mktemp("query") / "f", CROPS, random_tensors(sum(CROPS), OUTPUTS, seed=1))


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_features(tmp_path_factory.mktemp("shots") / "f", (2, 1), random_tensors(3, OUTPUTS, seed=50), "ab")


def _anomalous_share(token: Vector, text: torch.Tensor, tau: float) -> float:
    normal, anomalous = (math.exp(dot(token, side) / tau) for side in text.double().tolist())
    return anomalous / (normal + anomalous)


def _harmonic(values: Sequence[float]) -> float:
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


def _over_windows(scores: Vector, side: int) -> list[list[float]]:
    """Return for each patch the harmonic mean over the windows that contain it. Windows are numbered row by row."""
    places = list(product(range(GRID - side + 1), repeat=2))
    assert len(places) == len(scores)
    return [
        [
            _harmonic(
                [
                    score
                    for score, (top, left) in zip(scores, places, strict=True)
                    if top <= row < top + side and left <= column < left + side
                ]
            )
            for column in range(GRID)
        ]
        for row in range(GRID)
    ]


def _zero_shot(given: CategoryFeatures, number: int, settings: WinClip) -> tuple[float, list[list[list[float]]]]:
    assert given.text is not None
    image, maps = [], []
    for crop in range(CROPS[number]):
        of_class = _anomalous_share(given.store.class_tokens(number)[crop].double().tolist(), given.text, settings.tau)
        scales = [[[of_class] * GRID] * GRID]
        for side in settings.windows:
            tokens = given.store.output(number, f"window-{side}")[crop].double().tolist()
            scales.append(_over_windows([_anomalous_share(t, given.text, settings.tau) for t in tokens], side))
        maps.append([[_harmonic([scale[r][c] for scale in scales]) for c in range(GRID)] for r in range(GRID)])
        image.append(of_class)
    return sum(image) / len(image), maps


def _few_shot(given: CategoryFeatures, number: int, settings: WinClip) -> list[list[list[float]]]:
    assert given.shots is not None

    def distances(name: str, crop: int) -> list[float]:
        assert given.shots is not None
        memory = [
            t for i in range(len(given.shots)) for rows in given.shots.output(i, name).double().tolist() for t in rows
        ]
        found = []
        for token in given.store.output(number, name)[crop].double().tolist():
            found.append((1 - max(cosine(token, m) for m in memory)) / 2)
        return found

    maps = []
    for crop in range(CROPS[number]):
        of_patches = distances("tokens" if settings.memory_ln_post else "raw", crop)
        scales = [[of_patches[row * GRID : (row + 1) * GRID] for row in range(GRID)]]
        scales += [_over_windows(distances(f"window-{side}", crop), side) for side in settings.windows]
        maps.append([[sum(s[r][c] for s in scales) / len(scales) for c in range(GRID)] for r in range(GRID)])
    return maps


@pytest.mark.parametrize("settings", [Clip(), ClipAc(), Clip(tau=1.0)])
def test_clip_is_the_class_token_and_the_plain_patches_against_the_texts(
    store: FeatureStore, settings: Clip | ClipAc
) -> None:
    given = category_features(store)
    assert given.text is not None
    scored = list(clip.score(given, settings))
    assert [one.number for one in scored] == [0, 1, 2, 3]
    for one, crops in zip(scored, CROPS, strict=True):
        classes = store.class_tokens(one.number).double().tolist()
        patches = store.output(one.number, "plain").double().tolist()
        each = [_anomalous_share(token, given.text, settings.tau) for token in classes]
        assert one.score == pytest.approx(sum(each) / crops, abs=1e-5)
        assert one.map.shape == (crops, GRID, GRID)
        for crop, row, column in product(range(crops), range(GRID), range(GRID)):
            expected = _anomalous_share(patches[crop][GRID * row + column], given.text, settings.tau)
            assert one.map[crop, row, column].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", [WinClip(), WinClip(windows=(1, 2, 4), tau=0.3), WinClip(windows=(3,))])
def test_zero_shot_is_harmonic_means_of_windows_and_of_scales(store: FeatureStore, settings: WinClip) -> None:
    given = category_features(store)
    for one in winclip.score(given, settings):
        image, maps = _zero_shot(given, one.number, settings)
        assert one.score == pytest.approx(image, abs=1e-5)
        np.testing.assert_allclose(one.map, maps, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [WinClip(shots=2), WinClip(shots=1, windows=(1, 3), tau=0.3), WinClip(shots=2, memory_ln_post=True)]
)
def test_few_shot_is_the_mean_with_the_memory_of_all_shots(
    store: FeatureStore, shots: FeatureStore, settings: WinClip
) -> None:
    given = category_features(store, shots=shots)
    scored = list(winclip.score(given, settings))
    assert [one.number for one in scored] == [0, 1, 2, 3]
    for one in scored:
        image, zero = _zero_shot(given, one.number, settings)
        few = _few_shot(given, one.number, settings)
        np.testing.assert_allclose(one.map, (np.array(zero) + np.array(few)) / 2, atol=1e-5, rtol=0)
        assert one.score == pytest.approx((image + np.max(few)) / 2, abs=1e-5)


def test_a_copy_of_a_normal_image_is_as_normal_as_can_be(store: FeatureStore, tmp_path: Path) -> None:
    """The copy has another digest, because a normal image is never compared with itself."""
    shutil.copytree(store.folder, tmp_path / "copies")
    index = (tmp_path / "copies" / INDEX).read_text(encoding="utf-8")
    for number, digest in enumerate(store.digests):
        index = index.replace(digest, f"{number}" * 64)
    (tmp_path / "copies" / INDEX).write_text(index, encoding="utf-8")
    plain = list(winclip.score(category_features(store), WinClip()))
    given = category_features(store, shots=FeatureStore(tmp_path / "copies"))
    remembered = list(winclip.score(given, WinClip(shots=4)))
    for alone, combined in zip(plain, remembered, strict=True):
        torch.testing.assert_close(combined.map, alone.map / 2, atol=1e-6, rtol=0)
        assert combined.score == pytest.approx(alone.score / 2, abs=1e-6)


def test_a_score_of_zero_makes_a_mean_of_zero_and_nothing_else(tmp_path: Path) -> None:
    text = torch.eye(2, DIM)
    tensors = random_tensors(1, OUTPUTS, seed=7)
    tensors[CLASS_TOKENS] = text[1:]
    windows = text[1].repeat(1, (GRID - 1) ** 2, 1)
    windows[0, 4] = text[0]  # the middle window of 3 x 3: rows and columns 1 and 2
    tensors[output_file("window-2")] = windows
    store = write_features(tmp_path / "f", (1,), tensors)
    (one,) = winclip.score(category_features(store, text=text), WinClip(windows=(2,), tau=0.005))
    expected = torch.ones(1, GRID, GRID)
    expected[:, 1:3, 1:3] = 0
    torch.testing.assert_close(one.map, expected, atol=1e-6, rtol=0)
    assert one.score == pytest.approx(1)


def test_zeros_of_the_memory_are_no_infinities() -> None:
    memory = unit(40, 7, seed=3)
    tokens = memory[:18].reshape(2, 9, 7)
    distances = winclip.association(tokens, {"normal": memory}, "image")
    assert distances.min() >= 0
    means = winclip.window_map(distances, GRID, 2)
    assert means.isfinite().all()
    assert 0 <= means.min() <= means.max() < 1e-6


def test_equal_windows_make_an_even_map() -> None:
    for side in range(1, GRID + 1):
        scores = torch.tensor([[0.3], [0.8]]).expand(2, (GRID - side + 1) ** 2)
        expected = torch.tensor([0.3, 0.8])[:, None, None].expand(2, GRID, GRID)
        torch.testing.assert_close(winclip.window_map(scores, GRID, side), expected)


def test_a_turned_image_has_a_turned_map() -> None:
    scores = torch.rand(1, 9, generator=torch.Generator().manual_seed(0)) + 0.01
    turned = torch.rot90(scores.reshape(1, 3, 3), dims=(1, 2)).reshape(1, 9)
    expected = torch.rot90(winclip.window_map(scores, GRID, 2), dims=(1, 2))
    torch.testing.assert_close(winclip.window_map(turned, GRID, 2), expected)


@pytest.mark.parametrize("shots", [0, 2])
def test_an_image_does_not_depend_on_its_company(store: FeatureStore, tmp_path: Path, shots: int) -> None:
    tensors = random_tensors(sum(CROPS), OUTPUTS, seed=1)
    third = {name: values[4:5] for name, values in tensors.items()}
    alone = category_features(write_features(tmp_path / "alone", (1,), third, [2]))
    memory = write_features(tmp_path / "shots", (1,), random_tensors(1, OUTPUTS, seed=50), "a")
    for scorer, settings in ((clip, Clip()), (winclip, WinClip(shots=shots))):
        (one,) = scorer.score(category_features(alone.store, shots=memory), settings)
        among: Scored = list(scorer.score(category_features(store, shots=memory), settings))[2]
        torch.testing.assert_close(one.map, among.map, atol=1e-6, rtol=0)
        assert one.score == pytest.approx(among.score, abs=1e-6)


def test_what_is_missing_is_told(store: FeatureStore, tmp_path: Path) -> None:
    bare = write_features(tmp_path / "bare", (1,), random_tensors(1, {}, seed=0))
    with pytest.raises(InputError, match=r"output-plain\.npy: the features were made without this output"):
        list(clip.score(category_features(bare), Clip()))
    with pytest.raises(InputError, match=r"output-window-2\.npy"):
        list(winclip.score(category_features(bare), WinClip()))
    none = write_features(tmp_path / "none", (), random_tensors(0, OUTPUTS, seed=0))
    with pytest.raises(InputError, match="WinCLIP needs at least one normal image"):
        list(winclip.score(category_features(store, shots=none), WinClip(shots=1)))
    with pytest.raises(InputError, match=r"features of 6 numbers do not fit text features of shape \(2, 7\)"):
        list(clip.score(category_features(store, text=unit(2, 7, seed=0)), Clip()))
    with pytest.raises(ValueError, match="needs text features"):
        list(clip.score(category_features(store, text=None), Clip()))
    with pytest.raises(ValueError, match="needs normal images"):
        list(winclip.score(category_features(store), WinClip(shots=1)))


# from images to scores


@pytest.mark.parametrize("system", [Clip(), ClipAc(), WinClip(), WinClip(shots=1)])
def test_from_images_to_scores(system: Clip | ClipAc | WinClip, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "model", seed=2, batch_size=3)
    assert system.prompts is not None
    encode_category_text("wood", encoder, PromptSettings(style=system.prompts), "cpu", tmp_path / "text")
    *queries, normal = noise_images(tmp_path, [(40, 40), (40, 60), (40, 40), (40, 40)])
    for out, files in (("features", queries), ("shots", [normal])):
        encode_images(files, [file_digest(p) for p in files], encoder, "cpu", tmp_path / out, outputs=system.outputs)
    seen: list[tuple[int, int]] = []
    score_system(
        system,
        "wood",
        tmp_path / "features",
        tmp_path / "text",
        tmp_path / "shots" if isinstance(system, WinClip) and system.shots else None,
        None,
        queries,
        encoder,
        0,
        "cpu",
        tmp_path / "out",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    scores = SystemScores(tmp_path / "out")
    assert [scores.patch_map(number).shape for number in range(3)] == [(1, 4, 4), (2, 4, 4), (1, 4, 4)]
    if isinstance(system, WinClip) and system.shots:
        return
    loaded = Encoder.load(encoder, torch.device("cpu"))
    text = read_text(tmp_path / "text")
    for number, path in enumerate(queries):
        crops = FeatureStore(tmp_path / "features").crops(number)
        classes = loaded.encode(crop_image(read_image(path), crops)).class_token.double().tolist()
        expected = sum(_anomalous_share(token, text, system.tau) for token in classes) / len(classes)
        assert scores.image_score()[number] == pytest.approx(expected, abs=1e-5)
