"""Read the tensors of an ONNX file, and the nodes that use them. Only the few protobuf fields needed are known.

A protobuf message is a sequence of fields. Each begins with a number that holds the field's number and its wire type:
0 for a number of variable length, 1 and 5 for 8 and 4 bytes, 2 for a length and so many bytes. No code is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medad.base.errors import InputError
from medad.base.storage import reading

_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_TYPE = 1, 3, 4
_DIMS, _DATA_TYPE, _TENSOR_NAME, _RAW_DATA = 1, 2, 8, 9
_FLOAT32 = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10

Value = int | memoryview


@dataclass(frozen=True)
class OnnxNode:
    """An operation: its name, its type such as `MatMul`, and the names of its inputs."""

    name: str
    kind: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """Content of an ONNX file that was read.

    Attributes
    ----------
    tensors
        Constant tensors in float32 by name. Tensors of other types are left out.
    nodes
        Operations, in the order of the file.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    nodes: list[OnnxNode] = field(default_factory=list)


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file. Raises InputError if it is damaged, cut short, or another kind of file."""
    with reading(path):
        content = memoryview(path.read_bytes())
    try:
        graphs = [value for number, value in _fields(content) if number == _GRAPH and isinstance(value, memoryview)]
        (graph,) = graphs
        found = OnnxFile()
        for number, value in _fields(graph):
            if number == _NODE and isinstance(value, memoryview):
                found.nodes.append(_node(value))
            elif number == _INITIALIZER and isinstance(value, memoryview):
                named = _tensor(value)
                if named is not None:
                    found.tensors[named[0]] = named[1]
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise InputError(path, "is not an ONNX model, or is damaged or cut short") from error
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Yield number and value of each field of a message. Raises ValueError or IndexError for damaged bytes."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _number(message, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, at = _number(message, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(message):
            raise ValueError("a field ends behind its message")
        yield key >> 3, message[at : at + length]
        at += length


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number of variable length at a place, and the place after it."""
    value = 0
    for position in range(_LONGEST_VARINT):
        byte = message[at + position]
        value |= (byte & 127) << (7 * position)
        if byte < 128:
            return value, at + position + 1
    raise ValueError("a number without an end")


def _text(value: Value) -> str:
    return bytes(value).decode() if isinstance(value, memoryview) else ""


def _node(message: memoryview) -> OnnxNode:
    inputs, name, kind = [], "", ""
    for number, value in _fields(message):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_NAME:
            name = _text(value)
        elif number == _NODE_TYPE:
            kind = _text(value)
    return OnnxNode(name, kind, tuple(inputs))


def _tensor(message: memoryview) -> tuple[str, Tensor] | None:
    """Return name and values of a tensor. None: it is not float32, or its values are in another file."""
    shape: list[int] = []
    name, kind, raw = "", 0, None
    for number, value in _fields(message):
        if number == _DIMS:  # one number, or several packed into bytes
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number == _RAW_DATA and isinstance(value, memoryview):
            raw = value
    if kind != _FLOAT32 or raw is None:
        return None
    return name, torch.from_numpy(np.frombuffer(raw, dtype="<f4").reshape(shape).copy())


def _packed(message: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(message):
        number, at = _number(message, at)
        numbers.append(number)
    return numbers
