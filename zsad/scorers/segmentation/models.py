"""Three models, read from the local disk: CLIPSeg, SAM, and a dichotomous segmentation.

They are those of Baugh et al., Zero-Shot Anomaly Detection with Pre-trained Segmentation Models, 2023.
CLIPSeg and SAM are models of transformers (the extra `segmentation`), read from folders of `save_pretrained`.
The dichotomous model is any network saved as a TorchScript file. Nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from medad.base.errors import ConfigError, InputError
from medad.base.storage import reading
from zsad.data.images import resize_map

SALIENT_THRESHOLD = 0.5
"""Probability from which a pixel is salient. The paper gives no value; 0.5 is the midpoint of a sigmoid."""
_MASK_PIXELS_AT_A_TIME = 1 << 26
"""Largest number of mask pixels that SAM computes at a time, before filtering: 256 MiB."""
_MASKS_A_POINT = 3
_SAM_INPUT_PX = 1024
_ROUNDING = 1e-3


class ClipSeg:
    """CLIPSeg: maps of probability from an image and text prompts (Lueddecke and Ecker, CVPR 2022).

    Create it with `ClipSeg.load`.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self._model, self._processor, self._device = model, processor, device

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> ClipSeg:
        """Read a folder of `CLIPSegForImageSegmentation` and `CLIPSegProcessor`. Raise ConfigError, InputError."""
        model, processor = _load_folder(folder, "CLIPSegForImageSegmentation", "CLIPSegProcessor", device)
        return cls(model, processor, device)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float32[Tensor, "P D"]:
        """Return the embeddings that condition the decoder, one row per prompt."""
        tokens = self._processor.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self._device)
        embedded: Tensor = self._model.get_conditional_embeddings(
            batch_size=len(prompts), input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return embedded

    @torch.no_grad()
    def segment(self, tile: UInt8[ndarray, "S S 3"], prompts: Float32[Tensor, "P D"]) -> Float32[Tensor, "P h w"]:
        """Return the probability (0..1) of each prompt at each pixel of the model's output.

        The tile is resized to the model's input size. The image tower runs once for all prompts.
        """
        pixels = self._processor.image_processor(images=Image.fromarray(tile), return_tensors="pt")["pixel_values"]
        vision = self._model.clip.vision_model(pixel_values=pixels.to(self._device), output_hidden_states=True)
        # the first hidden state is the input of the first layer
        tokens = [vision.hidden_states[layer + 1].expand(len(prompts), -1, -1) for layer in self._model.extract_layers]
        logits: Tensor = self._model.decoder(tokens, prompts).logits
        return torch.sigmoid(logits)


class Sam:
    """SAM: segments of any kind from an image (Kirillov et al., 2023), prompted with a grid of points.

    Create it with `Sam.load`.

    Parameters
    ----------
    points_per_side
        Number of points per side of the grid.
    min_iou
        Masks with a lower predicted IoU are dropped.
    min_stability
        Masks with a lower stability against changes of their threshold are dropped.
    max_box_iou
        If the boxes of two masks have a larger IoU, the mask with the lower predicted IoU is dropped.
    """

    def __init__(
        self,
        generator: Any,
        *,
        points_per_side: int = 32,
        min_iou: float = 0.88,
        min_stability: float = 0.95,
        max_box_iou: float = 0.7,
    ) -> None:
        self._generator = generator
        self._grid = {
            "points_per_crop": points_per_side,
            "pred_iou_thresh": min_iou,
            "stability_score_thresh": min_stability,
            "crops_nms_thresh": max_box_iou,
        }

    @classmethod
    def load(cls, folder: Path, device: torch.device, **grid: Any) -> Sam:
        """Read a folder of `SamModel` and `SamImageProcessor`. Raise ConfigError, InputError."""
        model, processor = _load_folder(folder, "SamModel", "SamImageProcessor", device)
        with _silence_transformers():
            generator = _transformers().MaskGenerationPipeline(model=model, image_processor=processor, device=device)
        return cls(generator, **grid)

    def segments(self, image: UInt8[ndarray, "H W 3"]) -> list[Bool[ndarray, "H W"]]:
        """Return the remaining masks, highest predicted IoU first. The list is empty if the model finds nothing."""
        pixels = max(image.shape[0] * image.shape[1], _SAM_INPUT_PX**2)
        points = max(1, _MASK_PIXELS_AT_A_TIME // (_MASKS_A_POINT * pixels))
        found = self._generator(Image.fromarray(image), points_per_batch=points, **self._grid)
        return [np.asarray(mask) for mask in found["masks"]]


class Salient:
    """A dichotomous segmentation: the salient part of an image (Qin et al., ECCV 2022). Create it with `Salient.load`.

    The file's `forward` takes f32 [1 3 S S] with values 0..1 and returns one channel, [1 1 h w]. It may also return a
    tuple or list, nested or not, that begins with this channel. Networks with side outputs return such a tuple.
    If the network needs another normalisation, the file must do it.

    Parameters
    ----------
    size_px
        Size S to which images are resized.
    output
        `probability` if the network's last layer is a sigmoid, otherwise `logits`. It is not guessed from the values,
        because the guess could change from image to image.
    threshold
        Pixels with this probability or more are salient.
    """

    def __init__(
        self,
        network: Any,
        path: Path,
        device: torch.device,
        *,
        size_px: int = 1024,
        output: Literal["probability", "logits"] = "probability",
        threshold: float = SALIENT_THRESHOLD,
    ) -> None:
        self._network, self._path, self._device = network, path, device
        self._size_px, self._output, self._threshold = size_px, output, threshold

    @classmethod
    def load(cls, path: Path, device: torch.device, **output: Any) -> Salient:
        """Read a TorchScript file. Raise InputError."""
        with reading(path):
            path.open("rb").close()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated", category=FutureWarning)
                network = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
        except Exception as error:  # torch documents no error type here
            raise InputError(path, f"is not a TorchScript file ({_first_line(error)})") from error
        return cls(network, path, device, **output)

    @torch.no_grad()
    def mask(self, image: UInt8[ndarray, "H W 3"]) -> Bool[ndarray, "H W"]:
        """Return the mask of what is salient. Raise InputError if the network fails or does not return one channel."""
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self._device, torch.float32) / 255
        size = (self._size_px, self._size_px)
        resized = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        try:
            output = self._network(resized.clamp(0, 1))
        except Exception as error:  # the file's code can raise anything
            raise InputError(self._path, f"fails on an image of {size[0]} px ({_first_line(error)})") from error
        while isinstance(output, tuple | list) and output:
            output = output[0]
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[:2] != (1, 1):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(self._path, f"returns {shape} for one image, expected one channel: (1, 1, height, width)")
        values: Float[Tensor, "h w"] = output[0, 0].float().cpu()
        if self._output == "logits":
            values = torch.sigmoid(values)
        if not ((values >= -_ROUNDING) & (values <= 1 + _ROUNDING)).all():
            raise InputError(self._path, "returns values outside 0..1; if they are logits, set salient_output: logits")
        return resize_map(values.numpy(), image.shape[:2]) >= self._threshold


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "the system segmentation needs transformers, which is not installed: pip install 'adflows[segmentation]'"
        ) from error
    return transformers


def _load_folder(folder: Path, model_class: str, processor_class: str, device: torch.device) -> tuple[Any, Any]:
    """Read a model and its processor from one folder. The model is in evaluation mode, without gradients."""
    library = _transformers()
    with reading(folder):
        folder.stat()
    if not folder.is_dir():
        raise InputError(folder, f"is not a folder; expected a folder with the files of a {model_class}")
    try:
        with _silence_transformers():
            processor = getattr(library, processor_class).from_pretrained(folder, local_files_only=True)
            model, report = getattr(library, model_class).from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # the library's loaders raise many types
        raise InputError(folder, f"contains no {model_class} that can be loaded ({_first_line(error)})") from error
    # the library fills missing weights with random numbers and continues
    if missing := sorted(report["missing_keys"]):
        raise InputError(folder, f"lacks {len(missing)} weights of a {model_class}, such as {missing[0]}")
    return model.float().eval().requires_grad_(False).to(device), processor


@contextmanager
def _silence_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and log messages. Afterwards, restore its settings."""
    logs = _transformers().utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
