"""Other weights on scores that are there already: the lambdas of eq. 6, 12 and 13 cost no second scoring."""

from __future__ import annotations

import shutil
from pathlib import Path

from medad.base.storage import atomic_path
from zsad.config.run import ScoreSettings
from zsad.scorers.dual.scorer import fuse_image
from zsad.scorers.dual.scores_file import INDEX_FILE, SCORES_FILE, Scores

LAMBDAS = tuple(name for name in ScoreSettings.model_fields if name.startswith("lambda_"))
"""The settings that only weigh the parts: all else decides the parts themselves."""


def with_default_weights(settings: ScoreSettings) -> ScoreSettings:
    """The same settings with the paper's weights, and without the batch size, which changes nothing."""
    return ScoreSettings(**settings.model_dump(exclude={*LAMBDAS, "batch_size"}))


def fuse_category(scores: Path, settings: ScoreSettings, out: Path) -> None:
    """Write a copy of the scores in a folder into `out`, fused by the weights of `settings`.

    The result is what `score_category` gives for these settings.

    Parameters
    ----------
    scores
        Folder of `score_category`, of the same settings but for the lambdas.
    settings
        The weights wanted.
    out
        Made if it is not there.

    Raises
    ------
    InputError
        The scores are missing or damaged.
    ValueError
        They are of settings that differ in more than the lambdas.
    DiskFullError
        No room left.
    """
    source = Scores(scores)
    if with_default_weights(source.index.settings) != with_default_weights(settings):
        raise ValueError("the scores were made with settings that differ in more than the lambdas")
    images = tuple(
        image.model_copy(
            update={
                "image_score": {
                    variant: fuse_image(source.evidence(number, variant), variant, settings)
                    for variant in settings.variants
                }
            }
        )
        for number, image in enumerate(source.index.images)
    )
    own = ScoreSettings(**settings.model_dump(exclude={"batch_size"}))
    index = source.index.model_copy(update={"settings": own, "images": images})
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / SCORES_FILE) as path:
        shutil.copyfile(scores / SCORES_FILE, path)
    with atomic_path(out / INDEX_FILE) as path:
        path.write_text(index.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
