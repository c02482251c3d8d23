"""What a system reads of an image beside its class token, by name; nothing else is computed or kept."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from medad.base.errors import ConfigError

PATCHES = "patches"
_NAME = re.compile(r"patches|plain|tokens|(block|vv|window)-([1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class EncoderOutput:
    """`patches`, `plain`, `tokens`, `block-N`, `vv-N` or `window-N`.

    | name | rows | what |
    |---|---|---|
    | patches | N x D | patches of the V-V path (002, eq. 4) in the joint space, L2-normalised |
    | plain | N x D | patches of the original path in the joint space, L2-normalised |
    | tokens | N x W | the same after the last LayerNorm and before the projection, in the tower's width |
    | block-n | 1+N x W | tokens that block n (from 1, as papers count) gives, class token first, in the tower's width |
    | vv-n | N x D | V-V patches as they are after block n (before the first V-V block: its tokens), L2-normalised |
    | window-k | (g-k+1)^2 x D | class tokens of all windows of k x k patches, L2-normalised (WinCLIP) |
    """

    kind: Literal["patches", "plain", "tokens", "block", "vv", "window"]
    number: int = 0

    @classmethod
    def parse(cls, name: str) -> EncoderOutput:
        """Raises ValueError for another name."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is no output: patches, plain, tokens, block-N, vv-N or window-N")
        return cls(found[1], int(found[2])) if found[1] else cls(name)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}" if self.number else self.kind

    def check(self, depth: int, grid: int, model: str) -> None:
        """Raises ConfigError where a model of `depth` blocks and grid x grid patches has no such output."""
        if self.kind in {"block", "vv"} and self.number > depth:
            raise ConfigError(f"block {self.number} is asked for, but {model} has {depth} blocks")
        if self.kind == "window" and self.number > grid:
            raise ConfigError(f"windows of {self.number} patches are asked for, but {model} sees {grid} x {grid}")


def parse_outputs(names: Iterable[str]) -> tuple[EncoderOutput, ...]:
    """Each once, in one order."""
    return tuple(sorted({EncoderOutput.parse(name) for name in names}))
