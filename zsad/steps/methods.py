"""Settings of a method that is chosen by its name, fitted to an encoder."""

from __future__ import annotations

import math

from medad.base.errors import ConfigError
from zsad.config.run import EncoderSettings
from zsad.config.systems import METHODS, System


def method_settings(name: str, encoder: EncoderSettings) -> System:
    """Return the published settings of a method, with blocks that the encoder has.

    Methods that read the blocks 6, 12, 18 and 24 of ViT-L read those at the quarters of another encoder's depth.

    Raises
    ------
    ConfigError
        There is no such method, or the encoder is unknown.
    """
    from zsad.clip.encoder import depth_of

    if name not in METHODS:
        raise ConfigError(f"{name}: no such method; expected one of {', '.join(METHODS)}")
    kind = METHODS[name]
    if "blocks" not in kind.model_fields or not kind().outputs or not kind().outputs[0].startswith("block-"):
        return kind()
    depth = depth_of(encoder)
    return kind(blocks=tuple(dict.fromkeys(math.ceil(depth * share) for share in (0.25, 0.5, 0.75, 1))))
