"""Features on disk: encoded once, used by every seed, pairing and variant. This half reads them.

Text: `text.safetensors` with `text` f32 [2 D] (normal, anomalous) and `text.json`. Images: `class_tokens.npy` f32
[R D], one `output-NAME.npy` f32 [R . .] for each requested encoder output (`zsad.config.encoder_outputs`), with one
row per crop, and `index.json`. The index is written last; it maps images, named by digest, to rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from numpy.lib import format as npy
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medad.base.errors import InputError
from medad.base.storage import read_record, reading
from zsad.config.encoder_outputs import PATCHES
from zsad.data.images import Crops

CLASS_TOKENS, INDEX, TEXT = "class_tokens.npy", "index.json", "text.safetensors"


class StoredRecord(BaseModel):
    """What lies on disk as JSON: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageRows(StoredRecord):
    """One encoded image."""

    sha256: str
    height: int
    width: int
    canvas: tuple[int, int]
    """Height and width once resized, px."""
    offsets: tuple[tuple[int, int], ...]
    """Top and left of its crops on the canvas, px."""
    first_row: int
    rows: int
    """Crops, and rows in every file."""


class ImageProblem(StoredRecord):
    """An image, by its content, that a step left out."""

    sha256: str
    rule: str


class FeatureIndex(StoredRecord):
    """Everything about the features but their values."""

    format: Literal["adflows zsad features 2"] = Field(default="adflows zsad features 2", alias="schema")
    size_px: int
    """Side of a crop."""
    grid: int
    """Patches a side; N = grid squared."""
    dim: int
    """D."""
    model: str
    """In words."""
    random_weights: bool
    identity: dict[str, Any]
    """Architecture, weights and normalisation."""
    images: tuple[ImageRows, ...]
    problems: tuple[ImageProblem, ...]
    outputs: dict[str, tuple[int, int]]
    """By name, the shape of a row."""


def output_file(name: str) -> str:
    """Where an output's rows lie."""
    return f"output-{name}.npy"


class FeatureStore:
    """The features of a set of images, read image by image.

    Every read goes to the file by offset and nothing is mapped, so resident memory does not grow with the set. Safe to
    share between threads.

    Parameters
    ----------
    folder
        Where `zsad.steps.encode.encode_images` wrote them.

    Raises
    ------
    InputError
        The folder holds no such features, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX
        self.index = read_record(FeatureIndex, path, "an index of image features")
        self.folder = folder
        self.images = self.index.images
        self.problems = self.index.problems
        rows = sum(image.rows for image in self.images)
        self._tokens_start = data_offset(folder / CLASS_TOKENS, (rows, self.dim))
        self._output_starts = {
            name: data_offset(folder / output_file(name), (rows, *shape)) for name, shape in self.index.outputs.items()
        }

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size_px(self) -> int:
        """Side of a crop."""
        return self.index.size_px

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.index.grid

    @property
    def dim(self) -> int:
        """Dimension of the joint space."""
        return self.index.dim

    @property
    def digests(self) -> tuple[str, ...]:
        """sha256 of each image, in order."""
        return tuple(image.sha256 for image in self.images)

    def rows_of(self, number: int) -> range:
        """The rows of image `number`."""
        image = self.images[number]
        return range(image.first_row, image.first_row + image.rows)

    def crops(self, number: int) -> Crops:
        """Where the crops of image `number` lie."""
        image = self.images[number]
        return Crops(image.canvas, image.offsets, self.size_px)

    def class_tokens(self, number: int) -> Float32[Tensor, "C D"]:
        """The class token of each crop of image `number`, L2-normalised. Raises InputError."""
        return self._read(CLASS_TOKENS, self._tokens_start, self.rows_of(number), (self.dim,))

    def patches(self, number: int) -> Float32[Tensor, "C N D"]:
        """V-V patches of each crop of image `number`, row by row, L2-normalised: an output. Raises InputError."""
        return self.output(number, PATCHES)

    def output(self, number: int, name: str) -> Float32[Tensor, "C _ _"]:
        """Return an encoder output for each crop of image `number`. Raises InputError, also if it was not computed."""
        if name not in self.index.outputs:
            raise InputError(self.folder / output_file(name), "the features were made without this output")
        shape = self.index.outputs[name]
        return self._read(output_file(name), self._output_starts[name], self.rows_of(number), shape)

    def _read(self, name: str, start: int, rows: range, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        path = self.folder / name
        with reading(path):
            values = np.fromfile(path, dtype="<f4", count=len(rows) * count, offset=start + 4 * rows.start * count)
        if len(values) != len(rows) * count:
            raise InputError(path, "is cut short")
        return torch.from_numpy(values).reshape(len(rows), *shape)


def batches_by_crop_count(store: FeatureStore, batch_size: int) -> list[list[int]]:
    """Numbers of images with equally many crops; at most `batch_size` crops each, but one image at least."""
    alike = defaultdict[int, list[int]](list)
    for number, image in enumerate(store.images):
        alike[image.rows].append(number)
    sizes = {rows: max(1, batch_size // rows) for rows in alike}
    return [
        numbers[start : start + sizes[rows]]
        for rows, numbers in sorted(alike.items())
        for start in range(0, len(numbers), sizes[rows])
    ]


def read_text(folder: Path) -> Float32[Tensor, "2 D"]:
    """The text features that `zsad.steps.encode.encode_category_text` wrote: normal, anomalous. Raises InputError."""
    path = folder / TEXT
    try:
        with reading(path):
            return load_file(path)["text"]
    except (SafetensorError, KeyError) as error:
        raise InputError(path, "holds no text features") from error


def data_offset(path: Path, shape: tuple[int, ...]) -> int:
    """Where the data of a .npy file begin, bytes, once its shape and size are as expected. Raises InputError."""
    try:
        with reading(path), path.open("rb") as file:
            npy.read_magic(file)
            found, fortran_order, dtype = npy.read_array_header_1_0(file)
            start = file.tell()
            end = file.seek(0, 2)
    except ValueError as error:
        raise InputError(path, "is no .npy file") from error
    if found != shape or fortran_order or dtype != np.dtype("<f4"):
        raise InputError(path, f"holds {dtype} of shape {found}; the index expects float32 of shape {shape}")
    if end != start + 4 * math.prod(shape):
        raise InputError(path, "is cut short")
    return start
