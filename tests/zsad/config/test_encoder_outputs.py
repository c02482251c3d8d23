"""Check encoder outputs against open_clip's own forward passes, in memory and on disk."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import normalize

from medad.base.errors import ConfigError, InputError
from medad.base.storage import file_digest
from tests.zsad.tiny_clip import ARCHITECTURES, noise_images, tiny_clip, tiny_config, tiny_encoder
from zsad.clip.attention_paths import Attention, AttentionPath, tower_outputs, two_path
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import FeatureStore
from zsad.clip.windows import encode_windows
from zsad.config.encoder_outputs import EncoderOutput, parse_outputs
from zsad.config.run import EncoderSettings
from zsad.data.images import crop_image, read_image
from zsad.steps.encode import encode_images

ALL_OUTPUTS = ("patches", "plain", "tokens", "raw", "block-1", "block-3", "window-2", "window-3")
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)


def _images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _visual(seed: int, architecture: str) -> VisionTransformer:
    return tiny_clip(tiny_config(**ARCHITECTURES[architecture]), seed).visual


def _blocks(visual: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Return the tokens after each block, as computed by open_clip."""
    leaving = visual.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
    pairs = zip(leaving["image_intermediates_prefix"], leaving["image_intermediates"], strict=True)
    return [torch.cat(pair, dim=1) for pair in pairs]


@pytest.mark.parametrize("vv_blocks", ["all", "last", "first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_outputs_are_open_clips_intermediates(architecture: str, vv_blocks: str) -> None:
    visual = _visual(3, architecture)
    depth = len(visual.transformer.resblocks)
    paths = AttentionPath({"all": tuple(range(depth)), "last": (depth - 1,), "first": (0,)}[vv_blocks])
    expected = _blocks(visual, _images())
    normed = visual.forward_intermediates(_images(), output_fmt="NLC", normalize_intermediates=True)
    last = normed["image_intermediates"][-1]

    found = tower_outputs(visual, _images(), paths, plain_patches=True, blocks=range(depth))
    assert sorted(found.blocks) == list(range(depth))
    for number, tokens in enumerate(expected):
        torch.testing.assert_close(found.blocks[number], tokens, atol=1e-5, rtol=1e-5)
    assert found.last_tokens is not None
    assert found.plain_patches is not None
    torch.testing.assert_close(found.last_tokens, last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.plain_patches, last @ visual.proj, atol=1e-5, rtol=1e-5)
    # the class token and the V-V patches do not change
    class_token, patches = two_path(visual, _images(), paths)
    torch.testing.assert_close(found.class_token, visual(_images()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.class_token, class_token, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.patches, patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chosen", [(), (0,), (1,), (2,), (0, 2)])
@torch.no_grad()
def test_only_the_requested_blocks_are_returned(chosen: tuple[int, ...]) -> None:
    visual = _visual(4, "plain")
    found = tower_outputs(visual, _images(), AttentionPath((0, 1, 2)), blocks=chosen)
    assert tuple(sorted(found.blocks)) == chosen
    assert found.last_tokens is None
    assert found.plain_patches is None
    expected = _blocks(visual, _images())
    for number in chosen:
        torch.testing.assert_close(found.blocks[number], expected[number], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.class_token, visual(_images()), atol=1e-5, rtol=1e-5)


def _attended(visual: VisionTransformer, paths: AttentionPath, **wanted: Any) -> list[list[int]]:
    """Count, for each block, the tokens of each attention that our code computes. open_clip's own is not counted."""
    found: list[list[int]] = []
    for block in visual.transformer.resblocks:
        own: list[int] = []
        block.attn.out_proj.register_forward_pre_hook(lambda _, given, own=own: own.append(given[0].shape[1]))
        found.append(own)
    tower_outputs(visual, _images(), paths, **wanted)
    return found


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        # the attention of the second and of the original path over 17 tokens; at the end only the class token's
        ({}, [[17, 17], [17, 17], [17, 1]]),
        ({"patches": False}, [[], [], [1]]),
        ({"patches": False, "plain_patches": True}, [[], [], []]),
        ({"patches": False, "blocks": (0, 2)}, [[], [], []]),
        ({"patches": False, "vv_blocks": (0,)}, [[17, 17], [], [1]]),
        ({"patches": False, "vv_blocks": (1,), "blocks": (2,)}, [[17, 17], [17, 17], []]),
    ],
)
@torch.no_grad()
def test_only_what_is_needed_of_either_path_is_computed(wanted: dict[str, Any], expected: list[list[int]]) -> None:
    assert _attended(_visual(6, "plain"), AttentionPath((0, 1, 2)), **wanted) == expected


@pytest.mark.parametrize("vv_blocks", [(0, 1, 2), (1,), (2,)])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "one block"])
@torch.no_grad()
def test_without_the_second_path_everything_else_stays(architecture: str, vv_blocks: tuple[int, ...]) -> None:
    visual, paths = _visual(7, architecture), AttentionPath(vv_blocks)
    whole = tower_outputs(visual, _images(), paths, plain_patches=True, blocks=(0, 2), vv_blocks=(1,))
    less = tower_outputs(visual, _images(), paths, patches=False, plain_patches=True, blocks=(0, 2), vv_blocks=(1,))
    alone = tower_outputs(visual, _images(), paths, patches=False)
    assert less.patches is None
    assert less.last_tokens is not None
    assert whole.last_tokens is not None
    torch.testing.assert_close(less.last_tokens, whole.last_tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(less.vv_patches[1], whole.vv_patches[1], atol=1e-5, rtol=1e-5)
    for number in (0, 2):
        torch.testing.assert_close(less.blocks[number], whole.blocks[number], atol=1e-5, rtol=1e-5)
    for found in (less, alone):
        torch.testing.assert_close(found.class_token, visual(_images()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_plain_patches_are_open_clips_output_tokens() -> None:
    visual = _visual(5, "plain")
    with_tokens = deepcopy(visual)
    with_tokens.output_tokens = True
    _, tokens = with_tokens(_images())
    found = tower_outputs(visual, _images(), AttentionPath((0, 1, 2)), plain_patches=True)
    assert found.last_tokens is not None
    torch.testing.assert_close(found.last_tokens, tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [(3,), (-1, 0)])
def test_a_missing_block_is_reported(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="0 to 2"):
        tower_outputs(_visual(0, "plain"), _images(), AttentionPath((0,)), blocks=blocks)


# names


def test_names_and_their_order() -> None:
    assert EncoderOutput.parse("block-12") == EncoderOutput("block", 12)
    assert EncoderOutput.parse("plain") == EncoderOutput("plain")
    for name in ALL_OUTPUTS:
        assert EncoderOutput.parse(name).name == name
    assert [output.name for output in parse_outputs(("window-3", "plain", "block-24", "block-6", "plain"))] == [
        "block-6",
        "block-24",
        "plain",
        "window-3",
    ]


@pytest.mark.parametrize("name", ["", "block", "block-0", "block-01", "window--1", "plain-1", "Tokens", "block-1 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not an encoder output"):
        EncoderOutput.parse(name)


@pytest.mark.parametrize(
    ("output", "rule"),
    [("block-4", "block 4 is requested, but tiny has 3 blocks"), ("window-5", "tiny has 4 x 4")],
)
def test_an_output_that_the_model_does_not_have_is_one_line(output: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        EncoderOutput.parse(output).check(3, 4, "tiny")
    EncoderOutput.parse("block-3").check(3, 4, "tiny")
    EncoderOutput.parse("window-4").check(3, 4, "tiny")


# outputs from the encoder and on disk


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EncoderSettings:
    return tiny_encoder(tmp_path_factory.mktemp("model") / "tiny", seed=6, batch_size=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return images of one, two, one and three crops by digest."""
    paths = noise_images(tmp_path_factory.mktemp("images"), [(40, 40), (32, 48), (64, 64), (80, 32)])
    return {file_digest(path): path for path in paths}


@pytest.fixture(scope="module")
def encoded(settings: EncoderSettings, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features")
    encode_images(list(files.values()), list(files), settings, "cpu", out, outputs=ALL_OUTPUTS)
    return out


def test_an_encoders_outputs_are_the_towers_normalised_where_they_are_joint(settings: EncoderSettings) -> None:
    encoder = Encoder.load(settings, torch.device("cpu"))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    class_tokens, values = encoder.encode_outputs(images, parse_outputs(ALL_OUTPUTS))
    visual, normalised = encoder.model.visual, encoder.normalise(images)
    assert isinstance(visual, VisionTransformer)
    with torch.no_grad():
        blocks = _blocks(visual, normalised)
        last = visual.ln_post(blocks[-1][:, 1:])
        alone = encoder.encode(images)
        expected = {
            "patches": alone.patches,
            "plain": normalize(last @ visual.proj, dim=-1),
            "tokens": last,
            "raw": blocks[-1][:, 1:],
            "block-1": blocks[0],
            "block-3": blocks[2],
            "window-2": normalize(encode_windows(visual, normalised, [2])[0], dim=-1),
            "window-3": normalize(encode_windows(visual, normalised, [3])[0], dim=-1),
        }
    assert set(values) == set(expected)
    for output in parse_outputs(ALL_OUTPUTS):
        torch.testing.assert_close(values[output.name], expected[output.name], atol=1e-5, rtol=1e-5)
        assert values[output.name].shape[1:] == encoder.output_shape(output)
    torch.testing.assert_close(class_tokens, alone.class_token, atol=1e-5, rtol=1e-5)
    # each output requested separately
    for name in ALL_OUTPUTS:
        class_tokens, values = encoder.encode_outputs(images, parse_outputs([name]))
        assert list(values) == [name]
        torch.testing.assert_close(values[name], expected[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(class_tokens, alone.class_token, atol=1e-5, rtol=1e-5)
    class_tokens, values = encoder.encode_outputs(images, ())
    assert values == {}
    torch.testing.assert_close(class_tokens, alone.class_token, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["vv", "qq", "kk"])
def test_an_encoders_patches_are_of_the_attention_it_is_set_to(settings: EncoderSettings, attention: Attention) -> None:
    encoder = Encoder.load(settings.model_copy(update={"vv_attention": attention}), torch.device("cpu"))
    images, visual = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), encoder.model.visual
    assert isinstance(visual, VisionTransformer)
    with torch.no_grad():
        given = encoder.normalise(images)
        found = {name: two_path(visual, given, AttentionPath((0, 1, 2), attention=name))[1] for name in ATTENTIONS}
    patches = encoder.encode(images).patches
    for name, expected in found.items():
        assert torch.allclose(patches, normalize(expected, dim=-1), atol=1e-5) == (name == attention)


def test_rows_are_the_encoders_outputs_of_each_crop(
    encoded: Path, files: dict[str, Path], settings: EncoderSettings
) -> None:
    encoder, store = Encoder.load(settings, torch.device("cpu")), FeatureStore(encoded)
    assert [image.rows for image in store.images] == [1, 2, 1, 3]
    for number, image in enumerate(store.images):
        crops = crop_image(read_image(files[image.sha256]), store.crops(number))
        class_tokens, values = encoder.encode_outputs(crops, parse_outputs(ALL_OUTPUTS))
        for name, expected in values.items():
            torch.testing.assert_close(store.output(number, name), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(store.class_tokens(number), class_tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(store.patches(number), values["patches"], atol=1e-5, rtol=1e-5)
    assert np.load(encoded / "output-window-2.npy").shape == (7, 9, 24)
    assert np.load(encoded / "output-block-1.npy").dtype == np.float32


def test_order_and_batch_size_change_nothing_but_the_order(
    encoded: Path, files: dict[str, Path], settings: EncoderSettings, tmp_path: Path
) -> None:
    paths, digests = list(files.values())[::-1], list(files)[::-1]
    other_batch = settings.model_copy(update={"batch_size": 64})
    encode_images(paths, digests, other_batch, "cpu", tmp_path, outputs=ALL_OUTPUTS[::-1])
    one, other = FeatureStore(encoded), FeatureStore(tmp_path)
    for number, name in ((number, name) for number in range(4) for name in ALL_OUTPUTS):
        torch.testing.assert_close(other.output(3 - number, name), one.output(number, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [("patches",), ("window-2",), ()])
def test_only_requested_outputs_are_stored_and_others_are_reported(
    encoded: Path, files: dict[str, Path], settings: EncoderSettings, tmp_path: Path, names: tuple[str, ...]
) -> None:
    encode_images(list(files.values()), list(files), settings, "cpu", tmp_path, outputs=names)
    assert list(json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["outputs"]) == list(names)
    files_written = {"class_tokens.npy", "index.json", *(f"output-{name}.npy" for name in names)}
    assert {path.name for path in tmp_path.iterdir()} == files_written
    every, some = FeatureStore(encoded), FeatureStore(tmp_path)
    for number, name in ((number, name) for number in range(4) for name in ALL_OUTPUTS):
        torch.testing.assert_close(some.class_tokens(number), every.class_tokens(number), atol=1e-5, rtol=1e-5)
        if name in names:
            torch.testing.assert_close(some.output(number, name), every.output(number, name), atol=1e-5, rtol=1e-5)
        else:
            with pytest.raises(InputError, match=rf"output-{name}\.npy: the features were made without this output"):
                some.output(number, name)
    if "patches" not in names:
        with pytest.raises(InputError, match=r"output-patches\.npy: the features were made without this output"):
            some.patches(0)


def test_by_default_the_patches_of_the_vv_path_are_stored(
    files: dict[str, Path], settings: EncoderSettings, tmp_path: Path
) -> None:
    encode_images(list(files.values()), list(files), settings, "cpu", tmp_path)
    assert list(FeatureStore(tmp_path).index.outputs) == ["patches"]


def test_an_output_that_is_not_there_stops_before_anything_is_written(
    settings: EncoderSettings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="block 4 is requested"):
        encode_images([], [], settings, "cpu", tmp_path / "out", outputs=("block-4",))
    with pytest.raises(ValueError, match="is not an encoder output"):
        encode_images([], [], settings, "cpu", tmp_path / "out", outputs=("block",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("keep", "message"), [(0.9, "cut short"), (None, "no such file"), (0.0, r"not a \.npy file")])
def test_a_damaged_output_is_reported(encoded: Path, keep: float | None, message: str, tmp_path: Path) -> None:
    for file in encoded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "output-block-3.npy"
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=message):
        FeatureStore(tmp_path)
