"""Reasons why the figures of a run are not comparable with published figures."""

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
)
from zsad.config.settings import ZsadSettings
from zsad.config.system_base import SystemSettings
from zsad.reports.published import CATEGORIES, METHOD_MODEL, METHOD_SEEDS, METHOD_TAG, TEST_IMAGES, TITLES, Benchmark
from zsad.scorers.dual.settings import DualImage

METHOD_BLOCKS, METHOD_SIZE_PX = 12, 240
"""Number of blocks and input size of `METHOD_MODEL`. None and `all` mean these values."""
_EQUIVALENT: dict[str, set[Any]] = {
    "vv_blocks": {METHOD_BLOCKS, tuple(range(METHOD_BLOCKS)), "all"},
    "size_px": {METHOD_SIZE_PX, None},
    "align_corners": {False, None},
    "positions": {"auto", "bicubic_antialias"},
    "quick_gelu": {"auto", False},
}
_INPUT_SETTINGS = ("size_px", "fit", "interpolation", "positions", "quick_gelu")
"""Settings of an encoder's input and activation, in which public programs differ."""
_ENCODER_SETTINGS = ("vv_blocks", "vv_feed_forward", "vv_temperature", "class_ln_post", *_INPUT_SETTINGS)
_PRESETS: dict[str, dict[str, str]] = {
    "winclip": {"preset": "winclip"},
    "anovl": {"preset": "anovl", "fit": "squash"},
    "musc": {"preset": "musc"},
    "dual": {"preset": "anovl"},
    "april_gan": {"preset": "april_gan"},
    "anomalyclip": {"preset": "anomalyclip"},
}
"""Encoder settings with which each system's figures were published."""
_EVALUATION_SETTINGS = ("size_px", "smoothing_sigma_px", "align_corners", "max_fpr")
_OWN_SETTINGS = {"system", "encoder", "label", "checkpoint", "training"}
"""Settings of a system without a published value. `shots` counts as published, because papers have rows for several."""
_BY_SET: dict[tuple[str, Benchmark], dict[str, Any]] = {("musc", "mvtec"): {"neighbours": (1, 2, 3)}}
"""Published settings of a system on one benchmark, if they differ from the defaults of its class."""
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
"""Variants that use each setting."""


def reasons_not_comparable(settings: ZsadSettings, benchmark: Benchmark, scored: Mapping[str, int]) -> list[str]:
    """Return the reasons why this run is not comparable with the published figures. Empty if it is comparable.

    Weights from a local file are assumed to be the published weights, because a file does not identify them.

    Parameters
    ----------
    settings
        Settings of the run.
    benchmark
        Benchmark of the published figures.
    scored
        Number of scored images by category.

    Raises
    ------
    ValueError
        The run has several systems, or another one than the dual-image scorer.
    """
    if not isinstance(settings.method, DualImage):
        raise ValueError(f"{settings.method.title} is not the dual-image scorer")
    return [
        *_encoder_differences(settings),
        *_settings_differences(settings, settings.method),
        *reasons_other_images(benchmark, scored),
    ]


def _encoder_differences(settings: ZsadSettings) -> Iterator[str]:
    encoder = settings.encoder
    if encoder.seed is not None:
        yield "the encoder has random weights"
    elif encoder.model != METHOD_MODEL:
        yield f"the paper uses the encoder {METHOD_MODEL} ({METHOD_TAG}), this run uses another encoder"
    elif encoder.tag not in {None, METHOD_TAG}:
        yield f"the paper uses the weights {METHOD_TAG}, this run uses {encoder.tag}"


def _settings_differences(settings: ZsadSettings, system: DualImage) -> Iterator[str]:
    """Yield the settings that differ from the paper's, if the variants depend on them. Defaults are the paper's."""
    variants: set[Variant] = set(system.variant_names)
    adapted = bool(variants & WITH_ADAPTATION)
    published = EncoderSettings(model=METHOD_MODEL, tag=METHOD_TAG)
    found = [
        *_differing_values("encoder", settings.encoder, published, _ENCODER_SETTINGS),
        *_differing_values("prompts", settings.prompts, PromptSettings(), PromptSettings.model_fields),
        *_differing_values(
            "method", system.score, ScoreSettings(), [key for key, of in _VARIANTS_USING.items() if variants & of]
        ),
        *(
            _differing_values("method.adapt", system.adapt, AdaptSettings(), AdaptSettings.model_fields)
            if adapted
            else ()
        ),
        *_differing_values("evaluation", settings.evaluation, EvaluationSettings(), _EVALUATION_SETTINGS),
    ]
    if found:
        yield f"settings of this run differ from the paper's: {', '.join(found)}"
    if adapted and system.adapt.textures is None:
        yield "the paper uses photographed textures (DTD) for the adaptation, this run uses generated textures"
    if len(settings.seeds) != METHOD_SEEDS:
        yield f"the published figures are means over {METHOD_SEEDS} seeds, this run has {len(settings.seeds)}"


def encoder_deviations(name: str, system: str, encoder: EncoderSettings) -> list[str]:
    """Return how a system's encoder differs from that of the published figures in input and activation.

    Parameters
    ----------
    name
        Name of the system in the report.
    system
        Value of the setting `system`. A system without a preset has no deviations.
    encoder
        Settings of the encoder.
    """
    if system not in _PRESETS:
        return []
    values = {**_PRESETS[system], "model": METHOD_MODEL, "tag": METHOD_TAG}
    published = EncoderSettings.model_validate(values)
    same = {"positions": _EQUIVALENT["positions"]}
    return [f"{name}: {text}" for text in _differing_values("encoder", encoder, published, _INPUT_SETTINGS, same)]


def system_deviations(system: SystemSettings, benchmark: Benchmark) -> list[str]:
    """Return how a system's settings differ from the published ones: the defaults of its class, or those for the set.

    Settings of training are not compared, and the number of normal images is not: papers have rows for several.
    """
    kind = type(system)
    name = str(system.model_dump(include={"system"})["system"])
    published = kind.model_validate(_BY_SET.get((name, benchmark), {}))
    keys = [key for key in kind.model_fields if key not in _OWN_SETTINGS | {"shots", "adaptation", "variants"}]
    return [*_differing_values(system.display_name, system, published, keys, {})]


def shared_deviations(
    prompts: PromptSettings, evaluation: EvaluationSettings, systems: Iterable[SystemSettings]
) -> list[str]:
    """Return how a comparison's prompts and evaluation differ from the published ones, if any system uses them."""
    found = [*_differing_values("evaluation", evaluation, EvaluationSettings(), ("smoothing_sigma_px", "max_fpr"), {})]
    if evaluation.align_corners is not None:
        others = [one.display_name for one in systems if one.align_corners != evaluation.align_corners]
        if others:
            names = ", ".join(others)
            found.append(f"evaluation.align_corners {evaluation.align_corners} (published otherwise for {names})")
    if any(one.prompts is not None for one in systems):
        keys = [key for key in PromptSettings.model_fields if key != "style"]
        found += _differing_values("prompts", prompts, PromptSettings(), keys, {})
    return found


def _differing_values(
    group: str,
    ours: BaseModel,
    published: BaseModel,
    keys: Iterable[str],
    equivalent: Mapping[str, set[Any]] = _EQUIVALENT,
) -> Iterator[str]:
    for key in keys:
        one, other = getattr(ours, key), getattr(published, key)
        if isinstance(one, BaseModel):
            yield from _differing_values(f"{group}.{key}", one, other, type(one).model_fields)
        elif key == "textures" or one == other or (key in equivalent and {one, other} <= equivalent[key]):
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
    """Yield the differences between the scored images and the benchmark. See `reasons_not_comparable`."""
    wanted, title = CATEGORIES[benchmark], TITLES[benchmark]
    here = [name for name in wanted if name in scored]
    if set(scored) != set(wanted):
        yield (
            f"the published figures are means over the {len(wanted)} categories of {title}, this run has {len(here)} "
            f"of them{' and other categories' if len(here) < len(scored) else ''}"
        )
    elif (count := sum(scored.values())) != TEST_IMAGES[benchmark]:
        yield f"{title} has {TEST_IMAGES[benchmark]:,} test images, this run scored {count:,}"
