"""Step that scores one category by one system with one seed: it reads features and writes scores."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medad.base.devices import pick_device
from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore, read_text
from zsad.config.run import EncoderSettings
from zsad.config.systems import System
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.interface import CategoryFeatures, Scored
from zsad.scorers.references import draw_references
from zsad.scorers.scores_file import write_system_scores
from zsad.scorers.stored_scores import open_scores
from zsad.steps.cost import writes_cost


@writes_cost
def score_system(
    system: System,
    category: str,
    features: Path,
    text: Path | None,
    shots: Path | None,
    checkpoint: Path | None,
    paths: Sequence[Path],
    encoder: EncoderSettings,
    seed: int,
    device: str,
    out: Path,
    *,
    largest_batch: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Score a category's images by one system. Write the scores into `out`, for `zsad.steps.evaluate`.

    Parameters
    ----------
    system
        Settings of the system.
    features
        Folder of `encode_images`, with the system's outputs.
    text
        Folder of `encode_category_text`, in the system's prompt style. None: the system reads no text.
    shots
        Folder of `encode_images` for normal images. None: the system uses none.
    checkpoint
        File with the weights of a trained system.
    paths
        Image files in the order of the features' index, without images that have no features.
    encoder
        Settings of the model that made the features.
    seed
        Seed of the reference images and of all random choices of the system.
    largest_batch
        Largest number of images per batch. None: the encoder's batch size.

    Raises
    ------
    ConfigError, InputError
        A file that the system needs is missing or damaged, or the category has too few images to compare.
    DiskFullError
        The disk is full.
    """
    module, _, name = system.scorer.partition(":")
    scorer: Any = getattr(importlib.import_module(module), name)
    if isinstance(system, DualImage):  # it stores its parts, so that other lambdas need no new scoring
        scorer(
            features,
            text,
            paths,
            encoder,
            system.score,
            system.adapt,
            seed,
            device,
            out,
            on_progress=on_progress,
            largest_batch=largest_batch,
            shots=shots,
        )
        return
    store = FeatureStore(features)
    drawn = np.empty((len(store), 0), dtype=np.int64)
    if system.reference_count:
        drawn = draw_references(store.digests, seed, system.reference_count)
        if drawn.shape[1] == 0:
            raise InputError(paths[0], f"{system.title} needs at least two different images: it compares them")
    batch_size = min(encoder.batch_size, largest_batch or encoder.batch_size)
    category_features = CategoryFeatures(
        store=store,
        text=None if text is None else read_text(text),
        references=drawn,
        shots=None if shots is None else FeatureStore(shots),
        paths=tuple(paths),
        category=category,
        encoder=encoder.model_copy(update={"batch_size": batch_size}),
        checkpoint=checkpoint,
        seed=seed,
        device=pick_device(device),
        batch_size=largest_batch or encoder.batch_size,
        report=lambda done: on_progress(done, len(store)) if on_progress is not None else None,
    )
    scored = _with_progress(scorer(category_features, system), len(store), on_progress)
    references = [[store.digests[other] for other in row] for row in drawn]
    write_system_scores(out, store, scored, system=system.public(), seed=seed, references=references)


def unscored_images(scores: Path) -> dict[str, str]:
    """Return the images that `score_system` could not score, with the reason, by sha256. Raises InputError."""
    return {problem.sha256: problem.rule for problem in open_scores(scores).problems}


def _with_progress(
    scored: Iterator[Scored], total: int, on_progress: Callable[[int, int], None] | None
) -> Iterator[Scored]:
    for done, one in enumerate(scored, start=1):
        yield one
        if on_progress is not None:
            on_progress(done, total)
