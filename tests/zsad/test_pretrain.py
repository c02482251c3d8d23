"""Training of the embedded model: batches by (seed, step), exact resume, and weights that open_clip's loader reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zsad import pretrain
from zsad.config import EncoderSettings
from zsad.encoder import Encoder
from zsad.pretrain import SIZE_PX, Batch, Plan, Pool, build, make_batch, make_pool, save, train
from zsad.prompts import ANOMALOUS_STATES, NORMAL_STATES

PLAN = Plan(scenes=6, steps=6, batch_scenes=2, warmup_steps=2)
WORDS = ["lamp", "river"]


@pytest.fixture(scope="module")
def pool() -> Pool:
    return make_pool(0, PLAN.scenes, 1)


def test_a_batch_is_a_function_of_seed_and_step(pool: Pool) -> None:
    one, again, later = (make_batch(pool, PLAN, step, WORDS) for step in (1, 1, 2))
    assert torch.equal(one.images, again.images)
    assert one.prompts == again.prompts
    assert not torch.equal(one.images, later.images)
    assert one.images.min() >= 0
    assert one.images.max() <= 1


def test_prompts_are_normal_then_anomalous_then_the_captions(pool: Pool) -> None:
    def side(prompt: str, states: tuple[str, ...]) -> bool:
        return any(state.replace("[c]", "").strip() in prompt.rsplit("photo", maxsplit=1)[-1] for state in states)

    for step in range(4):
        batch = make_batch(pool, PLAN, step, WORDS)
        n = len(batch.images)
        assert len(batch.prompts) == 3 * n
        assert all(side(prompt, NORMAL_STATES) for prompt in batch.prompts[:n])
        assert all(side(prompt, ANOMALOUS_STATES) for prompt in batch.prompts[n : 2 * n])
        for caption, kind, touched in zip(batch.prompts[2 * n :], batch.kinds, batch.touched, strict=True):
            assert kind in caption
            assert side(caption, ANOMALOUS_STATES if touched.max() > 0.3 else NORMAL_STATES)


def test_touched_patches_follow_the_mask_through_every_turn_and_zoom() -> None:
    pixels = torch.full((4, 2, 3, SIZE_PX, SIZE_PX), 128, dtype=torch.uint8)
    batch = make_batch(Pool(pixels, torch.full((4, SIZE_PX, SIZE_PX), True), ("coin",) * 4), PLAN, 0, WORDS)
    whole, spoilt = batch.touched[0::2], batch.touched[1::2]
    assert torch.equal(whole, torch.zeros_like(whole))
    assert torch.allclose(spoilt, torch.ones_like(spoilt))


def test_a_batch_shows_each_scene_whole_and_spoilt(pool: Pool) -> None:
    batch = make_batch(pool, PLAN, 0, WORDS)
    assert len(batch.images) == 2 * PLAN.batch_scenes
    assert batch.kinds[0::2] == batch.kinds[1::2]
    assert len(set(batch.kinds[0::2])) == PLAN.batch_scenes
    assert not batch.touched[0::2].any()


class _KilledError(Exception):
    pass


def test_a_killed_training_ends_in_the_same_weights(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "CHECKPOINT_STEPS", 2)
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    train(PLAN, pool, tmp_path / "straight")

    def dies_at_three(pool: Pool, plan: Plan, step: int, words: list[str]) -> Batch:
        if step == 3:
            raise _KilledError
        return make_batch(pool, plan, step, words)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "make_batch", dies_at_three)
        with pytest.raises(_KilledError):
            train(PLAN, pool, tmp_path / "killed")
    assert (tmp_path / "killed" / "checkpoint.pt").is_file()
    train(PLAN, pool, tmp_path / "killed")
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()
    one, other = ((tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("straight", "killed"))
    assert one == other


def test_saved_weights_load_as_any_local_folder_and_are_the_model(tmp_path: Path) -> None:
    model = build(3).eval()
    save(model, tmp_path)
    encoder = Encoder.load(EncoderSettings(model=f"local-dir:{tmp_path}"), torch.device("cpu"))
    assert encoder.size_px == SIZE_PX
    assert tuple(encoder.mean.flatten().tolist()) == pretrain.MEAN
    ours = dict(model.named_parameters())
    del ours["logit_scale"]  # used by training alone; the loader leaves it out
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
    from zsad.config import ImagesSettings
    from zsad.datasets import find_categories
    from zsad.images import read_mask
    from zsad.procedural import kinds

    monkeypatch.setattr(pretrain, "SIZE_PX", 64)
    pretrain.write_held_out(tmp_path, each=4)
    categories, problems = find_categories(ImagesSettings(root=str(tmp_path), layout="mvtec"))
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
    committed = Path(pretrain.__file__).parent / "embedded" / "open_clip_config.json"
    ours: Any = json.loads((tmp_path / "open_clip_config.json").read_text(encoding="utf-8"))
    assert json.loads(committed.read_text(encoding="utf-8")) == ours


def test_the_pool_is_the_supply_in_order(pool: Pool) -> None:
    pair = pretrain.draw(0, 2)
    for pixels, made in zip(pool.pixels[2], pair, strict=True):
        assert np.array_equal(pixels.numpy(), (made.image * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1))
    assert np.array_equal(pool.masks[2].numpy(), pair[1].mask)
    assert pool.kinds[2] == pair[0].kind
