"""Choice of a CLIP's activation: GELU, or the QuickGELU with which OpenAI trained.

Weights load with either one. With the wrong one, scores are worse and no error shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

from zsad.clip.weights import Weights
from zsad.config.run import EncoderSettings


def activation(
    settings: EncoderSettings, name: str, config: Mapping[str, Any], weights: Weights | None
) -> tuple[bool, tuple[str, ...]]:
    """Return whether a CLIP uses QuickGELU, and notes for the user.

    The setting `quick_gelu` decides. With `auto` it is the first of these that says it: the model's configuration, a
    file in OpenAI's format, the tag, and all tags of the model if they agree. If they do not agree, the model's own
    GELU is used and a note says so.

    Parameters
    ----------
    name
        Name of the model in open_clip.
    config
        Configuration of the model in open_clip.
    weights
        Weights, or None for random ones.
    """
    own = bool(config.get("quick_gelu", False))
    if settings.quick_gelu != "auto":
        return settings.quick_gelu, ()
    if own or weights is None or weights.openai:
        return own or weights is not None, ()
    if settings.tag is not None:
        return _of_tag(name, settings.tag), ()
    if settings.weights is None:  # a folder of open_clip says it in its configuration
        return own, ()
    return _of_all_tags(name, Path(settings.weights).name)


def _of_all_tags(name: str, file: str) -> tuple[bool, tuple[str, ...]]:
    """Return the activation of all tags of a model. If they differ: GELU, and a note about the weights `file`."""
    known = {tag: _of_tag(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    if len(set(known.values())) < 2:
        return any(known.values()), ()
    quick = ", ".join([tag for tag, value in known.items() if value][:3])
    return False, (
        f"{file} does not say with which activation it was trained; GELU was used. If the weights are those of "
        f"a tag with QuickGELU ({quick}), set encoder.tag to it, or set encoder.quick_gelu.",
    )


def _of_tag(name: str, tag: str) -> bool:
    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
