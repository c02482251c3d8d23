"""How well automatic thresholds work for small tumours: one scan's label and probability maps of several models.

    python benchmarks/thresholds.py LABEL RUN/probabilities/CASE.nii.gz ...

LABEL is a LiTS label (liver 1, tumour 2). For each share of the liver, that many random voxels of the tumour are used
and the others are ignored. A rule sees the liver and these voxels. Prints the mean and the worst Dice over the maps.
Random voxels of a large tumour are easier than a real small tumour, which has less contrast. The figures only compare
rules.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from skimage.filters import threshold_otsu, threshold_triangle

from medad.config.liver import PostprocessSettings
from medad.ct.io import read_labels, read_scan
from medad.evaluation.postprocess import resolve_threshold

SHARES = (0.002, 0.01, 0.03, 0.1)
Rule = Callable[[np.ndarray], float]


def clamped(rule: Rule, low: float, high: float) -> Rule:
    return lambda values: float(np.clip(rule(values), low, high))


def product_threshold(values: np.ndarray) -> float:
    return resolve_threshold(values, np.ones(values.shape, bool), PostprocessSettings(threshold="auto"))


RULES: dict[str, Rule] = {
    "Otsu, 0.25 to 0.5": clamped(threshold_otsu, 0.25, 0.5),
    "triangle, 0.25 to 0.5": clamped(threshold_triangle, 0.25, 0.5),
    "`threshold: auto`": product_threshold,
    "0.4": lambda _: 0.4,
    "0.5": lambda _: 0.5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("label", type=Path)
    parser.add_argument("maps", type=Path, nargs="+")
    arguments = parser.parse_args()
    labels = read_labels(arguments.label).values
    found: dict[tuple[str, float], list[float]] = {}
    for path in arguments.maps:
        probability = read_scan(path).hu.astype(np.float32)
        liver, tumour = probability[labels == 1], probability[labels == 2]
        rng = np.random.default_rng(0)
        for share in SHARES:
            sampled = rng.choice(tumour, min(int(share * len(liver)), len(tumour)), replace=False)
            seen = np.concatenate([liver, sampled])
            for name, rule in RULES.items():
                threshold = rule(seen)
                hits = int((sampled >= threshold).sum())
                marked = int((seen >= threshold).sum())
                found.setdefault((name, share), []).append(2 * hits / (marked + len(sampled)))
    print(f"{len(arguments.maps)} maps; mean Dice (worst) by the tumour's share of the liver")
    print("| | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    for name in RULES:
        cells = (f"{np.mean(found[name, share]):.2f} ({min(found[name, share]):.2f})" for share in SHARES)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
