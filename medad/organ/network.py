"""The built-in network: a small 3D U-Net that finds the liver on a grid of 4 mm.

Its features lie on a grid of 8 mm. Each block of 2 x 2 x 2 voxels enters as channels and leaves as channels, so that
the mask has the resolution of the grid. The weights are half-precision safetensors, trained by
`python -m medad.organ.training`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = Path(__file__).with_name("liver.safetensors")
WIDTHS = (24, 40, 56, 56)
"""Channels of the four levels: voxels of 8, 16, 32 and 64 mm."""
BLOCK = 2
SOFT_CENTRE_HU, SOFT_SCALE_HU, SOFT_RANGE_HU = 40.0, 100.0, (-160.0, 240.0)
WIDE_SCALE_HU, WIDE_RANGE_HU = 500.0, (-1000.0, 1000.0)
BODY_HU = -300.0
"""HU above which a voxel counts as body."""


class LiverNet(nn.Module):
    """A U-Net with GroupNorm, average pooling and nearest upsampling: 18 channels in, 8 logits per voxel out."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        channels = 2 * BLOCK**3 + 2
        self.down = nn.ModuleList(_block(i, o) for i, o in zip((channels, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in itertools.pairwise(widths))
        self.out = nn.Conv3d(widths[0], BLOCK**3, 1)

    def forward(self, x: Float[Tensor, "1 18 X Y Z"]) -> Float[Tensor, "1 8 X Y Z"]:
        """Return the logits of each block's 8 voxels."""
        levels: list[Tensor] = []
        for number, block in enumerate(self.down):
            if number:  # a thin slab has one plane from some level on
                x = functional.avg_pool3d(x, [min(2, n) for n in x.shape[2:]], ceil_mode=True)
            x = block(x)
            levels.append(x)
        for number in reversed(range(len(self.up))):
            x = functional.interpolate(x, size=levels[number].shape[2:], mode="nearest")
            x = self.up[number](torch.cat([levels[number], x], 1))
        logits: Tensor = self.out(x)
        return logits


def _block(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in (channels, width):
        layers += [nn.Conv3d(number, width, 3, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*layers)


def logits_of(net: nn.Module, hu: Float32[Tensor, "X Y Z"]) -> Float32[Tensor, "X Y Z"]:
    """Return the logit of liver for each voxel of a 4 mm grid in canonical LPS order, cropped to the body."""
    size = hu.shape
    pad = [end for n in reversed(size) for end in (0, n % BLOCK)]
    even = functional.pad(hu[None, None], pad, mode="replicate")[0, 0] if any(pad) else hu
    out = net(_network_input(even))
    _, _, x, y, z = out.shape
    split = out.reshape(BLOCK, BLOCK, BLOCK, x, y, z).permute(3, 0, 4, 1, 5, 2)
    joined: Tensor = split.reshape(x * BLOCK, y * BLOCK, z * BLOCK)
    return joined[: size[0], : size[1], : size[2]]


def _network_input(hu: Float32[Tensor, "X Y Z"]) -> Float32[Tensor, "1 18 U V W"]:
    """Return two HU windows, blocks as channels, and the place across the body: left-right and front-back."""
    soft = (hu.clamp(*SOFT_RANGE_HU) - SOFT_CENTRE_HU) / SOFT_SCALE_HU
    wide = hu.clamp(*WIDE_RANGE_HU) / WIDE_SCALE_HU
    x, y, z = (n // BLOCK for n in hu.shape)
    blocks = torch.stack([soft, wide]).reshape(2, x, BLOCK, y, BLOCK, z, BLOCK).permute(0, 2, 4, 6, 1, 3, 5)
    channels = [blocks.reshape(2 * BLOCK**3, x, y, z)]
    body = (hu > BODY_HU).float()
    mass = body.sum() + 1
    for axis in (0, 1):
        weight = body.sum(tuple(other for other in range(3) if other != axis))
        index = torch.arange(len(weight), dtype=torch.float32, device=hu.device)
        mean = (weight * index).sum() / mass
        sd = (weight * (index - mean) ** 2).sum().div(mass).sqrt() + 1
        place = ((index - mean) / sd).reshape(-1, BLOCK).mean(1)
        shape = [-1 if other == axis else 1 for other in range(3)]
        channels.append(place.reshape(shape).expand(x, y, z)[None])
    return torch.cat(channels)[None]


def load_net(path: Path = WEIGHTS) -> LiverNet:
    """Load the network in single precision, in evaluation mode."""
    net = LiverNet()
    net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return net.eval()


def probability_of(net: nn.Module, hu: Float32[np.ndarray, "X Y Z"]) -> Float32[np.ndarray, "X Y Z"]:
    """Return P(liver) for each voxel of a 4 mm grid in canonical LPS order, cropped to the body."""
    with torch.inference_mode():
        result: np.ndarray = torch.sigmoid(logits_of(net, torch.from_numpy(np.ascontiguousarray(hu)))).numpy()
    return result
