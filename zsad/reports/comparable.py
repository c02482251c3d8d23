"""What sets a run apart from the published setting, so that its figures do not compare with the published ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from zsad.config.run import (
    WITH_ADAPTATION,
    WITH_REFERENCES,
    AdaptSettings,
    EncoderSettings,
    EvaluationSettings,
    PromptSettings,
    ScoreSettings,
    Variant,
    ZsadSettings,
)
from zsad.reports.published import CATEGORIES, METHOD_MODEL, METHOD_SEEDS, METHOD_TAG, TEST_IMAGES, TITLES, Benchmark

METHOD_BLOCKS, METHOD_SIZE_PX = 12, 240
"""Of `METHOD_MODEL`: these values, given, are what None and `all` stand for."""
_EQUIVALENT: dict[str, set[Any]] = {
    "vv_blocks": {METHOD_BLOCKS, tuple(range(METHOD_BLOCKS)), "all"},
    "size_px": {METHOD_SIZE_PX, None},
}
_ENCODER_SETTINGS = ("vv_blocks", "vv_feed_forward", "vv_temperature", "class_ln_post", "size_px")
_EVALUATION_SETTINGS = ("size_px", "smoothing_sigma_px", "max_fpr")
_JOINT: frozenset[Variant] = frozenset({"joint", "joint_tta"})
_VARIANTS_USING: dict[str, frozenset[Variant]] = {
    "tau": frozenset({"text", "text_tta", "joint", "joint_tta"}),
    "lambda_1": _JOINT,
    "lambda_2": WITH_ADAPTATION,
    "lambda_3": frozenset({"text", "text_tta", "joint", "joint_tta"}),
    "lambda_4": _JOINT,
    "lambda_5": _JOINT | WITH_ADAPTATION,
    "lambda_text": frozenset({"joint"}),
    "references": WITH_REFERENCES,
}
"""Which variants' scores each value has a part in."""


def reasons_not_comparable(settings: ZsadSettings, benchmark: Benchmark, scored: Mapping[str, int]) -> list[str]:
    """Why the published figures cannot be set beside this run's; empty if nothing speaks against it.

    Weights from a local file are taken to be the published ones: nothing in a file says which they are.

    Parameters
    ----------
    settings
        The run's.
    benchmark
        Whose published figures.
    scored
        Category -> images that were scored.
    """
    return [*_encoder_differences(settings), *_settings_differences(settings), *reasons_other_images(benchmark, scored)]


def _encoder_differences(settings: ZsadSettings) -> Iterator[str]:
    encoder = settings.encoder
    if encoder.seed is not None:
        yield "the encoder has random weights"
    elif encoder.model != METHOD_MODEL:
        yield f"they were made with {METHOD_MODEL} ({METHOD_TAG}), this run with another encoder"
    elif encoder.tag not in {None, METHOD_TAG}:
        yield f"they were made with the weights {METHOD_TAG}, this run with {encoder.tag}"


def _settings_differences(settings: ZsadSettings) -> Iterator[str]:
    """Values that differ from the defaults, which are the paper's, as far as the variants depend on them."""
    variants: set[Variant] = set(settings.score.variants)
    adapted = bool(variants & WITH_ADAPTATION)
    published = EncoderSettings(model=METHOD_MODEL, tag=METHOD_TAG)
    found = [
        *_differing_values("encoder", settings.encoder, published, _ENCODER_SETTINGS),
        *_differing_values("prompts", settings.prompts, PromptSettings(), PromptSettings.model_fields),
        *_differing_values(
            "score", settings.score, ScoreSettings(), [key for key, of in _VARIANTS_USING.items() if variants & of]
        ),
        *(_differing_values("adapt", settings.adapt, AdaptSettings(), AdaptSettings.model_fields) if adapted else ()),
        *_differing_values("evaluation", settings.evaluation, EvaluationSettings(), _EVALUATION_SETTINGS),
    ]
    if found:
        yield f"its settings are others than the published: {', '.join(found)}"
    if adapted and settings.adapt.textures is None:
        yield "they were adapted with photographed textures (DTD), this run with generated ones"
    if len(settings.seeds) != METHOD_SEEDS:
        yield f"they are means over {METHOD_SEEDS} seeds, this run has {len(settings.seeds)}"


def _differing_values(group: str, ours: BaseModel, published: BaseModel, keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        one, other = getattr(ours, key), getattr(published, key)
        if isinstance(one, BaseModel):
            yield from _differing_values(f"{group}.{key}", one, other, type(one).model_fields)
        elif key == "textures" or one == other or (key in _EQUIVALENT and one in _EQUIVALENT[key]):
            continue
        else:
            yield f"{group}.{key} {_as_text(one)}" + (
                "" if other in (None, {}, ()) else f" (published {_as_text(other)})"
            )


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_as_text, value)) if isinstance(value, tuple) else str(value)


def reasons_other_images(benchmark: Benchmark, scored: Mapping[str, int]) -> Iterator[str]:
    """What sets the images apart from the benchmark's; `scored` as in `reasons_not_comparable`."""
    wanted, title = CATEGORIES[benchmark], TITLES[benchmark]
    here = [name for name in wanted if name in scored]
    if set(scored) != set(wanted):
        yield (
            f"they are means over the {len(wanted)} categories of {title}, of which {len(here)} "
            f"{'is' if len(here) == 1 else 'are'} here{' among others' if len(here) < len(scored) else ''}"
        )
    elif (count := sum(scored.values())) != TEST_IMAGES[benchmark]:
        yield f"they are of the {TEST_IMAGES[benchmark]:,} test images of {title}, this run is of {count:,}"
