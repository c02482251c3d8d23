"""Steps that encode the images and the prompts of one category and write the features to disk.

`zsad.clip.feature_store` describes and reads the files.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float32
from numpy.lib import format as npy
from safetensors.torch import save_file
from torch import Tensor

from medad.base.devices import pick_device
from medad.base.errors import InputError
from medad.base.storage import atomic_path
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import (
    CLASS_TOKENS,
    INDEX,
    TEXT,
    FeatureIndex,
    ImageNote,
    ImageProblem,
    ImageRows,
    output_file,
)
from zsad.clip.prompts import category_words, domain_words, ensemble
from zsad.config.encoder_outputs import PATCHES, EncoderOutput, parse_outputs
from zsad.config.run import EncoderSettings, PromptSettings
from zsad.data.images import Crops, crop_image, plan_crops, read_image
from zsad.data.pixel_notes import pixel_notes
from zsad.data.turns import turn_image

TEXT_SCHEMA = "adflows zsad text 1"
_AHEAD = 4  # images read while earlier ones are encoded; more would need more memory


def encode_category_text(
    category: str, encoder: EncoderSettings, prompts: PromptSettings, device: str, out: Path
) -> None:
    """Encode the prompt ensemble of a category into the folder `out`, which is created if it does not exist.

    Raises
    ------
    ConfigError, InputError
        The model cannot be loaded, or a prompt is too long for it.
    DiskFullError
        The disk is full. No partial file remains.
    """
    model = Encoder.load(encoder, pick_device(device))
    texts = ensemble(category, prompts)
    features = model.encode_ensemble(texts).cpu().contiguous()
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / TEXT) as path:
        save_file({"text": features}, path)
    report = {
        "schema": TEXT_SCHEMA,
        "category": category,
        "words": category_words(category, prompts),
        "domains": domain_words(category, prompts),
        "counts": {"normal": len(texts.normal), "anomalous": len(texts.anomalous)},
        "model": model.description,
        "random_weights": model.random_weights,
        "identity": model.identity,
        "prompts": {"normal": texts.normal, "anomalous": texts.anomalous},
    }
    with atomic_path(out / "text.json") as path:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def encode_images(
    paths: Sequence[Path],
    digests: Sequence[str],
    settings: EncoderSettings,
    device: str,
    out: Path,
    on_progress: Callable[[int, int], None] | None = None,
    outputs: Sequence[str] = (PATCHES,),
    largest_batch: int | None = None,
    turns: int = 1,
    class_tokens: bool = True,
) -> None:
    """Encode images into the folder `out`, in the given order.

    One thread reads images ahead. Crops are encoded in batches of `settings.batch_size` and written to disk at once,
    so memory does not grow with the number of images. An image that cannot be used is recorded as a problem, and the
    other images are encoded.

    Parameters
    ----------
    paths
        Image files.
    digests
        sha256 of each image; the index identifies images by it.
    settings
        Settings of the model.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    out
        Output folder, created if it does not exist.
    on_progress
        Function called after each image with the number of finished images and the number of all images.
    outputs
        Names of the encoder outputs (`zsad.config.encoder_outputs`) to compute. The default
        is the V-V patches, which the dual-image scorer reads.
    largest_batch
        Largest number of crops per batch, if memory is too small for `settings.batch_size`.
    turns
        Number of copies of each image, turned by equal steps of a full circle. Their crops are further rows of the
        image, after its own. 1: the image alone.
    class_tokens
        Whether class tokens are computed and stored. Without them, DINOv2 and DINO do not run the blocks after the
        last one of `outputs`.

    Raises
    ------
    ConfigError, InputError
        The model cannot be loaded, or it does not have a requested output.
    DiskFullError
        The disk is full. No partial file remains.
    """
    model = Encoder.load(settings, pick_device(device))
    wanted = parse_outputs(outputs)
    shapes = {output.name: model.output_shape(output) for output in wanted}
    out.mkdir(parents=True, exist_ok=True)
    images: list[ImageRows] = []
    problems: list[ImageProblem] = []
    notes: list[ImageNote] = []
    with ExitStack() as stack:

        def open_rows(name: str, shape: tuple[int, ...]) -> _RowFile:
            path = stack.enter_context(atomic_path(out / name))
            return _RowFile(stack.enter_context(path.open("wb")), shape)

        tokens = open_rows(CLASS_TOKENS, (model.dim,)) if class_tokens else None
        output_files = {name: open_rows(output_file(name), shape) for name, shape in shapes.items()}
        batches = _CropBatches(
            model, min(settings.batch_size, largest_batch or settings.batch_size), wanted, tokens, output_files
        )
        for number, (digest, read) in enumerate(
            zip(digests, _read_ahead(paths, settings, model.size_px, turns), strict=True)
        ):
            if isinstance(read, InputError):
                problems.append(ImageProblem(sha256=digest, rule=read.rule))
            else:
                images.append(read.index_entry(digest, batches.rows))
                notes += [ImageNote(sha256=digest, text=text) for text in read.notes]
                batches.add(read.pixels)
            if on_progress is not None:
                on_progress(number + 1, len(paths))
        batches.finish()
    index = FeatureIndex(
        size_px=model.size_px,
        grid=model.grid,
        dim=model.dim,
        model=model.description,
        random_weights=model.random_weights,
        identity=dict(model.identity),
        interpolation=settings.interpolation,
        model_notes=model.notes,
        images=tuple(images),
        problems=tuple(problems),
        notes=tuple(notes),
        outputs=shapes,
        class_tokens=class_tokens,
    )
    with atomic_path(out / INDEX) as path:
        path.write_text(index.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _ReadImage:
    """One image that was read and cropped, ready to be encoded."""

    height: int
    width: int
    crops: Crops
    pixels: Float32[Tensor, "C 3 S S"]
    notes: tuple[str, ...] = ()

    def index_entry(self, sha256: str, first_row: int) -> ImageRows:
        return ImageRows(
            sha256=sha256,
            height=self.height,
            width=self.width,
            canvas=self.crops.canvas_hw,
            offsets=self.crops.offsets,
            first_row=first_row,
            rows=len(self.pixels),
        )


def _read_one(path: Path, settings: EncoderSettings, size_px: int, turns: int) -> _ReadImage | InputError:
    try:
        image = read_image(path, min_side_px=settings.min_side_px)
        height, width = image.shape[:2]
        crops = plan_crops(
            height, width, size_px, settings.max_crops, path, fit=settings.fit, interpolation=settings.interpolation
        )
        turned = [image, *(turn_image(image, step * 360 / turns) for step in range(1, turns))]
        pixels = torch.cat([crop_image(one, crops) for one in turned])
        return _ReadImage(height, width, crops, pixels, pixel_notes(path, image))
    except InputError as error:
        return error


def _read_ahead(
    paths: Sequence[Path], settings: EncoderSettings, size_px: int, turns: int
) -> Iterator[_ReadImage | InputError]:
    """Yield images in order; a few are read ahead."""
    pending: deque[Future[_ReadImage | InputError]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="images") as reader:
        for path in paths:
            pending.append(reader.submit(_read_one, path, settings, size_px, turns))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@dataclass
class _RowFile:
    """A .npy file of rows of one shape. The number of rows is known only at the end."""

    file: BinaryIO
    shape: tuple[int, ...]
    count: int = 0

    def __post_init__(self) -> None:
        self._write_header()

    def _write_header(self) -> None:
        # a version 1.0 header has room for a larger first axis, so it can be rewritten at the end
        shape = (self.count, *self.shape)
        npy.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})

    def append(self, rows: Tensor) -> None:
        self.file.write(np.ascontiguousarray(rows.cpu().numpy(), dtype="<f4").data)
        self.count += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.flush()


@dataclass
class _CropBatches:
    """Collects the crops of successive images into batches of one size and encodes them."""

    model: Encoder
    size: int
    outputs: tuple[EncoderOutput, ...]
    tokens: _RowFile | None
    """File of the class tokens. None: they are not wanted."""
    output_files: dict[str, _RowFile]
    """File of each output."""
    rows: int = 0
    """Number of crops added so far."""
    waiting: list[Tensor] = field(default_factory=list)

    def add(self, crops: Tensor) -> None:
        self.rows += len(crops)
        self.waiting.extend(crops)
        while len(self.waiting) >= self.size:
            self._encode(self.waiting[: self.size])
            del self.waiting[: self.size]

    def finish(self) -> None:
        if self.waiting:
            self._encode(self.waiting)
        for file in (self.tokens, *self.output_files.values()):
            if file is not None:
                file.finish()

    def _encode(self, crops: Sequence[Tensor]) -> None:
        images = torch.stack(list(crops))
        if self.tokens is None:
            values_by_output = self.model.encode_outputs_alone(images, self.outputs)
        else:
            class_tokens, values_by_output = self.model.encode_outputs(images, self.outputs)
            self.tokens.append(class_tokens)
        for name, values in values_by_output.items():
            self.output_files[name].append(values)
