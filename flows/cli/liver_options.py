"""Options that several commands of `adflows liver` share, and the reader of a configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import complete_config
from flows.machine.environment import find_config

if TYPE_CHECKING:
    from medad.config.liver import LiverSettings

Config = Annotated[
    Path,
    typer.Argument(
        help="A YAML file, or a name in configs/liver, such as default or small.",
        autocompletion=complete_config("liver"),
    ),
]
Seed = Annotated[int | None, typer.Option(help="Random seed of the training. Default: the configuration's.")]
Train = Annotated[
    Path | None, typer.Option("--train", help="Folder of the training data. Default: the configuration's.")
]
Test = Annotated[Path | None, typer.Option("--test", help="Folder of the test data. Default: the configuration's.")]
Model = Annotated[
    Path, typer.Option("--model", help="Run folder that contains a trained model, or `default`: the package's model.")
]
DefaultModel = Annotated[
    Path | None,
    typer.Option("--model", help="Run folder that contains a trained model. Default: the package's model."),
]
Base = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Continue from the weights of this run folder's model, or of `default`, instead of random weights.",
    ),
]

LiverLabel = Annotated[
    list[int] | None,
    typer.Option("--liver-label", help="Value of liver in the mask. Repeatable. Default: its only value, 1."),
]
NoViewer = Annotated[bool, typer.Option("--no-viewer", help="Write no pages to scroll through the scans.")]


def _gpus(text: str) -> object:
    """Return the setting `gpus` of a device's name, as `cpu`, `gpu`, `gpu:1` or `gpu:0,1`."""
    if text in ("cpu", "auto"):
        return text
    match = re.fullmatch(r"(gpu|cuda)(:(\d+(,\d+)*))?", text)
    if match is None:
        raise typer.BadParameter("expected cpu, gpu, gpu:N or auto")
    return tuple(int(number) for number in (match.group(3) or "0").split(","))


Devices = Annotated[
    Any,
    typer.Option(
        "--device", "-d", metavar="DEVICE", parser=_gpus, help="Device: cpu, gpu, gpu:N or auto. Default: the model's."
    ),
]


def load_settings(config: Path, overrides: dict[str, Any]) -> LiverSettings:
    """Read a configuration. Raise ConfigError for a bad one."""
    from medad.config.liver import load

    return load(find_config(config, "liver"), overrides)


def path_text(path: Path | None) -> str | None:
    """Return a path as a setting's value. None if the option was not given."""
    return None if path is None else str(path)
