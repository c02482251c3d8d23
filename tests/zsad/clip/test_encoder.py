"""Check loading of all kinds of weights, error messages in one line, and the features against open_clip's own."""

from __future__ import annotations

import json
import os
import pickle
import socket
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import Normalize

from medad.base.errors import ConfigError, InputError, UserError
from tests.zsad.tiny_clip import tiny_clip, tiny_config, write_folder
from zsad.clip.architecture import OPENAI_MEAN, OPENAI_STD
from zsad.clip.encoder import Encoder
from zsad.clip.models import weights_digest
from zsad.clip.prompts import Ensemble, ensemble
from zsad.clip.weights import read_weights
from zsad.config.run import EncoderSettings, PromptSettings

CPU = torch.device("cpu")
CONFIG = tiny_config()
NAME = "tiny-for-tests"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def _tiny_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add our tiny model to open_clip's list and forbid the network."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, NAME, CONFIG)

    def no_network(*_: object, **__: object) -> None:
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    return tiny_clip(CONFIG, seed=2)


@pytest.fixture(scope="module")
def folder(model: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "tiny", model, CONFIG, mean=MEAN, std=STD)


def _images(count: int = 2, size_px: int = 32) -> Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(4))


def _load(**settings: Any) -> Encoder:
    return Encoder.load(EncoderSettings(**settings), CPU)


def _from_folder(folder: Path, **settings: Any) -> Encoder:
    return _load(model=f"local-dir:{folder}", **settings)


class _Node(nn.Module):
    """Module of an archive: attributes and a method."""

    def forward(self) -> int:
        return 0


def _save_torchscript(state: Mapping[str, Tensor], path: Path) -> None:
    """Write an archive as OpenAI published them, with their names, half precision and extra entries."""
    root = _Node()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        at: nn.Module = root
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, _Node())
            at = at.get_submodule(parent)
        at.register_parameter(leaf, nn.Parameter(tensor.half()))
    for name, value in (("input_resolution", 32), ("context_length", 32), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(value))
    root.get_submodule("transformer").attn_mask = torch.zeros(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but the archives are still used
        torch.jit.script(root).save(str(path))  # type: ignore[no-untyped-call]


State = Mapping[str, Tensor]
KINDS: dict[str, Callable[[State, Path], None]] = {
    "state dict": lambda state, path: torch.save(dict(state), path),
    "training checkpoint": lambda state, path: torch.save(
        {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 0.1}},
        path,
    ),
    "module. alone": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "before PyTorch 1.6": lambda state, path: torch.save(dict(state), path, _use_new_zipfile_serialization=False),
    "half precision": lambda state, path: torch.save({k: v.half() for k, v in state.items()}, path),
    "safetensors": lambda state, path: save_file(dict(state), path),
    "half safetensors": lambda state, path: save_file({k: v.half() for k, v in state.items()}, path),
    "logit_scale of one element": lambda state, path: torch.save(
        dict(state) | {"logit_scale": state["logit_scale"].reshape(1), "logit_bias": torch.zeros(1)}, path
    ),
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_loads(kind: str, ending: str, model: open_clip.CLIP, tmp_path: Path) -> None:
    path = tmp_path / f"weights{ending}"
    KINDS[kind](model.state_dict(), path)
    encoder = _load(model=NAME, weights=str(path))
    atol, rtol = (1e-3, 1e-2) if "half" in kind else (0.0, 0.0)
    for name, tensor in model.state_dict().items():
        if name != "logit_scale":  # used by training only
            loaded = encoder.model.state_dict()[name]
            assert loaded.dtype == torch.float32
            torch.testing.assert_close(loaded, tensor, atol=atol, rtol=rtol)


def test_the_default_statistics_are_open_clips() -> None:
    assert (OPENAI_MEAN, OPENAI_STD) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def test_openai_archive_loads_with_quick_gelu(tmp_path: Path) -> None:
    model = tiny_clip(tiny_config(quick_gelu=True), seed=6)
    path = tmp_path / "openai.pt"
    _save_torchscript(model.state_dict(), path)
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    encoder = _load(model=NAME, weights=str(path))
    normalised = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)(_images())
    with torch.no_grad():
        expected = model.encode_image(normalised, normalize=True)
        plain = tiny_clip(CONFIG, seed=6)
        plain.load_state_dict(model.state_dict())
        with_gelu = plain.encode_image(normalised, normalize=True)
    torch.testing.assert_close(encoder.encode(_images()).class_token, expected, atol=1e-5, rtol=0)
    assert (expected - with_gelu).abs().max() > 1e-4, "the test cannot distinguish the activations"


def test_archive_gives_what_torchscript_itself_reads(tmp_path: Path, model: open_clip.CLIP) -> None:
    path = tmp_path / "openai.pt"
    _save_torchscript(model.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(str(path)).state_dict()  # type: ignore[no-untyped-call]
    found = read_weights(path)
    assert found.openai
    assert set(found.tensors) == set(expected) - {"input_resolution", "context_length", "vocab_size"}
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in found.tensors.items())


class _Trap:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


def test_no_code_of_a_file_runs(tmp_path: Path, model: open_clip.CLIP) -> None:
    trap = _Trap(tmp_path / "sprung")
    torch.save({"state_dict": dict(model.state_dict()), "x": trap}, tmp_path / "new.pt")
    torch.save({"x": trap}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(trap, protocol=2))
        archive.writestr("a/constants.pkl", b"")
    for path in tmp_path.glob("*.pt"):
        with pytest.raises(InputError, match=r"code|more than modules and tensors"):
            read_weights(path)
    assert not trap.sprung.exists()


def _wrong_files(state: State, path: Path) -> dict[str, tuple[Callable[[], object], str]]:
    """Return how to make each wrong file, and the text in its error.

    A file is then cut to half its size if its kind begins with `cut`.
    """

    def save(content: object) -> None:
        torch.save(content, path)

    first = "visual.class_embedding"
    return {
        "missing": (lambda: None, "no such file"),
        "folder": (path.mkdir, "is a folder; name the file"),
        "empty": (path.touch, "the file is empty"),
        "text": (lambda: path.write_text("not weights", encoding="utf-8"), "is not a weights file"),
        "numpy": (lambda: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{"), "is a NumPy array"),
        "json": (lambda: path.write_bytes(b"12345678{]"), "safetensors"),
        "cut safetensors": (lambda: save_file(dict(state), path), "safetensors file is damaged"),
        "cut checkpoint": (lambda: save(dict(state)), "damaged or cut short"),
        "cut old checkpoint": (
            lambda: torch.save(dict(state), path, _use_new_zipfile_serialization=False),
            "damaged or cut short",
        ),
        "cut archive": (lambda: _save_torchscript(state, path), "damaged or cut short"),
        "list": (lambda: save([torch.zeros(2)]), "contains a list"),
        "no tensors": (lambda: save({"epoch": 3}), "contains no weights"),
        "not finite": (
            lambda: save(dict(state) | {first: state[first] * float("nan")}),
            "not finite, in visual.class_embedding",
        ),
        "another width": (
            lambda: save(tiny_clip(tiny_config(width=48)).state_dict()),
            "another architecture than tiny-for-tests, weights from it.pt: visual.class_embedding is 48 in the file",
        ),
        "deeper": (
            lambda: save(tiny_clip(tiny_config(layers=4)).state_dict()),
            "also contains visual.transformer.resblocks.3",
        ),
        "shallower": (
            lambda: save(tiny_clip(tiny_config(layers=2)).state_dict()),
            "lacks visual.transformer.resblocks.2",
        ),
        "half a model": (
            lambda: save({k: v for k, v in state.items() if k.startswith("visual")}),
            "holds the image tower of a CLIP alone; the text tower is missing",
        ),
        "another image size": (
            lambda: save(tiny_clip(tiny_config(image_size=48)).state_dict()),
            "visual.positional_embedding is 37 x 32 in the file and 17 x 32 in the model; size_px",
        ),
    }


@pytest.mark.parametrize("kind", _wrong_files({}, Path()))
def test_wrong_files_are_reported_in_one_line(kind: str, model: open_clip.CLIP, tmp_path: Path) -> None:
    path = tmp_path / "it.pt"
    make, message = _wrong_files(model.state_dict(), path)[kind]
    make()
    if kind.startswith("cut"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError) as caught:
        _load(model=NAME, weights=str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.path == path


def test_positions_that_are_not_a_square_are_reported(model: open_clip.CLIP, tmp_path: Path) -> None:
    positions = {"visual.positional_embedding": torch.zeros(12, 32)}
    torch.save(dict(model.state_dict()) | positions, tmp_path / "x.pt")
    with pytest.raises(InputError, match="12 x 32, not of a square"):
        _load(model=NAME, weights=str(tmp_path / "x.pt"), size_px=48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ViT-B-16-plus-24", "seed": 0}, "no such model; similar names: ViT-B-16-plus-240"),
        ({"model": "hf-hub:someone/something", "seed": 0}, "no such model"),
        ({"model": "RN50", "seed": 0}, "not a plain vision transformer"),
        ({"model": "ViT-B-16-SigLIP", "seed": 0}, "not a plain vision transformer"),
        ({"model": "coca_ViT-B-32", "seed": 0}, "not a plain vision transformer"),
        ({"model": "roberta-ViT-B-32", "seed": 0}, "text tower"),
        ({"model": "ViT-L-14-CLIPA", "seed": 0, "model_as": {"text_cfg": {"hf_tokenizer_name": "x"}}}, "tokenizer"),
        ({"model": NAME, "tag": "nobody"}, "has no such tag; it has: none"),
        ({"model": "ViT-B/16", "tag": "nobody"}, "laion400m_e32"),
        ({"model": NAME, "seed": 0, "size_px": 36}, "not a multiple of the model's patch size, 8 px"),
        ({"model": NAME, "seed": 0, "preset": "anomalyclip", "size_px": 32}, "vv_blocks 19"),
        ({"model": NAME, "seed": 0, "vv_blocks": (0, 3)}, "has 3 blocks, 0 to 2"),
        ({"model": NAME, "seed": 0, "vv_blocks": (2, 1)}, "rising"),
        ({"model": NAME, "seed": 0, "vv_blocks": ()}, "has 3 blocks"),
        ({"model": NAME, "seed": 0, "model_as": {"vision_cfg": {"qk_norm": True}}}, "custom attention"),
        ({"model": NAME, "seed": 0, "model_as": {"vision_cfg": {"no_such": 1}}}, "open_clip cannot build it"),
    ],
)
def test_wrong_settings_are_reported_in_one_line(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = settings.pop("model_as", None) if "model_as" in settings else None
    if change is not None:
        config = tiny_config()
        for part, values in change.items():
            config[part] |= values
        monkeypatch.setitem(factory._MODEL_CONFIGS, settings["model"], config)
        settings = settings | {"model_as": change}
    with pytest.raises(ConfigError) as caught:
        _load(**{key: value for key, value in settings.items() if key != "model_as"})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "model_cfg"),
        ("[]", "model_cfg"),
        ('{"model_cfg": {"vision_cfg": 3}}', "model_cfg"),
    ],
)
def test_wrong_folders_are_reported_in_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "open_clip_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        _from_folder(tmp_path)


def test_folder_without_weights_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    with pytest.raises(InputError, match=r"contains no weights; expected open_clip_model\.safetensors"):
        _from_folder(tmp_path)


@torch.no_grad()
def test_folder_gives_what_open_clip_loads_from_it(folder: Path) -> None:
    encoder = _from_folder(folder)
    own = open_clip.create_model(f"local-dir:{folder}").eval()
    expected = own.encode_image(Normalize(MEAN, STD)(_images()), normalize=True)
    tokens = encoder.encode(_images())
    torch.testing.assert_close(tokens.class_token, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.patches.norm(dim=-1), torch.ones(2, 16))
    torch.testing.assert_close(encoder.encode_patches(_images()), tokens.patches)
    assert (encoder.size_px, encoder.grid, encoder.dim, encoder.context_length) == (32, 4, 24, 32)
    assert not encoder.random_weights
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not encoder.model.training
    json.dumps(encoder.identity)
    assert str(folder.parent) not in json.dumps(encoder.identity) + encoder.description


@torch.no_grad()
@pytest.mark.parametrize("size_px", [16, 48, 64])
def test_another_image_size_interpolates_positions_as_open_clip_does(folder: Path, size_px: int) -> None:
    encoder = _from_folder(folder, size_px=size_px)
    own = open_clip.create_model(f"local-dir:{folder}", force_image_size=size_px).eval()
    expected = own.encode_image(Normalize(MEAN, STD)(_images(size_px=size_px)), normalize=True)
    tokens = encoder.encode(_images(size_px=size_px))
    torch.testing.assert_close(tokens.class_token, expected, atol=1e-5, rtol=0)
    assert encoder.size_px == size_px
    assert tokens.patches.shape == (2, encoder.grid**2, 24) == (2, (size_px // 8) ** 2, 24)


@torch.no_grad()
def test_seed_gives_what_open_clip_makes_of_it_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    encoder = _load(model=NAME, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        own = open_clip.create_model(NAME).eval()
    normalised = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)(_images())
    torch.testing.assert_close(
        encoder.encode(_images()).class_token, own.encode_image(normalised, normalize=True), atol=1e-5, rtol=0
    )
    assert encoder.random_weights
    assert "RANDOM" in encoder.description
    assert not torch.equal(encoder.encode(_images()).patches, _load(model=NAME, seed=12).encode(_images()).patches)


def test_presets_choose_blocks_and_class_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tiny_config(layers=24, patch_size=14, image_size=28)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-of-24", config)
    encoder = _load(model="tiny-of-24", seed=0, preset="anomalyclip")
    assert encoder.attention_path.vv_blocks == tuple(range(5, 24))
    assert not encoder.attention_path.class_ln_post
    assert (encoder.size_px, encoder.grid) == (518, 37)
    anovl = _load(model="tiny-of-24", seed=0)
    assert anovl.attention_path.vv_blocks == tuple(range(24))
    assert anovl.attention_path.class_ln_post
    assert anovl.size_px == 28
    assert not anovl.attention_path.feed_forward
    chosen = _load(model="tiny-of-24", seed=0, vv_blocks=(3, 9), vv_feed_forward=True, vv_temperature=0.5)
    assert (chosen.attention_path.vv_blocks, chosen.attention_path.feed_forward, chosen.attention_path.temperature) == (
        (3, 9),
        True,
        0.5,
    )


def _hub_cache(root: Path, repository: str, filename: str) -> Path:
    """Return the path of a repository's file in the hub's cache."""
    base = root / f"models--{repository.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("abc", encoding="utf-8")
    (base / "snapshots" / "abc").mkdir(parents=True)
    return base / "snapshots" / "abc" / filename


@pytest.mark.parametrize("filename", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_cached_tag_needs_no_network(filename: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_clip(tiny_config(quick_gelu=True), seed=6)
    tag = {"hf_hub": "someone/tiny/", "mean": MEAN, "std": STD, "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"here": tag})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    path = _hub_cache(tmp_path, "someone/tiny", filename)
    KINDS["safetensors" if filename.endswith("safetensors") else "state dict"](model.state_dict(), path)
    encoder = _load(model=NAME, tag="here")
    with torch.no_grad():
        expected = model.encode_image(Normalize(MEAN, STD)(_images()), normalize=True)
    torch.testing.assert_close(encoder.encode(_images()).class_token, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", [{"hf_hub": "someone/tiny/"}, {"url": "https://localhost:9/mlfoundations/x-00.pt"}])
def test_tag_that_cannot_be_downloaded_is_reported(
    where: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"far": where})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the hub's client retries with growing delays
    with pytest.raises(ConfigError, match=r"encoder\.tag far of tiny-for-tests is not in the local cache") as caught:
        _load(model=NAME, tag="far")
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_text_is_open_clips_and_an_ensemble_is_the_mean_direction(folder: Path) -> None:
    encoder = _from_folder(folder)
    own = open_clip.create_model(f"local-dir:{folder}").eval()
    prompts = ensemble("metal_nut", PromptSettings())
    tokenise = open_clip.get_tokenizer(f"local-dir:{folder}")
    sides = []
    for side in (prompts.normal, prompts.anomalous):
        features = own.encode_text(tokenise(list(side)))
        features = features / features.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(encoder.encode_text(side), features, atol=1e-5, rtol=0)
        sides.append(features.sum(0) / features.sum(0).norm())
    torch.testing.assert_close(encoder.encode_ensemble(prompts), torch.stack(sides), atol=1e-5, rtol=0)
    raw = Ensemble(prompts.normal, prompts.anomalous, unit_length=False)
    sides = [encoder.encode_text(side, unit_length=False).sum(0) for side in (raw.normal, raw.anomalous)]
    expected = torch.stack([side / side.norm() for side in sides])
    torch.testing.assert_close(encoder.encode_ensemble(raw), expected, atol=1e-5, rtol=0)
    assert encoder.encode_text(raw.normal, unit_length=False).norm(dim=-1).max() > 1.01


def test_prompt_that_would_be_cut_is_refused(folder: Path) -> None:
    encoder = _from_folder(folder)
    fits = "a " * 30
    assert encoder.encode_text([fits.strip()]).shape == (1, 24)
    with pytest.raises(ConfigError, match="longer than the model's limit of 32 tokens"):
        encoder.encode_ensemble(Ensemble(("a b",), (fits + "b",)))


def test_digests_follow_the_weights_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    def of(**settings: Any) -> str:
        return weights_digest(EncoderSettings(**settings))

    same = write_folder(tmp_path / "elsewhere", tiny_clip(CONFIG, seed=2), CONFIG, mean=MEAN, std=STD)
    assert of(model=f"local-dir:{folder}") == of(model=f"local-dir:{same}")
    (same / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}), encoding="utf-8")
    assert of(model=f"local-dir:{folder}") != of(model=f"local-dir:{same}")
    weights = str(folder / "open_clip_model.safetensors")
    assert of(model=NAME, weights=weights) == of(model="other", weights=weights)
    assert of(model=NAME, seed=1) == "seed:1"
    assert of(model=NAME, tag="here") == "tag:here"
    with pytest.raises(UserError, match="no such file"):
        of(model=NAME, weights=str(tmp_path / "none.pt"))
