"""The voxel classifier's trees: its file, and its map of a liver."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medad.base.errors import InputError
from medad.classifier.features import NAMES, voxel_features
from medad.classifier.stacking import Stacking
from medad.slices.prepared_file import PreparedCase

if TYPE_CHECKING:
    from lightgbm import Booster

CLASSIFIER = "classifier.txt"
_PART = 200_000
"""Number of voxels that the trees classify at a time."""
_LEAF_LISTS = ("leaf_value", "leaf_weight", "leaf_count")
_NODE_LISTS = (
    *("split_feature", "split_gain", "threshold", "decision_type", "left_child", "right_child"),
    *("internal_value", "internal_weight", "internal_count"),
)
_SINGLE_NUMBERS = ("num_leaves", "num_cat", "is_linear", "shrinkage")


def load_classifier(folder: Path) -> Booster:
    """Load the trees of a folder. Raises InputError for a missing or damaged file, or for trees of other features."""
    path = folder / CLASSIFIER
    try:
        booster = parse_trees(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, f"the voxel classifier cannot be read ({error})") from error
    if tuple(booster.feature_name()) != NAMES:
        raise InputError(path, "the voxel classifier was trained on other features")
    return booster


def parse_trees(text: str) -> Booster:
    """Return the trees of a LightGBM text. Raises ValueError for a damaged text."""
    # torch brings an OpenMP library, which LightGBM needs and which not every machine has
    import torch  # noqa: F401
    from lightgbm import Booster
    from lightgbm.basic import LightGBMError

    _check_trees(text)
    try:
        return Booster(model_str=text)
    except LightGBMError as error:
        raise ValueError(str(error)) from error


def _check_trees(text: str) -> None:
    """Raise ValueError if a tree is incomplete. LightGBM's own parser ends the whole process then."""
    head, mark, _ = text.partition("Tree=0\n")
    sizes = next((line for line in head.splitlines() if line.startswith("tree_sizes=")), "")
    if not (mark and sizes) or "\0" in text:
        raise ValueError("not a text of trees")
    start = len(head)
    for number, size in enumerate(map(int, sizes.removeprefix("tree_sizes=").split())):
        tree = text[start : start + size]
        start += size
        if not tree.startswith(f"Tree={number}\n") or not tree.endswith("\n\n\n"):
            raise ValueError(f"tree {number} is incomplete")
        _check_tree(number, tree)
    if not text.startswith("end of trees\n", start) or "\nend of parameters\n" not in text[start:]:
        raise ValueError("the end is missing")


def _check_tree(number: int, tree: str) -> None:
    """Raise ValueError if a list of a tree has another length than its number of leaves requires."""
    lists = {name: values.split() for name, _, values in (line.partition("=") for line in tree.splitlines())}
    leaves = int(lists["num_leaves"][0]) if lists.get("num_leaves") else 0
    lengths = dict.fromkeys(_SINGLE_NUMBERS, 1)
    if leaves > 1:
        lengths |= dict.fromkeys(_LEAF_LISTS, leaves) | dict.fromkeys(_NODE_LISTS, leaves - 1)
    for name, length in lengths.items():
        values = [float(value) for value in lists.get(name, ())]
        if len(values) != length:
            raise ValueError(f"tree {number} is incomplete")


def classify(case: PreparedCase, classifiers: list[Booster], threads: int = 0) -> list[Float32[ndarray, "N S S"]]:
    """Return each classifier's map of P(tumour), 0..1, on the slices of a prepared case. It is 0 outside the liver.

    The features are computed once for all classifiers. Thin planes are averaged in groups first (`Stacking`).
    `threads` is the number of threads, 0 for all.
    """
    stacking = Stacking.of(case)
    stack = stacking.stack(case)
    features = voxel_features(stack)
    maps = []
    for booster in classifiers:
        values = np.zeros(stack.organ.shape, np.float32)
        parts = [
            booster.predict(features[start : start + _PART], num_threads=threads)
            for start in range(0, len(features), _PART)
        ]
        values[stack.organ] = np.concatenate(parts)
        maps.append(np.where(case.slices.organ, stacking.to_slices(values), np.float32(0)))
    return maps
