"""Settings of a method that is chosen by its name, fitted to an encoder."""

from __future__ import annotations

import math
from typing import Any

from medad.base.devices import cpu_multiplies_bf16
from zsad.config.run import EncoderSettings
from zsad.config.systems import System, method_class

_MUTUAL: dict[str, Any] = {"degrees": (1,), "top_share": 0.01, "subtract_median": True, "align_corners": False}
WITHOUT_TEXT: dict[str, dict[str, Any]] = {
    "dual": {"variants": ("visual",)},
    "musc": _MUTUAL | {"neighbours": (), "partners": 64},
    "musc_2": _MUTUAL,
    "anomalydino": {"turns": 8, "top_share": 0.005, "subtract_median": True},
}
"""Settings of methods for encoders without text, such as DINOv2, chosen by the measurement in docs/benchmarks.md."""
MAX_SHOTS = 64
"""Largest number of normal images that are used, unless settings say another."""
_BLOCKS: dict[str, tuple[float, ...]] = {
    "musc": (1 / 2, 2 / 3),
    "musc_2": (1 / 2, 2 / 3),
    "anomalydino": (1 / 2, 2 / 3, 3 / 4),
}
"""Blocks for encoders without text, as shares of the depth: 6, 8 and 9 of 12."""
INPUT_WITHOUT_TEXT: dict[str, Any] = {"interpolation": "bicubic", "fit": "squash"}
"""Encoder settings of the input for encoders without text, as measured. Square crops of images that are not square find
slightly more against normal images, at four times the comparisons."""
WORK_REFERENCES = 8
"""Number of reference images of the dual-image scorer when it is not chosen by name. The paper compares with 1."""


def default_method(encoder: EncoderSettings, *, few_shot: bool) -> str:
    """Return the name of the method that suits an encoder, with (`few_shot`) or without normal images."""
    if encoder.has_text:
        return "dual"
    return "anomalydino" if few_shot else "musc"


def default_settings(encoder: EncoderSettings, *, few_shot: bool) -> System:
    """Return the settings for work of the method that suits an encoder. Raises ConfigError."""
    settings = method_settings(default_method(encoder, few_shot=few_shot), encoder)
    if settings.system != "dual":
        return settings
    more = settings.references.model_copy(update={"count": WORK_REFERENCES})
    return settings.model_copy(update={"references": more})


def method_settings(name: str, encoder: EncoderSettings) -> System:
    """Return the settings of a method for an encoder: the published ones for a CLIP, measured ones for others.

    With a CLIP, methods that read the blocks 6, 12, 18 and 24 of ViT-L read those at the quarters of the encoder's
    depth.

    Raises
    ------
    ConfigError
        The method or the encoder is unknown.
    """
    from zsad.clip.encoder import depth_of

    kind = method_class(name)
    values = {} if encoder.has_text else dict(WITHOUT_TEXT.get(name, {}))
    if not encoder.has_text and "cosines" in kind.model_fields and cpu_multiplies_bf16():
        values["cosines"] = "bf16"
    shares: tuple[float, ...] = ()
    if not encoder.has_text and name in _BLOCKS:
        shares = _BLOCKS[name]
    elif kind().outputs[:1] and kind().outputs[0].startswith("block-"):
        shares = (0.25, 0.5, 0.75, 1)
    if shares:
        values["blocks"] = tuple(dict.fromkeys(math.ceil(depth_of(encoder) * share) for share in shares))
    return kind(**values)
