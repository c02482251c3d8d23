"""Read weights from local files: safetensors, PyTorch checkpoints and OpenAI's TorchScript archives.

No code from a file is run. For archives this needs an unpickler here that accepts only tensors. `torch.jit.load` is
deprecated and would compile the archive's code, and `torch.load` with `weights_only` refuses archives.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import convert_to_custom_text_state_dict, resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medad.base.errors import InputError
from medad.base.storage import reading

OPENAI_SIZES = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Names of numbers that OpenAI's state dicts contain in addition to the weights."""
_TRAINING_ONLY = frozenset({"logit_scale", "logit_bias"})
_POSITIONS = "visual.positional_embedding"
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


def read_weights(path: Path) -> Weights:
    """Read a weights file. Its format is detected from the content, not from the suffix.

    - safetensors
    - a file of `torch.save`: a state dict, or a training checkpoint with one under `state_dict`. Names may have the
      prefix `module.`.
    - a TorchScript archive, as OpenAI published CLIP

    Half precision is converted to float32.

    Raises
    ------
    InputError
        The file is missing, damaged or in another format, or contains values that are not finite.
    """
    with reading(path), path.open("rb") as file:
        head = file.read(9)
    openai = False
    if head[8:9] == b"{":
        tensors = _safetensors(path)
    elif head[:2] == b"PK" and _is_torchscript(path):
        tensors, openai = _torchscript(path), True
    elif head[:2] == b"PK" or head[:1] == b"\x80":
        tensors = _checkpoint(path, new_format=head[:2] == b"PK")
    else:
        raise InputError(
            path, "is not a weights file; expected safetensors, a PyTorch checkpoint or a TorchScript archive"
        )
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise InputError(path, "contains no weights")
    openai = openai or tensors.keys() >= OPENAI_SIZES
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name not in OPENAI_SIZES and not name.endswith("attn_mask")
    }
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(path, f"contains values that are not finite, in {name}")
    return Weights(path, weights, openai)


def load_into(model: torch.nn.Module, weights: Weights, *, name: str, resize: bool) -> None:
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
        Whether position embeddings of another image size are interpolated to the model's size, as in open_clip.

    Raises
    ------
    InputError
        The weights are of another architecture. The message names the first tensor that differs.
    """
    state = dict(weights.tensors)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for scalar in _TRAINING_ONLY:
        # not used at inference; versions of open_clip differ in their presence and shape
        state.pop(scalar, None)
        if scalar in own:
            state[scalar] = own[scalar]
    if resize and _POSITIONS in state:
        patches = len(state[_POSITIONS]) - 1
        if state[_POSITIONS].ndim != 2 or math.isqrt(max(patches, 0)) ** 2 != patches or patches < 1:
            raise InputError(weights.path, f"{_POSITIONS} is {_shape(state[_POSITIONS])}, not of a square of patches")
        resize_pos_embed(state, model)
    if difference := _difference(state, own):
        raise InputError(weights.path, f"weights of another architecture than {name}: {difference}")
    model.load_state_dict(state)


def _difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
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
        raise InputError(
            path, "is not a PyTorch checkpoint of tensors only, and loading more could run its code"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(path, "the PyTorch checkpoint is damaged or cut short") from error
    if isinstance(checkpoint, Mapping):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise InputError(path, f"contains a {type(checkpoint).__name__}, not weights by name")
    return {str(name): tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}


def _is_torchscript(path: Path) -> bool:
    """Return whether an archive is TorchScript: only these have a file constants.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
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
