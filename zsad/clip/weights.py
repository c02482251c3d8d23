"""Read weights from local files: safetensors, PyTorch checkpoints and OpenAI's TorchScript archives.

No code from a file is run. For archives this needs an unpickler here that accepts only tensors. `torch.jit.load` is
deprecated and would compile the archive's code, and `torch.load` with `weights_only` refuses archives.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import convert_to_custom_text_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medad.base.errors import InputError
from medad.base.storage import reading
from zsad.clip.clip_names import content_in_words, from_transformers
from zsad.clip.positions import Interpolation, resize_positions, square_side

OPENAI_SIZES = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Names of numbers that OpenAI's state dicts contain in addition to the weights."""
_TRAINING_ONLY = frozenset({"logit_scale", "logit_bias"})
_POSITIONS = "visual.positional_embedding"
_NESTED = ("state_dict", "model_state_dict", "model", "teacher")
"""Names under which training programs keep a model's weights in a checkpoint."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")
"""Prefixes that wrappers of a model add to all names."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
"""Name of an object other than a tensor, in an error of torch.load."""
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Weights:
    """Tensors of a model by name, in float32.

    Parameters
    ----------
    path
        File of the weights, for error messages.
    tensors
        Tensors by their names in open_clip.
    openai
        Whether OpenAI published the file, so that the model needs quick GELU.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    openai: bool

    def content(self) -> str:
        """Say in words what the file holds, for messages about a file of another model."""
        return content_in_words(self.tensors)


def read_weights(path: Path) -> Weights:
    """Read a weights file. Its format is detected from the content, not from the suffix.

    - safetensors
    - a file of `torch.save`: a state dict, or a training checkpoint with one under a name of `_NESTED`
    - a TorchScript archive, as OpenAI published CLIP

    A prefix that all names have, such as `module.`, is removed. The names of transformers' CLIP become those of
    open_clip. Half precision is converted to float32.

    Raises
    ------
    InputError
        The file is missing, damaged or in another format, or contains values that are not finite.
    """
    if path.is_dir():
        raise InputError(path, "is a folder; name the file of the weights in it, or set encoder.model=local-dir:FOLDER")
    with reading(path), path.open("rb") as file:
        head = file.read(64)
    openai = False
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        tensors = _safetensors(path)
    elif head[:2] == b"PK" and _is_torchscript(path):
        tensors, openai = _torchscript(path), True
    elif head[:2] == b"PK" or head[:1] == b"\x80":
        tensors = _checkpoint(path, new_format=head[:2] == b"PK")
    else:
        raise InputError(path, _other_format(path, head))
    tensors = without_prefix(tensors)
    if not tensors:
        raise InputError(path, "contains no weights")
    openai = openai or tensors.keys() >= OPENAI_SIZES
    tensors = from_transformers(tensors) or tensors
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name not in OPENAI_SIZES and not name.endswith("attn_mask")
    }
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(path, f"contains values that are not finite, in {name}")
    return Weights(path, weights, openai)


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of `_PREFIXES` that all names have, also several one after the other."""
    named = dict(tensors)
    while named and (prefix := next((each for each in _PREFIXES if all(n.startswith(each) for n in named)), None)):
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named


def _other_format(path: Path, head: bytes) -> str:
    """Say what a file is that holds no weights in a known format."""
    formats = {
        b"\x89HDF": "is an HDF5 file of Keras or TensorFlow",
        b"\x93NUMPY": "is a NumPy array",
        b"GGUF": "is a GGUF file",
        b"\x1f\x8b": "is a gzip archive; unpack it",
        b"\x08": "is an ONNX model",
    }
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run `git lfs pull` where it comes from"
    if head.lstrip()[:1] == b"<":
        return "is an HTML or XML page, not weights; the download answered with a page"
    known = next((text for start, text in formats.items() if head.startswith(start)), None)
    expected = "expected safetensors, a PyTorch checkpoint or a TorchScript archive"
    return f"{known or 'is not a weights file'}; {expected}"


def load_into(model: torch.nn.Module, weights: Weights, *, name: str, resize: Interpolation | None) -> None:
    """Load weights into a model of open_clip.

    Parameters
    ----------
    model
        A `CLIP` or `CustomTextCLIP`, changed in place.
    weights
        All weights of the model.
    name
        Name of the model in error messages.
    resize
        Interpolation of position embeddings of another image size. None: another size is an error.

    Raises
    ------
    InputError
        The weights are of another architecture. The message names the first tensor that differs.
    """
    state = dict(weights.tensors)
    if "visual.conv1.weight" not in state or not {"token_embedding.weight", "text.token_embedding.weight"} & set(state):
        raise InputError(weights.path, f"not the weights of {name}: {weights.content()}")
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for scalar in _TRAINING_ONLY:
        # not used at inference; versions of open_clip differ in their presence and shape
        state.pop(scalar, None)
        if scalar in own:
            state[scalar] = own[scalar]
    if resize is not None and _POSITIONS in state:
        stored = state[_POSITIONS]
        if stored.ndim != 2 or square_side(len(stored) - 1) is None:
            raise InputError(weights.path, f"{_POSITIONS} is {_shape(stored)}, not of a square of patches")
        side = int(model.visual.grid_size[0])  # type: ignore[union-attr, index]
        state[_POSITIONS] = torch.cat([stored[:1], resize_positions(stored[1:], side, resize)])
    if found := difference(state, own):
        raise InputError(weights.path, f"weights of another architecture than {name}: {found}")
    model.load_state_dict(state)


def difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return the first difference in names and shapes, in words, or None."""
    for name, tensor in own.items():
        if name in state and state[name].shape != tensor.shape:
            hint = "; size_px interpolates them" if name == _POSITIONS else ""
            return f"{name} is {_shape(state[name])} in the file and {_shape(tensor)} in the model{hint}"
    if missing := [name for name in own if name not in state]:
        return f"the file lacks {missing[0]}{_more(missing)}"
    if extra := [name for name in state if name not in own]:
        return f"the file also contains {extra[0]}{_more(extra)}"
    return None


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(path, f"the safetensors file is damaged ({error})") from error


def _checkpoint(path: Path, *, new_format: bool) -> dict[str, Tensor]:
    """Read the tensors of a file of torch.save."""
    try:
        if new_format and path.suffix != ".safetensors":  # for a path with this suffix, torch.load expects safetensors
            # mapped, so that the optimiser state of a training checkpoint (twice the weights) is not read
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with path.open("rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        raise InputError(
            path,
            f"contains {found[1] if found else 'other objects'} besides tensors, and loading that could run its code; "
            "where you trust the file, save its tensors alone: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(path, "the PyTorch checkpoint is damaged or cut short") from error
    checkpoint = _inner(checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise InputError(path, f"contains a {type(checkpoint).__name__}, not weights by name")
    tensors = {str(name): tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}
    groups = [(name, group) for name, group in checkpoint.items() if isinstance(group, Mapping)]
    return tensors or {
        f"{name}.{key}": t for name, group in groups for key, t in group.items() if isinstance(t, Tensor)
    }


def _inner(checkpoint: Any) -> Any:
    """Return the state dict in a training checkpoint, at any depth of the names `_NESTED`."""
    while isinstance(checkpoint, Mapping):
        inner = next((checkpoint[name] for name in _NESTED if isinstance(checkpoint.get(name), Mapping)), None)
        if inner is None or any(isinstance(value, Tensor) for value in checkpoint.values()):
            break
        checkpoint = inner
    return checkpoint


def _is_torchscript(path: Path) -> bool:
    """Return whether an archive is TorchScript: only these have a file constants.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith(".pkl") for name in names):
                arrays = bool(names) and all(name.endswith(".npy") for name in names)
                kind = "a NumPy archive" if arrays else "a ZIP archive without weights"
                raise InputError(path, f"is {kind}; expected safetensors or a PyTorch checkpoint")
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names)
    except zipfile.BadZipFile as error:
        raise InputError(path, "the archive is damaged or cut short") from error


def _torchscript(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a TorchScript archive by their attribute paths."""
    try:
        with zipfile.ZipFile(path) as archive:
            top = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            with archive.open(top) as file:
                root = _TensorUnpickler(file, archive, top.removesuffix("data.pkl")).load()
        return dict(_walk(root, ""))
    except Exception as error:  # damaged pickles raise many types
        raise InputError(path, "the TorchScript archive is damaged or has more than modules and tensors") from error


class _Module:
    """Replacement of any object in the archive. It has the object's attributes but no behaviour."""

    attributes: Mapping[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, Mapping) else {}


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, _Module):
        for name, child in value.attributes.items():
            yield from _walk(child, f"{prefix}.{name}" if prefix else name)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler that resolves only a short list of names, so that a file cannot call other functions."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle":  # typed lists and dicts: the value is the first argument
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if key not in self._storages:
            raw = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            self._storages[key] = (
                torch.frombuffer(raw, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)
