"""Check both attention paths against open_clip, against a loop over heads and tokens, and against their equation."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from tests.zsad.tiny_clip import ARCHITECTURES, tiny_clip, tiny_config
from zsad.clip.attention_paths import AttentionPath, patch_path, two_path, unsupported_reason

ALL = (0, 1, 2)


def _images(count: int = 2, size_px: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(seed))


def _visual(seed: int = 0, **vision: Any) -> VisionTransformer:
    return tiny_clip(tiny_config(**vision), seed).visual


def _original_tokens(visual: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Return the tokens that enter each block: the first computed here, the others from open_clip."""
    size = visual.patch_size[0]
    patches = functional.unfold(images, size, stride=size).transpose(1, 2) @ visual.conv1.weight.flatten(1).T
    class_token = visual.class_embedding.repeat(len(images), 1, 1)
    entering = [visual.ln_pre(torch.cat([class_token, patches], dim=1) + visual.positional_embedding)]
    leaving = visual.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
    pairs = zip(leaving["image_intermediates_prefix"], leaving["image_intermediates"], strict=True)
    return [*entering, *(torch.cat(pair, dim=1) for pair in pairs)][:-1]


def _by_loop(visual: VisionTransformer, images: Tensor, paths: AttentionPath) -> Tensor:
    """Compute eq. 4 token by token and head by head, in double precision."""
    visual, images = deepcopy(visual).double(), images.double()
    entering = _original_tokens(visual, images)
    x_vv = entering[paths.vv_blocks[0]].clone()
    for number in paths.vv_blocks:
        block = visual.transformer.resblocks[number]
        width = x_vv.shape[-1]
        per_head = width // block.attn.num_heads
        normed = block.ln_1(entering[number])
        projected = {}
        for place, name in enumerate(("qq", "kk", "vv")):
            rows = slice(place * width, (place + 1) * width)
            projected[name] = normed @ block.attn.in_proj_weight[rows].T + block.attn.in_proj_bias[rows]
        values, asking = projected["vv"], projected[paths.attention]
        for image in range(len(values)):
            mixed = torch.zeros_like(values[image])
            for head in range(block.attn.num_heads):
                columns = slice(head * per_head, (head + 1) * per_head)
                v, alike = values[image][:, columns], asking[image][:, columns]
                for token in range(len(v)):
                    logits = torch.stack([alike[token] @ other for other in alike]) / per_head**0.5 / paths.temperature
                    weights = torch.exp(logits - logits.max())
                    mixed[token, columns] = sum(w * other for w, other in zip(weights / weights.sum(), v, strict=True))
            x_vv[image] += block.ls_1(mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias)
        if paths.feed_forward:
            x_vv = x_vv + block.ls_2(block.mlp(block.ln_2(x_vv)))
    joint: Tensor = visual.ln_post(x_vv[:, 1:]) @ visual.proj
    return joint.float()


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_class_token_is_what_encode_image_gives(architecture: str, quick_gelu: bool) -> None:
    model = tiny_clip(tiny_config(quick_gelu=quick_gelu, **ARCHITECTURES[architecture]), seed=3)
    blocks = tuple(range(len(model.visual.transformer.resblocks)))
    with torch.no_grad():
        expected = model.encode_image(_images())
        for chosen in {blocks, blocks[-1:], blocks[:1]}:
            class_token, _ = two_path(model.visual, _images(), AttentionPath(chosen))
            torch.testing.assert_close(class_token, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "paths"),
    [
        *((name, AttentionPath((0,) if name == "one block" else ALL)) for name in ARCHITECTURES),
        ("plain", AttentionPath((1, 2))),
        ("plain", AttentionPath((0, 2))),
        ("plain", AttentionPath((0, 1))),
        ("plain", AttentionPath(ALL, temperature=0.05)),
        ("layer scale", AttentionPath(ALL, feed_forward=True)),
        ("plain", AttentionPath((1,), feed_forward=True, temperature=3.0)),
        ("plain", AttentionPath(ALL, attention="qq")),
        ("plain", AttentionPath(ALL, attention="kk")),
        ("layer scale", AttentionPath((0, 2), attention="qq", temperature=0.3)),
        ("plain", AttentionPath((1, 2), attention="kk", feed_forward=True)),
    ],
)
@torch.no_grad()
def test_patches_equal_a_loop_over_heads_and_tokens(architecture: str, paths: AttentionPath) -> None:
    visual = _visual(seed=5, **ARCHITECTURES[architecture])
    expected = _by_loop(visual, _images(), paths)
    torch.testing.assert_close(two_path(visual, _images(), paths)[1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patch_path(visual, _images(), paths), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_second_path_is_its_start_and_the_sum_of_the_blocks_attention() -> None:
    visual = _visual(seed=7).double()
    images = _images().double()
    entering = _original_tokens(visual, images)
    total = entering[0]
    for x, block in zip(entering, visual.transformer.resblocks, strict=True):
        attention = deepcopy(block.attn)  # torch's own attention with the values' weights for queries and keys
        attention.in_proj_weight.copy_(attention.in_proj_weight.chunk(3)[2].repeat(3, 1))
        attention.in_proj_bias.copy_(attention.in_proj_bias.chunk(3)[2].repeat(3))
        normed = block.ln_1(x)
        total = total + attention(normed, normed, normed, need_weights=False)[0]
    expected = visual.ln_post(total[:, 1:]) @ visual.proj
    torch.testing.assert_close(two_path(visual, images, AttentionPath(ALL))[1], expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_at_a_high_temperature_every_token_gains_the_same() -> None:
    visual = _visual(seed=8)
    visual.ln_post, visual.proj = nn.Identity(), nn.Parameter(torch.eye(32))  # so that the result is x_vv itself
    gained = (
        two_path(visual, _images(), AttentionPath((1,), temperature=1e9))[1]
        - _original_tokens(visual, _images())[1][:, 1:]
    )
    torch.testing.assert_close(gained, gained[:, :1].expand_as(gained), atol=1e-5, rtol=0)
    assert gained.abs().max() > 0.1


@torch.no_grad()
def test_class_token_without_the_last_norm_is_its_projection_alone() -> None:
    visual = _visual(seed=9)
    bare = deepcopy(visual)
    bare.ln_post = nn.Identity()
    class_token, patches = two_path(visual, _images(), AttentionPath(ALL, class_ln_post=False))
    torch.testing.assert_close(class_token, bare(_images()), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches, two_path(visual, _images(), AttentionPath(ALL))[1])


@torch.no_grad()
def test_an_image_does_not_depend_on_its_company() -> None:
    visual, images = _visual(seed=10), _images(3)
    together = two_path(visual, images, AttentionPath(ALL))
    for i in range(3):
        for one, all_of_them in zip(two_path(visual, images[i : i + 1], AttentionPath(ALL)), together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i], atol=1e-5, rtol=1e-5)


def test_the_tower_is_left_as_it_was() -> None:
    model = tiny_clip(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model.encode_image(_images()).detach()
    two_path(model.visual, _images(), AttentionPath(ALL))
    patch_path(model.visual, _images(), AttentionPath(ALL))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert torch.equal(model.encode_image(_images()), plain)


def test_gradients_reach_every_weight_that_counts() -> None:
    visual = _visual(seed=11)
    class_token, patches = two_path(visual.train(), _images(), AttentionPath(ALL))
    (class_token.square().sum() + patches.square().sum()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in visual.parameters())


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "pools by attention"),
        ({"qk_norm": True}, "custom attention"),
        ({"pool_type": "none"}, "pools by attention"),
        ({"layers": [1, 1, 1, 1], "width": 32, "head_width": 32}, "ModifiedResNet"),
        ({"image_size": (32, 16)}, "4 x 2 patches"),
    ],
)
def test_towers_that_cannot_have_the_path_are_reported(vision: dict[str, Any], reason: str) -> None:
    visual = open_clip.CLIP(**tiny_config(**vision)).visual
    assert reason in (unsupported_reason(visual) or "")


def test_towers_that_can_have_the_path_have_no_reason_against_it() -> None:
    assert all(unsupported_reason(_visual(**vision)) is None for vision in ARCHITECTURES.values())


@pytest.mark.parametrize("blocks", [(), (1, 1), (2, 0), (-1, 0)])
def test_blocks_must_rise_from_zero(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        AttentionPath(blocks)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature"):
        AttentionPath(ALL, temperature=0.0)


def test_a_missing_block_is_reported() -> None:
    with pytest.raises(ValueError, match="0 to 2"):
        two_path(_visual(), _images(), AttentionPath((0, 3)))
