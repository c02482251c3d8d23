"""Check all layouts of CLIP weights that people have, the choice of the activation, and downloads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file
from torch import Tensor

from medad.base.errors import ConfigError, InputError
from tests.zsad.tiny_clip import tiny_clip, tiny_config
from zsad.clip import weights_place
from zsad.clip.encoder import Encoder
from zsad.clip.models import activation_source
from zsad.config.run import EncoderSettings

CPU = torch.device("cpu")
CONFIG = tiny_config()
NAME = "tiny-for-tests"
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _tiny_in_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(factory._MODEL_CONFIGS, NAME, CONFIG)
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def state() -> State:
    return dict(tiny_clip(CONFIG, seed=2).state_dict())


def _images(size_px: int = 32) -> Tensor:
    return torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(4))


def _load(path: Path, **settings: Any) -> Encoder:
    return Encoder.load(EncoderSettings(model=NAME, weights=str(path), **settings), CPU)


def transformers_clip(state: State) -> State:
    """Return a CLIP's tensors with the names of transformers' CLIPModel, written out by hand."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(32)[None],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "vision_model.pre_layrnorm.weight": state["visual.ln_pre.weight"],
        "vision_model.pre_layrnorm.bias": state["visual.ln_pre.bias"],
        "vision_model.post_layernorm.weight": state["visual.ln_post.weight"],
        "vision_model.post_layernorm.bias": state["visual.ln_post.bias"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
    }
    for ours, theirs, layers in (("transformer", "text_model", 2), ("visual.transformer", "vision_model", 3)):
        for number in range(layers):
            one, other = f"{ours}.resblocks.{number}", f"{theirs}.encoder.layers.{number}"
            for kind in ("weight", "bias"):
                q, k, v = state[f"{one}.attn.in_proj_{kind}"].chunk(3)
                renamed[f"{other}.self_attn.q_proj.{kind}"] = q
                renamed[f"{other}.self_attn.k_proj.{kind}"] = k
                renamed[f"{other}.self_attn.v_proj.{kind}"] = v
                renamed[f"{other}.self_attn.out_proj.{kind}"] = state[f"{one}.attn.out_proj.{kind}"]
                renamed[f"{other}.layer_norm1.{kind}"] = state[f"{one}.ln_1.{kind}"]
                renamed[f"{other}.layer_norm2.{kind}"] = state[f"{one}.ln_2.{kind}"]
                renamed[f"{other}.mlp.fc1.{kind}"] = state[f"{one}.mlp.c_fc.{kind}"]
                renamed[f"{other}.mlp.fc2.{kind}"] = state[f"{one}.mlp.c_proj.{kind}"]
    return {name: tensor.clone().contiguous() for name, tensor in renamed.items()}


def _prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "module.": _prefixed("module."),
    "_orig_mod.": _prefixed("_orig_mod."),
    "model.": _prefixed("model."),
    "clip.": _prefixed("clip."),
    "several prefixes": _prefixed("_orig_mod.module.model."),
    "under model": lambda state: {"model": state, "epoch": 3},
    "under model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
    "under state_dict": lambda state: {"state_dict": state, "best": 0.5},
    "nested twice": lambda state: {"model": {"state_dict": _prefixed("module.")(state), "epoch": 1}},
    "bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
    "transformers": transformers_clip,
    "transformers with a prefix": lambda state: _prefixed("clip.")(transformers_clip(state)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_encoder(layout: str, state: State, tmp_path: Path) -> None:
    content = LAYOUTS[layout](state)
    torch.save(content, tmp_path / "w.pt")
    paths = [tmp_path / "w.pt"]
    if all(isinstance(value, Tensor) for value in content.values()):
        save_file(content, tmp_path / "w.safetensors")
        paths.append(tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    expected, tolerance = _load(tmp_path / "plain.pt"), 0.05 if layout == "bfloat16" else 1e-6
    for path in paths:
        encoder = _load(path)
        one, other = encoder.encode(_images()), expected.encode(_images())
        torch.testing.assert_close(one.patches, other.patches, atol=tolerance, rtol=0)
        texts = ["a normal nut", "a damaged nut"]
        torch.testing.assert_close(encoder.encode_text(texts), expected.encode_text(texts), atol=tolerance, rtol=0)


def _bytes(content: bytes) -> Callable[[State, Path], object]:
    return lambda _, path: path.write_bytes(content)


REFUSED: dict[str, tuple[str, Callable[[State, Path], object], str]] = {
    "namespace": (
        ".pt",
        lambda state, path: torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, path),
        r"contains argparse\.Namespace besides tensors.*save its tensors alone: torch\.save",
    ),
    "numpy scalar": (
        ".pt",
        lambda state, path: torch.save({"state_dict": state, "best": np.float64(0.5)}, path),
        r"contains numpy\.[\w.]+ besides tensors.*save its tensors alone",
    ),
    "visual only": (
        ".pt",
        lambda state, path: torch.save(
            {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}, path
        ),
        "image tower of a CLIP alone",
    ),
    "transformers' image tower": (
        ".pt",
        lambda state, path: torch.save(
            {key: value for key, value in transformers_clip(state).items() if key.startswith("vis")}, path
        ),
        "image tower of transformers' CLIP alone",
    ),
    "shard": (
        ".safetensors",
        lambda state, path: save_file(dict(list(transformers_clip(state).items())[:40]), path),
        r"a part of transformers' CLIP: one of several files \(shards\)",
    ),
    "lora": (
        ".safetensors",
        lambda state, path: save_file({"base_model.model.vision_model.q_proj.lora_A.weight": torch.zeros(2, 2)}, path),
        "LoRA adapters; merge them",
    ),
    "april_gan": (
        ".pth",
        lambda state, path: torch.save({"trainable_linearlayer": {"fc.0.weight": torch.zeros(4, 4)}}, path),
        "linear layers of APRIL-GAN, not an encoder",
    ),
    "h5": (".h5", _bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 99), "HDF5 file of Keras"),
    "npz": (".npz", lambda state, path: np.savez(path, a=np.zeros(3)), "is a NumPy archive"),
    "zip": (".zip", _bytes(b"PK\x05\x06" + b"\0" * 18), "is a ZIP archive without weights"),
    "onnx": (".onnx", _bytes(b"\x08\x08\x12\x07pytorch" + b"0" * 99), "is an ONNX model"),
    "lfs": (".pt", _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "is a Git LFS pointer"),
    "html": (".pt", _bytes(b"<!DOCTYPE html>" * 50), "the download answered with a page"),
    "empty": (".pt", _bytes(b""), "the file is empty"),
    "directory": ("_dir", lambda state, path: path.mkdir(), "is a folder; name the file of the weights in it"),
    "downloading": (".incomplete", _bytes(b"PK\x03\x04\0\0\0\0\0"), "damaged or cut short"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_named(kind: str, state: State, tmp_path: Path) -> None:
    ending, make, message = REFUSED[kind]
    path = tmp_path / f"w{ending}"
    make(state, path)
    with pytest.raises(InputError, match=message) as caught:
        _load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.path == path


def _with_tags(monkeypatch: pytest.MonkeyPatch, *quick: bool) -> None:
    tags = {f"tag{number}": {"hf_hub": "a/b/", "quick_gelu": value} for number, value in enumerate(quick)}
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, tags)


@pytest.mark.parametrize(
    ("tags", "settings", "quick", "warned"),
    [
        ((), {}, False, False),
        ((False, False), {}, False, False),
        ((True, True), {}, True, False),
        ((True, False), {}, False, True),
        ((True, False), {"tag": "tag0"}, True, False),
        ((True, False), {"tag": "tag1"}, False, False),
        ((True, False), {"quick_gelu": True}, True, False),
        ((True, True), {"quick_gelu": False}, False, False),
    ],
)
def test_activation_of_a_saved_state_dict(
    tags: tuple[bool, ...],
    settings: dict[str, Any],
    quick: bool,
    warned: bool,
    state: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _with_tags(monkeypatch, *tags)
    torch.save(state, tmp_path / "w.pt")
    encoder = _load(tmp_path / "w.pt", **settings)
    own = tiny_clip(tiny_config(quick_gelu=quick), seed=2)
    mean, std = (
        torch.tensor(each).reshape(3, 1, 1) for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        expected = own.encode_image((_images() - mean) / std, normalize=True)
    torch.testing.assert_close(encoder.encode(_images()).class_token, expected, atol=1e-5, rtol=0)
    assert [("does not say" in note and "tag0" in note) for note in encoder.notes] == [True] * warned


def test_activation_is_part_of_keys_where_the_weights_do_not_decide() -> None:
    file = {"model": "ViT-B-32", "weights": "x.pt"}
    found = [
        activation_source(EncoderSettings.model_validate(values))
        for values in (
            file,
            file | {"tag": "openai"},
            file | {"quick_gelu": True},
            file | {"quick_gelu": False},
            {"model": "ViT-B-32", "tag": "openai"},
        )
    ]
    assert found == [{}, {"activation": "as openai"}, {"activation": "quick_gelu"}, {"activation": "gelu"}, {}]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["bicubic", "bilinear"])
def test_positions_are_resized_as_in_public_programs(positions: str, state: State, tmp_path: Path) -> None:
    """MuSc and AnomalyCLIP resize the grid of positions by torch's interpolate without antialiasing."""
    torch.save(state, tmp_path / "w.pt")
    grid = state["visual.positional_embedding"][1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (2, 2), mode=positions, align_corners=False)
    expected = torch.cat([state["visual.positional_embedding"][:1], grid.permute(0, 2, 3, 1).reshape(4, -1)])
    encoder = _load(tmp_path / "w.pt", size_px=16, positions=positions)
    torch.testing.assert_close(encoder.model.state_dict()["visual.positional_embedding"], expected)
    smooth = _load(tmp_path / "w.pt", size_px=16).model.state_dict()["visual.positional_embedding"]
    assert (smooth - expected).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_changes_features_little_and_text_not(precision: Any, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    full, half = _load(tmp_path / "w.pt"), _load(tmp_path / "w.pt", precision=precision)
    one, other = full.encode(_images()), half.encode(_images())
    assert (full.precision, half.precision) == ("fp32", precision)
    assert other.patches.dtype == other.class_token.dtype == torch.float32
    cosines = (one.patches * other.patches).sum(dim=-1)
    assert 1 - 2e-3 < cosines.min() < cosines.max() <= 1 + 1e-5
    assert not torch.equal(one.patches, other.patches)
    assert torch.equal(full.encode_text(["a nut"]), half.encode_text(["a nut"]))
    assert half.identity["precision"] == precision


def test_values_too_large_for_fp16_are_reported(state: State, tmp_path: Path) -> None:
    torch.save(state | {"visual.proj": state["visual.proj"] * 1e6}, tmp_path / "w.pt")
    assert _load(tmp_path / "w.pt").encode(_images()).class_token.isfinite().all()
    with pytest.raises(ConfigError, match="too large for it; set bf16 or fp32"):
        _load(tmp_path / "w.pt", precision="fp16").encode(_images())


def test_failed_download_is_tried_once_and_quietly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"far": {"hf_hub": "someone/tiny/"}})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights_place, "_failed", {})
    asked: list[str] = []

    def no_answer(url: str, **_: object) -> None:
        asked.append(url)
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_answer)
    for _ in range(3):
        with pytest.raises(ConfigError, match=r"cannot be downloaded \(no route to the hub\)") as caught:
            Encoder.load(EncoderSettings(model=NAME, tag="far"), CPU)
        assert "\n" not in str(caught.value)
    assert len(asked) == 1
    assert capfd.readouterr() == ("", "")


def test_imported_tag_needs_no_hub(monkeypatch: pytest.MonkeyPatch, state: State, tmp_path: Path) -> None:
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"far": {"hf_hub": "someone/tiny/"}})
    monkeypatch.setenv("ADFLOWS_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    save_file(state, tmp_path / "models" / f"{NAME}.far.safetensors")
    encoder = Encoder.load(EncoderSettings(model=NAME, tag="far"), CPU)
    assert torch.equal(encoder.model.state_dict()["visual.proj"], state["visual.proj"])
