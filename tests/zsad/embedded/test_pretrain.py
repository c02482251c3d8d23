"""Check the training of the embedded model: reproducible batches, exact resume, and weights that open_clip reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.killed import TrainingKilled
from zsad.clip.encoder import Encoder
from zsad.clip.models import EMBEDDED_FOLDER
from zsad.clip.prompts import ANOMALOUS_STATES, NORMAL_STATES
from zsad.config.run import EncoderSettings
from zsad.embedded import pool as pools
from zsad.embedded import pretrain
from zsad.embedded.pool import SIZE_PX, Leg, Pool, make_pool, numbered_image, numbered_twins, write_held_out
from zsad.embedded.pretrain import Batch, Plan, build, make_batch, save, train

FIRST = Leg(twins=False, scenes=6, steps=5, sharpen_from=3, learning_rate=1e-3, warmup_steps=2)
TWINS = Leg(twins=True, scenes=6, steps=4, sharpen_from=0, learning_rate=5e-4, warmup_steps=2)
PLAN = Plan(legs=(FIRST, TWINS), batch_size=4)
TRAINED = Plan(legs=(FIRST, TWINS), batch_size=2)
WORDS = ["lamp", "river"]


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(0, FIRST, 1)


@pytest.fixture(scope="module")
def twins() -> Pool:
    return make_pool(0, TWINS, 1)


def test_a_batch_is_a_function_of_seed_and_step(pool: Pool) -> None:
    one, again, later = (make_batch(pool, PLAN, FIRST, step, WORDS) for step in (1, 1, 2))
    assert torch.equal(one.images, again.images)
    assert one.prompts == again.prompts
    assert not torch.equal(one.images, later.images)
    assert one.images.min() >= 0
    assert one.images.max() <= 1


def test_prompts_are_normal_then_anomalous_then_the_captions(pool: Pool) -> None:
    def side(prompt: str, states: tuple[str, ...]) -> bool:
        return any(state.replace("[c]", "").strip() in prompt.rsplit("photo", maxsplit=1)[-1] for state in states)

    for step in range(4):
        batch = make_batch(pool, PLAN, FIRST, step, WORDS)
        n = len(batch.images)
        assert len(batch.prompts) == 3 * n
        assert all(side(prompt, NORMAL_STATES) for prompt in batch.prompts[:n])
        assert all(side(prompt, ANOMALOUS_STATES) for prompt in batch.prompts[n : 2 * n])
        for caption, kind, touched in zip(batch.prompts[2 * n :], batch.kinds, batch.touched, strict=True):
            assert kind in caption
            assert side(caption, ANOMALOUS_STATES if touched.max() > 0.3 else NORMAL_STATES)


@pytest.mark.parametrize("everywhere", [True, False])
def test_touched_patches_follow_the_mask_through_every_turn_and_zoom(everywhere: bool) -> None:
    pixels = torch.full((4, 3, SIZE_PX, SIZE_PX), 128, dtype=torch.uint8)
    masks = torch.full((4, SIZE_PX, SIZE_PX), everywhere)
    batch = make_batch(Pool(pixels, masks, ("coin",) * 4), PLAN, FIRST, 0, WORDS)
    assert torch.allclose(batch.touched, torch.full_like(batch.touched, float(everywhere)))


def test_twins_are_adjacent_without_and_with_a_defect(twins: Pool) -> None:
    assert len(twins.kinds) == 2 * TWINS.scenes
    assert not twins.masks[0::2].any()
    assert twins.masks[1::2].flatten(1).any(1).all()
    batch = make_batch(twins, PLAN, TWINS, 0, WORDS)
    assert len(batch.images) == PLAN.batch_size
    assert batch.kinds[0::2] == batch.kinds[1::2]
    assert not batch.touched[0::2].any()


def test_sharpening_shows_more_objects() -> None:
    # batches are drawn without replacement from 4 coins and 36 bricks; a coin is as likely as 18 bricks
    pixels = torch.full((40, 3, SIZE_PX, SIZE_PX), 128, dtype=torch.uint8)
    pool = Pool(pixels, torch.zeros((40, SIZE_PX, SIZE_PX), dtype=torch.bool), ("coin",) * 4 + ("bricks",) * 36)
    plan = Plan(legs=PLAN.legs, batch_size=2)

    def coins(steps: range) -> int:
        return sum(make_batch(pool, plan, leg, step, WORDS).kinds.count("coin") for step in steps)

    leg = Leg(twins=False, scenes=40, steps=80, sharpen_from=40, learning_rate=1e-3, warmup_steps=2)
    assert coins(range(40)) < 25 < coins(range(40, 80))


@pytest.fixture(scope="module", autouse=True)
def _pools_made_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrain, "make_pool", functools.cache(make_pool))
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the weights of a training without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    train(TRAINED, folder, workers=1)
    return (folder / "open_clip_model.safetensors").read_bytes()


@pytest.mark.parametrize(("leg", "last_step"), [(FIRST, 3), (TWINS, 1), (TWINS, 3)])
def test_a_killed_training_ends_in_the_same_weights(
    tmp_path: Path, straight: bytes, monkeypatch: pytest.MonkeyPatch, leg: Leg, last_step: int
) -> None:
    monkeypatch.setattr(pretrain, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(pretrain, "CURVE_STEPS", 2)

    def dies(pool: Pool, plan: Plan, of: Leg, step: int, words: list[str]) -> Batch:
        if (of, step) == (leg, last_step):
            raise TrainingKilled
        return make_batch(pool, plan, of, step, words)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "make_batch", dies)
        with pytest.raises(TrainingKilled):
            train(TRAINED, tmp_path, workers=1)
    assert (tmp_path / "checkpoint.pt").is_file()
    train(TRAINED, tmp_path, workers=1)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "open_clip_model.safetensors").read_bytes() == straight
    curve = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))["curve"]
    assert [(row["leg"], row["step"]) for row in curve] == [(1, 2), (1, 4), (2, 2), (2, 4)]


def test_the_second_leg_alone_goes_on_from_the_weights_of_the_first(tmp_path: Path, straight: bytes) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    train(Plan(legs=(FIRST,), batch_size=TRAINED.batch_size), tmp_path / "first", workers=1)
    start = tmp_path / "first" / "open_clip_model.safetensors"
    assert start.read_bytes() != straight
    train(TRAINED, tmp_path / "second", workers=1, start=start)
    assert (tmp_path / "second" / "open_clip_model.safetensors").read_bytes() == straight


def test_saved_weights_load_as_any_local_folder_and_are_the_model(tmp_path: Path) -> None:
    model = build(3).eval()
    save(model, tmp_path)
    encoder = Encoder.load(EncoderSettings(model=f"local-dir:{tmp_path}"), torch.device("cpu"))
    assert encoder.size_px == SIZE_PX
    assert tuple(encoder.mean.flatten().tolist()) == pretrain.MEAN
    ours = dict(model.named_parameters())
    del ours["logit_scale"]  # used by training only; the loader leaves it out
    for name, value in ours.items():
        assert torch.equal(encoder.model.get_parameter(name), value.half().float()), name


def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = build(1), build(1), build(2)
    assert torch.equal(torch.get_rng_state(), before)
    name = "visual.conv1.weight"
    assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_held_out_images_come_in_mvtec_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zsad.config.run import ImagesSettings
    from zsad.data.datasets import find_categories
    from zsad.data.masks import read_mask
    from zsad.embedded.scenes.scenes import kinds

    monkeypatch.setattr(pools, "SIZE_PX", 64)
    write_held_out(tmp_path, each=4)
    categories, problems, _ = find_categories(ImagesSettings(root=str(tmp_path), layout="mvtec"))
    assert not problems
    assert {category.name for category in categories} == {kind for kind, _ in kinds("held_out")}
    for category in categories:
        assert sum(item.anomalous is False for item in category.items) == 4
        for item in category.items:
            if item.anomalous:
                assert item.mask is not None
                assert read_mask(item.mask, (64, 64)).any()


def test_the_configuration_that_is_committed_is_the_one_the_code_writes(tmp_path: Path) -> None:
    save(build(0), tmp_path)
    committed = EMBEDDED_FOLDER / "open_clip_config.json"
    ours: Any = json.loads((tmp_path / "open_clip_config.json").read_text(encoding="utf-8"))
    assert json.loads(committed.read_text(encoding="utf-8")) == ours


def test_the_pools_are_the_supplies_in_order(pool: Pool, twins: Pool) -> None:
    made = [numbered_image(0, 2), *numbered_twins(0, 2)]
    for one, of, row in zip(made, (pool, twins, twins), (2, 4, 5), strict=True):
        assert np.array_equal(of.pixels[row].numpy(), (one.image * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1))
        assert np.array_equal(of.masks[row].numpy(), one.mask)
        assert of.kinds[row] == one.kind
