"""Training samples: the training scans, deformed, with new HU of their tissues and with lesions.

Few scans may train weights that are distributed. A random affine map and smooth displacements give them other shapes.
Random HU for each tissue imitate phases of contrast, as in SynthSeg (Billot et al., Medical Image Analysis 2023).
Lesions of any contrast within the liver still count as liver.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float32
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional

from medad.organ.training.tissues import (
    BLOOD,
    BOWEL,
    GALLBLADDER,
    GLAND,
    KIDNEY,
    LIVER,
    MUSCLE,
    SOURCE_MM,
    SPLEEN,
    Source,
)

VOXEL_MM = 4.0
PLANE = (80, 72)
DEPTHS, DEPTH_SHARES = (8, 12, 16, 24, 32, 40, 48), (0.05, 0.1, 0.1, 0.2, 0.25, 0.2, 0.1)
"""Planes of a sample, and how often each number is drawn. Scans of a part of the abdomen are frequent on purpose."""
SLAB_DEPTHS = (8, 12, 14)
AIR_HU = -1024.0

Volume = Float32[Tensor, "X Y Z"]


def draw_source(sources: Sequence[Source], rng: Generator) -> Source:
    """Draw a training scan by the shares of the scans."""
    shares = np.array([source.share for source in sources])
    return sources[int(rng.choice(len(sources), p=shares / shares.sum()))]


def make_sample(source: Source, rng: Generator) -> tuple[Volume, Volume]:
    """Return HU on a grid of 4 mm and the liver's share of each voxel, 0..1, both in canonical LPS order."""
    places = _places(source, rng)
    hu = _sampled(source.hu - AIR_HU, places) + AIR_HU
    liver = _sampled((source.tissues == LIVER).float(), places)
    tissues = _sampled(source.tissues.float(), places, mode="nearest").round()
    hu = _recoloured(hu, tissues, liver, rng, named=bool((source.tissues > LIVER).any()))
    hu = _with_lesions(hu, liver, rng)
    if rng.random() < 0.25:
        hu = _with_foreign_mass(hu, liver, rng)
    if rng.random() < 0.25:  # thick slices
        thick = functional.pad(hu[None, None], (1, 1, 0, 0, 0, 0), mode="replicate")
        hu = functional.avg_pool3d(thick, (1, 1, 3), stride=1)[0, 0]
    hu = hu + _noise(rng, hu.shape) * rng.uniform(0, 14)
    if rng.random() < 0.15:  # a field of view that cuts the body
        cut = int(rng.integers(1, 8))
        hu[:cut], hu[-cut:], liver[:cut], liver[-cut:] = AIR_HU, AIR_HU, 0, 0
    if rng.random() < 0.2:  # no table
        hu[hu < -900] = AIR_HU
    return hu.clamp(AIR_HU, 1500), liver.clamp(0, 1)


def _noise(rng: Generator, shape: Sequence[int]) -> Volume:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def _smooth(rng: Generator, shape: Sequence[int], scale_mm: float) -> Volume:
    """Return a random field of sd about 1 that changes over `scale_mm`."""
    knots = [max(2, int(np.ceil(n * VOXEL_MM / scale_mm)) + 2) for n in shape]
    coarse = _noise(rng, knots)[None, None]
    return functional.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]


def _extent(mask: Bool[Tensor, "X Y Z"], axis: int) -> tuple[float, float]:
    filled = torch.nonzero(mask.sum(tuple(other for other in range(3) if other != axis)) > 0)[:, 0]
    return float(filled[0]), float(filled[-1])


def _places(source: Source, rng: Generator) -> Float32[Tensor, "X Y Z 3"]:
    """Return for each voxel of a sample its place in the source, in mm from the centre of the source's first voxel."""
    liver, depth = source.tissues == LIVER, source.hu.shape[2]
    shape = (*PLANE, int(rng.choice(SLAB_DEPTHS) if source.slab else rng.choice(DEPTHS, p=DEPTH_SHARES)))
    scale = np.clip(np.exp(rng.normal(0, 0.1)) * np.exp(rng.normal(0, 0.06, 3)), 0.7, 1.4)
    around_x, around_y, around_z = rng.normal(0, np.deg2rad(5), 3)
    turn = np.array([[1, -around_z, around_y], [around_z, 1, -around_x], [-around_y, around_x, 1]])
    turn = (turn + rng.normal(0, 0.03, (3, 3))) / scale
    axes = [torch.arange(n, dtype=torch.float32) * VOXEL_MM - (n - 1) * VOXEL_MM / 2 for n in shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    places += torch.tensor([rng.normal(0, 15), rng.normal(0, 12), 0.0], dtype=torch.float32)
    places = places @ torch.from_numpy(turn.astype(np.float32))
    amplitude_mm, scale_mm = rng.uniform(0, 9), rng.uniform(45, 110)
    reach = (1.0, 1.0, 0.2 if source.slab else 1.0)
    places += torch.stack([_smooth(rng, shape, scale_mm) * float(amplitude_mm * each) for each in reach], -1)
    centre = [float(np.mean(_extent(source.hu > -300, axis))) for axis in (0, 1)]
    middle = rng.uniform(*_extent(liver, 2)) if rng.random() < 0.88 else rng.uniform(0, depth)
    centre.append((depth - 1) / 2 if source.slab else middle)
    places += torch.tensor(centre, dtype=torch.float32) * SOURCE_MM
    top_mm = (depth - 1) * SOURCE_MM
    if source.slab:
        places[..., 2].clamp_(0, top_mm)
        return places
    if rng.random() < 0.7:  # a part of the liver swells or shrinks
        inside = torch.nonzero(liver)
        offset = places - inside[int(rng.integers(len(inside)))].float() * SOURCE_MM
        reach_mm = rng.uniform(50, 110) / 1.5
        near = torch.exp(-(offset**2).sum(-1, keepdim=True) / (2 * reach_mm**2))
        places += offset * near * float(rng.uniform(-0.45, 0.35))
    low, high = float(places[..., 2].min()), float(places[..., 2].max())
    if low < 0 and high < top_mm:
        places[..., 2] -= low
    elif high > top_mm and low > 0:
        places[..., 2] -= high - top_mm
    places[..., 2].clamp_(0, top_mm)
    return places


def _sampled(values: Float32[Tensor, "U V W"], places: Float32[Tensor, "X Y Z 3"], mode: str = "bilinear") -> Volume:
    """Return values at places in mm. Outside the source they are 0."""
    size = torch.tensor(values.shape, dtype=torch.float32)
    grid = ((places / SOURCE_MM + 0.5) / size * 2 - 1).flip(-1)[None]
    result: Tensor = functional.grid_sample(values[None, None], grid, mode=mode, align_corners=False)[0, 0]
    return result


def _recoloured(hu: Volume, tissues: Volume, liver: Volume, rng: Generator, *, named: bool) -> Volume:
    """Return HU of another patient and another phase of contrast. `named`: tissues besides the liver are known."""
    hu = hu.clone()
    soft = ((hu > -20) & (hu < 250)).float()
    if rng.random() > 0.85:
        hu += rng.uniform(-15, 15)
    elif named:
        _recolour_tissues(hu, tissues, rng)
    else:
        dense = hu > -20
        hu[dense] = hu[dense] * rng.uniform(0.8, 1.25) + rng.uniform(-15, 25)
        if bool((tissues == LIVER).any()):
            _set_hu(hu, tissues == LIVER, float(hu[tissues == LIVER].median()) + rng.uniform(-15, 40), 1.0)
    if rng.random() < 0.6:  # vessels, where two smooth fields are both near zero
        distance = _smooth(rng, hu.shape, 35.0) ** 2 + _smooth(rng, hu.shape, 35.0) ** 2
        hu += torch.exp(-distance / rng.uniform(0.02, 0.08)) * liver * float(rng.uniform(-25, 70))
    return hu + _smooth(rng, hu.shape, 60.0) * rng.uniform(0, 5) * soft


def _recolour_tissues(hu: Volume, tissues: Volume, rng: Generator) -> None:
    liver_hu, keep = float(np.clip(rng.normal(95, 32), 25, 190)), rng.uniform(0.6, 1.2)
    spleen_hu = liver_hu + rng.uniform(-25, 70) if rng.random() < 0.8 else rng.uniform(40, 170)
    blood_hu = liver_hu + rng.normal(40, 50) if rng.random() < 0.7 else rng.uniform(150, 380)
    bowel_hu = rng.uniform(10, 110) if rng.random() < 0.7 else rng.uniform(110, 450)
    bright = float(hu[tissues == BLOOD].median()) > 250 if bool((tissues == BLOOD).any()) else False
    for tissue, mean_hu, kept in (
        (LIVER, liver_hu, keep),
        (SPLEEN, spleen_hu, keep),
        (KIDNEY, rng.uniform(25, 230), rng.uniform(0.6, 2)),
        (BLOOD, float(np.clip(blood_hu, 25, 420)), rng.uniform(0.05, 0.5) if bright else keep),
        (GALLBLADDER, rng.uniform(-5, 30), 1.0),
        (GLAND, liver_hu + rng.uniform(-50, 20), keep),
        (BOWEL, bowel_hu, rng.uniform(0.3, 1)),
        (MUSCLE, rng.uniform(35, 75), keep),
    ):
        _set_hu(hu, tissues == tissue, mean_hu, kept)
    other = (tissues == 0) & (hu > 10) & (hu < 130)
    hu[other] += rng.uniform(-5, 25)
    if bright:  # vessels without a label, and bone
        other = (tissues == 0) & (hu > 130)
        hu[other] = 130 + (hu[other] - 130) * rng.uniform(0.3, 1)


def _set_hu(hu: Volume, where: Bool[Tensor, "X Y Z"], mean_hu: float, keep: float) -> None:
    """Move the median of a tissue to `mean_hu` and keep a share of its differences. Fat and gas stay."""
    values = hu[where]
    dense = values > -60
    if bool(dense.any()):
        hu[where] = torch.where(dense, (values - values[dense].median()) * keep + mean_hu, values)


def _ball(rng: Generator, centre: Tensor, radius: float, shape: Sequence[int], stretch: float) -> Volume:
    """Return the distance from the centre of a random ellipsoid, in radii. `radius` is in voxels."""
    squares = []
    for n, middle, factor in zip(shape, centre.tolist(), np.exp(rng.normal(0, stretch, 3)), strict=True):
        squares.append(((torch.arange(n, dtype=torch.float32) - middle) / float(factor)) ** 2)
    x, y, z = squares
    distance: Tensor = (x[:, None, None] + y[None, :, None] + z[None, None, :]).sqrt() / radius
    return distance


def _with_lesions(hu: Volume, liver: Volume, rng: Generator) -> Volume:
    """Return HU with up to four lesions in the liver, in six of ten samples. Some have a core of another contrast."""
    inside = torch.nonzero(liver > 0.5)
    if rng.random() > 0.6 or len(inside) == 0:
        return hu
    for _ in range(int(rng.integers(1, 5))):
        radius = float(np.exp(rng.uniform(np.log(6), np.log(50)))) / VOXEL_MM
        distance = _ball(rng, inside[int(rng.integers(len(inside)))], radius, hu.shape, 0.2)
        distance = distance + _smooth(rng, hu.shape, max(radius * VOXEL_MM, 20.0)) * 0.15
        contrast = rng.uniform(-95, 10) if rng.random() < 0.8 else rng.uniform(10, 80)
        if rng.random() < 0.35:
            hu = hu + torch.sigmoid((0.7 - distance) * radius * 1.5) * liver * float(rng.uniform(-60, 40))
        texture = _smooth(rng, hu.shape, 15.0) * float(rng.uniform(0, 15))
        hu = hu + torch.sigmoid((1 - distance) * radius * 1.5) * liver * (texture + float(contrast))
    return hu


def _with_foreign_mass(hu: Volume, liver: Volume, rng: Generator) -> Volume:
    """Return HU with a homogeneous ball outside the liver, such as a cyst or a filled stomach."""
    outside = torch.nonzero((liver < 0.01) & (hu > -150) & (hu < 200))
    if len(outside) == 0:
        return hu
    radius = float(np.exp(rng.uniform(np.log(10), np.log(45)))) / VOXEL_MM
    distance = _ball(rng, outside[int(rng.integers(len(outside)))], radius, hu.shape, 0.0)
    weight = torch.sigmoid((1 - distance) * radius * 1.5) * (1 - liver).clamp(0, 1) * (hu > -300)
    value = rng.uniform(-5, 60) if rng.random() < 0.7 else rng.uniform(60, 150)
    return hu * (1 - weight) + weight * float(value)
