"""How automatic thresholds do as tumours get smaller: one scan's label, and probability maps of it by several models.

    python benchmarks/thresholds.py LABEL RUN/probabilities/CASE.nii.gz ...

LABEL is LiTS's (liver 1, tumour 2). For each share, so many of the tumour's voxels are kept, drawn at random; the rest
counts for nothing. A rule sees the liver and what was kept. Prints the mean Dice over the maps, and the worst.
Thinned voxels of a large tumour are easier than a real small one, which is fainter: rules can be compared, no more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from skimage.filters import threshold_otsu, threshold_triangle

from medad.config.liver import PostprocessSettings
from medad.ct.io import read_labels, read_scan
from medad.evaluation.postprocess import threshold_of

SHARES = (0.002, 0.01, 0.03, 0.1)
Rule = Callable[[np.ndarray], float]


def clamped(rule: Rule, low: float, high: float) -> Rule:
    return lambda values: float(np.clip(rule(values), low, high))


def product_threshold(values: np.ndarray) -> float:
    return threshold_of(values, np.ones(values.shape, bool), PostprocessSettings(threshold="auto"))


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
            kept = rng.choice(tumour, min(int(share * len(liver)), len(tumour)), replace=False)
            seen = np.concatenate([liver, kept])
            for name, rule in RULES.items():
                threshold = rule(seen)
                hits = int((kept >= threshold).sum())
                marked = int((seen >= threshold).sum())
                found.setdefault((name, share), []).append(2 * hits / (marked + len(kept)))
    print(f"{len(arguments.maps)} maps; mean Dice (worst) by the tumour's share of the liver")
    print("| | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    for name in RULES:
        cells = (f"{np.mean(found[name, share]):.2f} ({min(found[name, share]):.2f})" for share in SHARES)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
