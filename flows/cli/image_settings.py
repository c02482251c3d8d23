"""Settings of the image commands: from a configuration, or from a method and the best encoder of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.machine.environment import find_config
from flows.machine.terminal import terminal
from flows.zsad.demo_settings import replace_demo
from medad.base.errors import ConfigError
from medad.base.settings import apply_overrides

if TYPE_CHECKING:
    from zsad.config.settings import ZsadSettings


def load_settings(config: Path, overrides: dict[str, Any]) -> ZsadSettings:
    """Read a configuration. Raise ConfigError for a bad one.

    The demo runs on every machine: without its weights, the embedded model replaces them, and a line says so.
    """
    from zsad.config.settings import load

    config, overrides = replace_demo(config, overrides, terminal.line)
    return load(find_config(config, "zsad"), overrides)


def settings_of_method(
    method: str | None, config: Path | None, overrides: dict[str, Any], *, few_shot: bool = False
) -> ZsadSettings:
    """Return the settings of a run with one method. Raise ConfigError.

    Without a configuration, the encoder is the best one of this machine, and a line says which. With one, `method`
    selects one of its systems, or is added with its published settings. None: the configuration's only system, or
    without a configuration the method that suits the encoder, with normal images if `few_shot`.
    """
    from zsad.config.systems import method_class
    from zsad.steps.methods import method_settings

    if method is not None:
        method_class(method)  # refuses an unknown name before anything is read
    if config is None:
        return _with_all_normal(_best_settings(method, overrides, few_shot=few_shot), few_shot=few_shot)
    settings = load_settings(config, overrides)
    if method is not None:
        settings = settings.select_method(method, lambda: method_settings(method, settings.encoders["main"]))
    elif len(settings.systems) != 1:
        names = ", ".join(dict.fromkeys(system.system for system in settings.systems))
        raise ConfigError(f"{config} has several methods; choose one of them: {names}")
    return _with_all_normal(settings, few_shot=few_shot)


def _with_all_normal(settings: ZsadSettings, *, few_shot: bool) -> ZsadSettings:
    """Let the method use all normal images, up to the largest number, if nothing sets their number."""
    from zsad.steps.methods import MAX_SHOTS

    system = settings.method
    if not few_shot or not system.accepts_shots or (system.shot_count and "shots" in system.model_fields_set):
        return settings
    return settings.model_copy(update={"systems": (system.model_copy(update={"shots": MAX_SHOTS}),)})


def _best_settings(method: str | None, overrides: dict[str, Any], *, few_shot: bool) -> ZsadSettings:
    """Return settings with the best encoder of this machine, unless the overrides name another one."""
    from zsad.clip.register import best_encoder
    from zsad.config.settings import parse
    from zsad.steps.methods import INPUT_WITHOUT_TEXT, default_method, default_settings, method_settings

    best = best_encoder()
    encoder: dict[str, Any] = {}
    if "encoder.model" not in overrides:
        more = {} if best.settings.has_text else INPUT_WITHOUT_TEXT
        encoder = best.settings.model_dump(exclude_unset=True) | more
    of_encoder = {key: value for key, value in overrides.items() if key.startswith("encoder.")}
    values = apply_overrides({"encoder": encoder}, of_encoder, source="--set")
    values |= {"name": "photos", "data": {"root": "-"}, "method": {"system": method or "dual"}}
    chosen = parse(values, source="--set").encoder
    name = method or default_method(chosen, few_shot=few_shot)
    system = method_settings(name, chosen) if method else default_settings(chosen, few_shot=few_shot)
    values |= {"name": name, "method": system.model_dump(exclude_unset=True) | {"system": system.system}}
    if encoder:
        terminal.line(best.sentence)
    return parse(apply_overrides(values, overrides, source="--set"), source="--set")


def copy_threshold(source: Path, target: Path) -> str:
    """Copy the threshold of a run to the file that the user named. Return a line that says so."""
    from medad.base.storage import write_bytes

    if not source.is_file():
        return "no threshold was found, so none was saved"
    write_bytes(target, source.read_bytes())
    return f"threshold: {target.absolute()}"
