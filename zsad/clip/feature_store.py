"""Read features from disk. `zsad.steps.encode` writes them once, and every seed, system and variant reads them.

Text features are in `text.safetensors`, with `text` f32 [2 D] (normal, anomalous), and `text.json`. Image features have
one row per crop (R rows). `class_tokens.npy` is f32 [R D], and each requested encoder output is in `output-NAME.npy`,
f32 [R . .] (`zsad.config.encoder_outputs`). `index.json` maps images, identified by digest, to rows; it is written
last.
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
    """Base class of JSON records on disk. Records are immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageRows(StoredRecord):
    """Encoded image and its rows."""

    sha256: str
    height: int
    width: int
    canvas: tuple[int, int]
    """Height and width after resizing, px."""
    offsets: tuple[tuple[int, int], ...]
    """Top and left of each crop on the canvas, px."""
    first_row: int
    rows: int
    """Number of crops, which is the number of rows in every file."""


class ImageProblem(StoredRecord):
    """Image that a step left out, with the rule that it breaks."""

    sha256: str
    rule: str


class ImageNote(StoredRecord):
    """Image that was encoded, with a note on its pixels that a report shows. Equal notes are counted."""

    sha256: str
    text: str


class FeatureIndex(StoredRecord):
    """Description of stored features: images, shapes and model."""

    format: Literal["adflows zsad features 2"] = Field(default="adflows zsad features 2", alias="schema")
    size_px: int
    """Side of a crop."""
    grid: int
    """Number of patches per side. N is its square."""
    dim: int
    """Dimension D of the joint space."""
    model: str
    """Description of the model in words."""
    random_weights: bool
    identity: dict[str, Any]
    """Architecture, weights, precision and normalisation."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation with which images were resized."""
    model_notes: tuple[str, ...] = ()
    """Notes for the user about the model's weights."""
    images: tuple[ImageRows, ...]
    problems: tuple[ImageProblem, ...]
    notes: tuple[ImageNote, ...] = ()
    """Notes on the pixels of encoded images. An image can have several."""
    outputs: dict[str, tuple[int, int]]
    """Shape of a row of each encoder output, by name."""
    class_tokens: bool = True
    """Whether class tokens are stored."""


def output_file(name: str) -> str:
    """Return the name of the file with an encoder output."""
    return f"output-{name}.npy"


class FeatureStore:
    """Features of a set of images, read image by image.

    Each read opens the file and seeks to an offset. Files are not mapped, so memory does not grow with the set. Threads
    can share an object.

    Parameters
    ----------
    folder
        Folder that `zsad.steps.encode.encode_images` wrote.

    Raises
    ------
    InputError
        The folder contains no features, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX
        self.index = read_record(FeatureIndex, path, "an index of image features")
        self.folder = folder
        self.images = self.index.images
        self.problems = self.index.problems
        rows = sum(image.rows for image in self.images)
        self._tokens_start = 0
        if self.index.class_tokens:
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
        """Number of patches per side."""
        return self.index.grid

    @property
    def dim(self) -> int:
        """Dimension of the joint space."""
        return self.index.dim

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests (sha256) of the images, in order."""
        return tuple(image.sha256 for image in self.images)

    def rows_of(self, number: int) -> range:
        """Return the rows of image `number`."""
        image = self.images[number]
        return range(image.first_row, image.first_row + image.rows)

    def crops(self, number: int) -> Crops:
        """Return the crops of image `number`."""
        image = self.images[number]
        return Crops(image.canvas, image.offsets, self.size_px, self.index.interpolation)

    def class_tokens(self, number: int) -> Float32[Tensor, "C D"]:
        """Return the class token of each crop of image `number`, L2-normalised.

        Raises InputError, also if class tokens were not stored.
        """
        if not self.index.class_tokens:
            raise InputError(self.folder / CLASS_TOKENS, "the features were made without class tokens")
        return self._read(CLASS_TOKENS, self._tokens_start, self.rows_of(number), (self.dim,))

    def patches(self, number: int) -> Float32[Tensor, "C N D"]:
        """Return the patches of each crop of image `number`, row by row, L2-normalised. Raises InputError."""
        return self.output(number, PATCHES)

    def output(self, number: int, name: str) -> Float32[Tensor, "C _ _"]:
        """Return an encoder output for each crop of image `number`. Raises InputError, also for a missing output."""
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
    """Return batches of image numbers. The images of a batch have equally many crops.

    A batch has at most `batch_size` crops, but at least one image.
    """
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
    """Read the text features (normal, anomalous) that `zsad.steps.encode.encode_category_text` wrote. Raises
    InputError."""
    path = folder / TEXT
    try:
        with reading(path):
            return load_file(path)["text"]
    except (SafetensorError, KeyError) as error:
        raise InputError(path, "contains no text features") from error


def data_offset(path: Path, shape: tuple[int, ...]) -> int:
    """Return the offset in bytes of the data in a .npy file. Raises InputError for another shape, type or size."""
    try:
        with reading(path), path.open("rb") as file:
            npy.read_magic(file)
            found, fortran_order, dtype = npy.read_array_header_1_0(file)
            start = file.tell()
            end = file.seek(0, 2)
    except ValueError as error:
        raise InputError(path, "is not a .npy file") from error
    if found != shape or fortran_order or dtype != np.dtype("<f4"):
        raise InputError(path, f"contains {dtype} of shape {found}; the index expects float32 of shape {shape}")
    if end != start + 4 * math.prod(shape):
        raise InputError(path, "is cut short")
    return start
