"""New weights for existing scores: changing the lambdas of eq. 6, 12 and 13 needs no new scoring."""

from __future__ import annotations

import shutil
from pathlib import Path

from medad.base.storage import atomic_path
from zsad.config.run import ScoreSettings
from zsad.scorers.dual.scorer import fuse_image
from zsad.scorers.dual.scores_file import INDEX_FILE, SCORES_FILE, Scores

LAMBDAS = tuple(name for name in ScoreSettings.model_fields if name.startswith("lambda_"))
"""Settings that only weight the parts of a score. All other settings change the parts themselves."""


def with_default_weights(settings: ScoreSettings) -> ScoreSettings:
    """Return the settings with the paper's weights and the default batch size, which has no effect on scores."""
    return ScoreSettings(**settings.model_dump(exclude={*LAMBDAS, "batch_size"}))


def fuse_category(scores: Path, settings: ScoreSettings, out: Path) -> None:
    """Copy the scores of a folder into `out`, fused with the weights of `settings`.

    The result is equal to that of `score_category` with these settings.

    Parameters
    ----------
    scores
        Folder of `score_category`. Its settings may differ only in the lambdas.
    settings
        Settings with the new weights.
    out
        Output folder, created if it does not exist.

    Raises
    ------
    InputError
        The scores are missing or damaged.
    ValueError
        The settings of the scores differ in more than the lambdas.
    DiskFullError
        The disk is full.
    """
    source = Scores(scores)
    if with_default_weights(source.index.settings) != with_default_weights(settings):
        raise ValueError("the settings of the scores differ in more than the lambdas")
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
    stored_settings = ScoreSettings(**settings.model_dump(exclude={"batch_size"}))
    index = source.index.model_copy(update={"settings": stored_settings, "images": images})
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / SCORES_FILE) as path:
        shutil.copyfile(scores / SCORES_FILE, path)
    with atomic_path(out / INDEX_FILE) as path:
        path.write_text(index.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
