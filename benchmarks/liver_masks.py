"""The checks of scans and liver masks on real CT: what is accepted, named or refused, and what the checks cost.

    python benchmarks/liver_masks.py DATA

DATA is a folder with layouts of BTCV (img/, label/) or LiTS below it. Each scan is checked with its own mask, also with
noise, metal and a fatty liver, and with wrong masks and images: flipped, moved, the whole body, no HU.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medad.base.errors import InputError
from medad.ct.checks import fill_cavities, left_out_values
from medad.ct.io import Geometry, Volume, read_labels_on, read_scan
from medad.ct.scale import check_hu
from medad.organ.checks import check_given

SHIFTS_MM = (20.0, 40.0, 60.0)
LEAST_LEFT = 0.3
"""Share of a moved mask that must stay in the scan."""
Mask = NDArray[np.bool_]


def find_cases(data: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each scan with its mask."""
    for scan in sorted(data.rglob("img*.nii.gz")):
        yield scan, scan.parents[1] / "label" / scan.name.replace("img", "label")
    for scan in sorted(data.rglob("volume-*.nii.gz")):
        yield scan, scan.with_name(scan.name.replace("volume", "segmentation"))


def moved(mask: Mask, axis: int, voxels: int) -> Mask:
    """Return the mask moved along an axis. What leaves the scan is lost."""
    result = np.roll(mask, voxels, axis)
    lost = [slice(None)] * 3
    lost[axis] = slice(0, voxels) if voxels > 0 else slice(voxels, None)
    result[tuple(lost)] = False
    return result


def with_metal(hu: NDArray[np.float32], mask: Mask) -> NDArray[np.float32]:
    """Return HU with a clip of 3000 HU in the middle of the liver and streaks of 200 HU through it."""
    x, y, z = (int(index) for index in ndimage.center_of_mass(mask))
    changed = hu.copy()
    changed[x - 3 : x + 3, y - 3 : y + 3, z - 1 : z + 2] = 3000
    changed[:, y - 1 : y + 1, z - 1 : z + 2] += 200
    return changed


def variants(hu: NDArray[np.float32], mask: Mask, spacing_mm: tuple[float, ...]) -> Iterator[tuple[str, object, Mask]]:
    """Yield kind, HU and mask. Kinds that begin with `right` must be accepted."""
    noise = np.random.default_rng(0).standard_normal(hu.shape, np.float32)
    yield "right", hu, mask
    yield "right, noise of 30 HU", hu + 30 * noise, mask
    yield "right, noise of 60 HU", hu + 60 * noise, mask
    yield "right, metal", with_metal(hu, mask), mask
    yield "right, fatty liver (median -20 HU)", hu - (20 + np.median(hu[mask])) * mask, mask
    in_plane = ndimage.generate_binary_structure(3, 1) & (np.indices((3, 3, 3))[2] == 1)
    yield "right, outlined 3 mm too large", hu, ndimage.binary_dilation(mask, in_plane, round(3 / spacing_mm[0]))
    for axis, name in enumerate(("left-right", "front-back", "up-down")):
        yield f"flipped {name}", hu, np.flip(mask, axis)
    for mm in SHIFTS_MM:
        for axis in range(3):
            for sign in (1, -1):
                wrong = moved(mask, axis, sign * round(mm / spacing_mm[axis]))
                if wrong.sum() >= LEAST_LEFT * mask.sum():
                    yield f"moved by {mm:g} mm", hu, wrong
    yield "whole body", hu, hu > -300
    yield "no HU: 0 to 255", np.rint((hu.clip(-160, 240) + 160) * 255 / 400), mask
    yield "no HU: 0 to 4095, air 0", hu.clip(-1024, 3071) + 1024, mask
    yield "no HU: like MR", np.where(hu < -300, 0, (hu.clip(-200, 300) + 300) * 0.9), mask
    yield "no HU: like PET", np.where(mask, 6, 1) + 0.3 * np.abs(noise), mask


def judge(hu: object, geometry: Geometry, mask: Mask) -> str:
    """Return `accepted`, `named` or `refused`."""
    volume = Volume(np.asarray(hu, np.float32), geometry)
    try:
        check_hu(volume, mask, Path("scan"))
        named = check_given(volume, mask, Path("mask"))
    except InputError:
        return "refused"
    return "named" if any("unusual" in line for line in named) else "accepted"


def seconds(work: Callable[[], object]) -> float:
    """Return the best time of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    print("| scan | voxels | reading, ms | checks, ms |\n|---|---|---|---|")
    for scan, path in find_cases(parser.parse_args().data):
        volume = read_scan(scan)
        labels, _ = read_labels_on(volume.geometry, path, liver_labels=(1,))
        mask = labels.values == 6 if scan.name.startswith("img") else labels.values > 0
        reading = seconds(lambda: (read_scan(scan), read_labels_on(volume.geometry, path, liver_labels=(1,))))  # noqa: B023

        def check() -> None:
            left_out_values(labels, mask, (6,))  # noqa: B023
            fill_cavities(mask, 1.0)  # noqa: B023
            check_hu(volume, mask, scan)  # noqa: B023
            check_given(volume, mask, path)  # noqa: B023

        shape = " x ".join(map(str, volume.hu.shape))
        print(f"| {scan.name} | {shape} | {1000 * reading:.0f} | {1000 * seconds(check):.0f} |")
        hu, spacing_mm = np.ascontiguousarray(volume.hu), volume.geometry.canonical_spacing_mm
        plain = replace(volume.geometry)
        for kind, changed, other in variants(hu, mask, spacing_mm):
            counts[kind][judge(changed, plain, other)] += 1
    print("\n| kind | accepted | named | refused |\n|---|---|---|---|")
    for kind, found in counts.items():
        print(f"| {kind} | {found['accepted']} | {found['named']} | {found['refused']} |")


if __name__ == "__main__":
    main()
