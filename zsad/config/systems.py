"""Register of all systems: the union `System` of their settings classes.

A new system is a folder in `zsad/scorers` and one entry here. The folder has two modules:

- `settings.py`: a class with the published defaults. Its properties say what the flow must prepare: encoder outputs,
  prompts, reference images, normal images, training. It computes nothing and loads no torch.
- `score.py`: the function `score(category_features, settings)`.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from medad.base.errors import ConfigError
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.anomalydino.settings import AnomalyDino
from zsad.scorers.anovl.settings import AnoVl
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.clip.settings import Clip, ClipAc
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.musc.settings import MuSc, MuSc2
from zsad.scorers.segmentation.settings import SegmentationModels
from zsad.scorers.winclip.settings import WinClip

System = Annotated[
    Clip
    | ClipAc
    | WinClip
    | AnoVl
    | MuSc
    | MuSc2
    | DualImage
    | AnomalyDino
    | AprilGan
    | AnomalyClip
    | SegmentationModels,
    Field(discriminator="system"),
]
"""Settings of one system. The field `system` says which one."""
METHODS: dict[str, type[System]] = {kind.model_fields["system"].default: kind for kind in get_args(get_args(System)[0])}
"""Settings class of each method, by name."""


def method_class(name: str) -> type[System]:
    """Return the settings class of a method. Raises ConfigError for a name that no method has."""
    if name not in METHODS:
        raise ConfigError(f"{name}: no such method; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def few_shot_methods() -> str:
    """Return the names of the methods that can use normal images, for messages."""
    return ", ".join(name for name, kind in METHODS.items() if "shots" in kind.model_fields)
