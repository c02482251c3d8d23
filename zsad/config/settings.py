"""Settings of all image runs: the systems, their encoders and the data. Frozen and typed; torch is not loaded.

`adflows zsad run` uses one system, `adflows zsad compare` any number. A configuration with one system and one encoder
may name them `method` and `encoder` instead of `systems` and `encoders.main`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medad.base.errors import ConfigError
from medad.base.settings import MachineSettings, RunName, load_settings, parse_settings
from zsad.config.run import EncoderSettings, EvaluationSettings, ImagesSettings, PromptSettings, ReferenceSettings
from zsad.config.system_base import LearnedSettings
from zsad.config.systems import System
from zsad.scorers.dual.settings import DualImage

EncoderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")]
Ablation = Literal["references", "map_weights", "image_weights", "steps"]
"""Ablation of the dual-image scorer, as in the dual-image paper (Zhang et al., 2024).

`references`: 0 to 7 reference images (figure 5a). `map_weights`: lambda 1 and 2 (supplement, table 1).
`image_weights`: lambda 3, 4 and 5 (supplement, table 2). `steps`: 1 to 6 adaptation steps (figure 6).
"""

REFERENCE_COUNTS = tuple(range(8))
MAP_WEIGHTS = ((1.0, 0.5), (1.0, 1.0), (1.0, 1.5), (2.0, 2.0))
IMAGE_WEIGHTS = ((1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (1.0, 2.0, 1.0), (2.0, 1.0, 1.0))
ADAPTATION_STEPS = tuple(range(1, 7))


class ZsadSettings(MachineSettings):
    """Settings of one run with one or several systems."""

    name: RunName
    """Name of the run and of its folder."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4, 5)
    """Seeds that choose reference images and pseudo anomalies. Reports show the mean and standard deviation over the
    seeds."""
    data: ImagesSettings
    """Images that all systems score."""
    encoders: Annotated[dict[EncoderName, EncoderSettings], Field(min_length=1)]
    """Encoders by name. Systems with the same encoder share its features. `encoder: {...}` is short for the encoder
    `main`."""
    systems: Annotated[tuple[System, ...], Field(min_length=1)]
    """Systems, also called methods. With a single one, write `method: {system: NAME, ...}` instead."""
    ablations: tuple[Ablation, ...] = ()
    """Ablations of the dual-image scorer, as in the dual-image paper (Zhang et al., 2024). `references`: the number of
    reference images (figure 5a). `map_weights` and `image_weights`: the lambdas (supplement, tables 1 and 2). `steps`:
    the adaptation steps (figure 6)."""
    ablation_encoder: EncoderName = "main"
    """Name of the encoder in `encoders` that the ablations use."""
    prompts: PromptSettings = PromptSettings()
    """Names and domain words of the categories. The style is ignored: each system defines its own."""
    auxiliary: ImagesSettings | None = None
    """Labelled images with masks on which learned systems without a checkpoint are trained. None: train on the other
    categories of `data`, so that no system is tested on its training images."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Evaluation against labels and masks."""
    published: Literal["mvtec", "visa"] | None = None
    """Benchmark for which the report also shows the figures published in the papers. None: no published figures."""
    maps: tuple[Literal["png", "tiff", "npy"], ...] = ("png",)
    """Formats of the anomaly maps to write for each image. `png`: in colours over the image, at most 384 px. `tiff`,
    `npy`: float32 at the image's size. An empty list: none. `adflows zsad score` chooses its own."""

    @model_validator(mode="before")
    @classmethod
    def _expand_single(cls, values: Any) -> Any:
        """Expand `encoder` and `method` to `encoders.main` and `systems`."""
        if not isinstance(values, Mapping):
            return values
        expanded = {key: value for key, value in values.items() if key not in {"encoder", "method"}}
        if "encoder" in values:
            given, main = values["encoder"], dict(expanded.get("encoders") or {}).get("main")
            if isinstance(given, Mapping) and isinstance(main, Mapping):
                given = {**main, **given}
            expanded["encoders"] = {**(expanded.get("encoders") or {}), "main": given}
        if "method" in values:
            given, systems = values["method"], expanded.get("systems")
            if isinstance(given, Mapping) and isinstance(systems, list | tuple) and len(systems) == 1:
                given = {**systems[0], **given}
            elif systems:
                raise ValueError("method is short for a single system; set either method or systems")
            expanded["systems"] = [given]
        return expanded

    @property
    def method(self) -> System:
        """Return the only system. Raises ValueError if there are several."""
        (system,) = self.systems
        return system

    @property
    def encoder(self) -> EncoderSettings:
        """Return the encoder of the only system."""
        return self.encoders[self.method.encoder]

    @model_validator(mode="after")
    def _check_names(self) -> ZsadSettings:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} contain a seed twice")
        twice = [label for label, count in Counter(system.display_name for system in self.systems).items() if count > 1]
        if twice:
            raise ValueError(f"systems: two have the name {twice[0]!r}; give one of them a label")
        used = {system.encoder for system in self.systems} | ({self.ablation_encoder} if self.ablations else set())
        if unknown := sorted(used - self.encoders.keys()):
            raise ValueError(f"encoders has no {unknown[0]!r}; it has {', '.join(self.encoders)}")
        return self

    def select_systems(self, names: str) -> ZsadSettings:
        """Return these settings with only the named systems. Raises ConfigError.

        `names` is `all`, or names or labels of systems, separated by commas.
        """
        wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
        if wanted == ["all"]:
            return self
        known = {name.lower() for system in self.systems for name in (system.system, system.display_name)}
        if not wanted or (unknown := [name for name in wanted if name not in known]):
            one = f"{unknown[0]}: no such system" if wanted else "is empty"
            raise ConfigError(f"--methods {one}; expected all or some of {', '.join(sorted(known))}")
        systems = tuple(s for s in self.systems if s.system in wanted or s.display_name.lower() in wanted)
        return self.model_copy(update={"systems": systems})

    def select_method(self, name: str, published: Callable[[], System]) -> ZsadSettings:
        """Return these settings with only one system: the first with this name, else that of `published`.

        The encoder `main` is needed for a system that the settings do not contain.
        """
        system = next((one for one in self.systems if name in {one.system, one.display_name.lower()}), None)
        if system is None and "main" not in self.encoders:
            raise ConfigError(f"{self.name} has no method {name}, and no encoder main for it")
        return self.model_copy(update={"systems": (system or published(),), "ablations": ()})


def systems_to_train(settings: ZsadSettings) -> tuple[LearnedSettings, ...]:
    """Return the learned systems without a checkpoint, which the run trains first."""
    return tuple(s for s in settings.systems if isinstance(s, LearnedSettings) and s.checkpoint is None)


def ablation_systems(ablation: Ablation, encoder: str) -> tuple[tuple[str, DualImage], ...]:
    """Return the rows of an ablation as pairs of a label and the settings."""
    full = DualImage(encoder=encoder, adaptation=True)
    if ablation == "references":
        return tuple(
            (f"{count}", full.model_copy(update={"references": ReferenceSettings(count=count)}))
            for count in REFERENCE_COUNTS
        )
    if ablation == "map_weights":
        return tuple(
            (f"{first:g}, {second:g}", full.model_copy(update={"lambda_1": first, "lambda_2": second}))
            for first, second in MAP_WEIGHTS
        )
    if ablation == "image_weights":
        names = ("lambda_3", "lambda_4", "lambda_5")
        return tuple(
            (
                ", ".join(f"{weight:g}" for weight in weights),
                full.model_copy(update=dict(zip(names, weights, strict=True))),
            )
            for weights in IMAGE_WEIGHTS
        )
    return tuple(
        (f"{steps}", full.model_copy(update={"adapt": full.adapt.model_copy(update={"steps": steps})}))
        for steps in ADAPTATION_STEPS
    )


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> ZsadSettings:
    """Read a YAML configuration; `overrides` replaces values of the file by dotted key. Raises ConfigError."""
    return load_settings(ZsadSettings, path, overrides)


def parse(values: Mapping[str, Any], *, source: str) -> ZsadSettings:
    """Validate settings given as a mapping; `source` names them in errors. Raises ConfigError."""
    return parse_settings(ZsadSettings, values, source=source)
