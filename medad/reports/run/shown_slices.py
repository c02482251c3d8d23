"""The slices of a case that a report shows as pictures, and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from medad.base.errors import InputError
from medad.evaluation.metrics import dice_of_counts
from medad.reports import pictures
from medad.reports.run.document import Rank, ShownSlice, read_tensor
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.steps.results import CaseResult

RANK_TITLES: dict[Rank, str] = {
    "best": "Best slice",
    "median": "Median slice",
    "worst": "Worst slice",
    "highest": "Largest predicted area",
    "lowest": "Smallest predicted area",
}
"""Caption of a shown slice, by its rank."""


@dataclass(frozen=True)
class PictureRow:
    """A shown slice with its picture."""

    shown: ShownSlice
    picture: Image.Image

    @property
    def caption(self) -> str:
        return slice_caption(self.shown)


def pick_slices(
    truth: Bool[np.ndarray, "N S S"] | None,
    prediction: Bool[np.ndarray, "N S S"],
    max_probability: Sequence[float],
) -> list[tuple[Rank, int]]:
    """Return the slices to show, each once, as (rank, index).

    With ground truth: the best, median and worst Dice among slices with a pixel in truth or prediction. Of slices with
    equal Dice, the one with the larger union is worse. Without ground truth, or if all masks are empty: the highest,
    median and lowest predicted area, then largest probability.
    """
    ranks: tuple[Rank, Rank, Rank] = ("highest", "median", "lowest")
    order = sorted(range(len(prediction)), key=lambda i: (-np.count_nonzero(prediction[i]), -max_probability[i], i))
    if truth is not None:
        union = [np.count_nonzero(a | b) for a, b in zip(truth, prediction, strict=True)]
        compared = [i for i in order if union[i]]
        if compared:
            ranks = ("best", "median", "worst")
            order = sorted(compared, key=lambda i: (-(_slice_dice(truth[i], prediction[i]) or 0.0), union[i], i))
    if not order:
        return []
    places = {0: ranks[0], len(order) - 1: ranks[2], len(order) // 2: ranks[1]}
    if len(order) <= 2:
        places = {len(order) - 1: ranks[2], 0: ranks[0]}
    return [(places[place], order[place]) for place in sorted(places)]


def picture_rows(result: CaseResult[Path], panel_px: int) -> list[PictureRow]:
    """Return the shown slices of a case. Only their images are read from disk completely."""
    assert result.segmented is not None, "a finished case is segmented"
    path = result.segmented / "slices.safetensors"
    truth = None
    if result.evaluated is not None:
        truth = read_tensor(result.evaluated / "truth.safetensors", "tumour").astype(bool)
    prediction, organ = (read_tensor(path, name).astype(bool) for name in ("mask", "organ"))
    z = read_tensor(path, "z")
    largest = read_tensor(path, "probability").max(axis=(1, 2), where=organ, initial=0.0).tolist()
    if truth is not None and truth.shape != prediction.shape:
        raise InputError(path, f"truth has shape {truth.shape}, the prediction {prediction.shape}")
    if not len(z):
        return []
    case_side = pictures.crop_around(organ.any(axis=0), min_side=1).side
    prepared = load_prepared(result.prepared / PREPARED)
    px_mm = prepared.spacing_mm[0]
    rows = []
    for rank, i in pick_slices(truth, prediction, largest):
        view = pictures.SliceView(
            pixels=read_tensor(path, "pixels", i),
            restored=read_tensor(path, "restored", i),
            organ=organ[i],
            probability=read_tensor(path, "probability", i),
            prediction=prediction[i],
            truth=None if truth is None else truth[i],
        )
        shown = ShownSlice(
            rank=rank,
            z=int(z[i]),
            dice=None if truth is None else _slice_dice(truth[i], prediction[i]),
            true_px=None if truth is None else int(np.count_nonzero(truth[i])),
            predicted_px=int(np.count_nonzero(prediction[i])),
            max_probability=largest[i],
        )
        # enlarge the tip of the liver, but not to a few huge pixels
        crop = pictures.crop_around(organ[i], min_side=case_side // 3)
        rows.append(PictureRow(shown, pictures.panel_row(view, crop, panel_px, px_mm=px_mm)))
    return rows


def slice_caption(shown: ShownSlice) -> str:
    """Return a caption, e.g. `Best slice, z = 41: Dice 0.812`.

    Without ground truth it gives the predicted area and the largest probability.
    """
    head = f"{RANK_TITLES[shown.rank]}, z = {shown.z}"
    if shown.true_px is not None:
        return f"{head}: Dice {'undefined' if shown.dice is None else format(shown.dice, '.3f')}"
    return f"{head}: {shown.predicted_px:,} px predicted, largest probability {shown.max_probability:.2f}"


def _slice_dice(truth: Bool[np.ndarray, "S S"], prediction: Bool[np.ndarray, "S S"]) -> float | None:
    both = int(np.count_nonzero(truth & prediction))
    return dice_of_counts(both, int(np.count_nonzero(prediction)) - both, int(np.count_nonzero(truth)) - both)
