"""Names of the encoder outputs that systems read besides class tokens. Only requested outputs are computed and
stored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from medad.base.errors import ConfigError
from zsad.config.vision_models import TEXT_FREE

PATCHES = "patches"
_NAME = re.compile(r"patches|plain|tokens|raw|(block|vv|window)-([1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class EncoderOutput:
    """Name of an encoder output: `patches`, `plain`, `tokens`, `raw`, `block-N`, `vv-N` or `window-N`.

    | name | shape per crop | content |
    |---|---|---|
    | patches | N x D | patches of the V-V path (dual-image paper, eq. 4) in the joint space, L2-normalised |
    | plain | N x D | patches of the original path in the joint space, L2-normalised |
    | tokens | N x W | patches of the original path after the last LayerNorm, not projected |
    | raw | N x W | the same before the last LayerNorm |
    | block-n | 1+N x W | tokens after block n (counted from 1), class token first |
    | vv-n | N x D | patches of the V-V path after block n, L2-normalised; before the first V-V block: its tokens |
    | window-k | (g-k+1)^2 x D | class tokens of all windows of k x k patches, L2-normalised (WinCLIP) |

    N is the number of patches, g the number of patches per side, D the dimension of the joint space and W the width of
    the image tower.

    An encoder without text, such as DINOv2, has `block-n`, `tokens` and `patches`. There D is W, register tokens are
    dropped, and `patches` are the patches after the block `encoder.patch_block`, L2-normalised.
    """

    kind: Literal["patches", "plain", "tokens", "raw", "block", "vv", "window"]
    number: int = 0

    @classmethod
    def parse(cls, name: str) -> EncoderOutput:
        """Return the output with this name. Raises ValueError for an unknown name."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{name!r} is not an encoder output; expected patches, plain, tokens, raw, block-N, vv-N or window-N"
            )
        return cls(found[1], int(found[2])) if found[1] else cls(name)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """Name as in files and settings."""
        return f"{self.kind}-{self.number}" if self.number else self.kind

    def check(self, depth: int, grid: int, model: str) -> None:
        """Raise ConfigError if a model with `depth` blocks and grid x grid patches lacks this output."""
        if self.kind in {"block", "vv"} and self.number > depth:
            raise ConfigError(f"block {self.number} is requested, but {model} has {depth} blocks")
        if self.kind == "window" and self.number > grid:
            raise ConfigError(
                f"windows of {self.number} patches are requested, but {model} has {grid} x {grid} patches"
            )


def parse_outputs(names: Iterable[str]) -> tuple[EncoderOutput, ...]:
    """Return the outputs of these names, sorted and without duplicates."""
    return tuple(sorted({EncoderOutput.parse(name) for name in names}))


def check_vision_output(output: EncoderOutput, depth: int, model: str) -> None:
    """Raise ConfigError if an encoder without text, with `depth` blocks, lacks an output."""
    if output.kind in {"vv", "plain", "raw", "window"}:
        raise ConfigError(
            f"{model} has no output {output.name}, because its patches are not in a joint space with text; "
            f"methods without text: {TEXT_FREE}"
        )
    if output.kind == "block" and output.number > depth:
        raise ConfigError(f"block {output.number} is requested, but {model} has {depth} blocks")
