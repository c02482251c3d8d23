"""The request of `adflows liver step`, from its arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli.options import parse_overrides
from medad.base.errors import ConfigError
from medad.config.manual_steps import ManualStepName

if TYPE_CHECKING:
    from flows.liver.hand_steps import StepRequest
    from flows.privacy.case_ids import RegisteredCase
    from medad.config.header import HeaderSettings

MASK_RULE = (
    "a liver mask is needed: --liver MASK, on the scan's grid. One way to get it: "
    "TotalSegmentator -i SCAN -o FOLDER --task total --roi_subset liver, then --liver FOLDER/liver.nii.gz. "
    "Any segmentation works; --liver-label gives the value of liver in it, if it has several"
)


def hand_request(
    name: ManualStepName,
    through: ManualStepName | None,
    source: Path,
    liver: Path | None,
    liver_labels: list[int] | None,
    overrides: list[str] | None,
    header: HeaderSettings,
) -> StepRequest:
    """Return what the command is to do. A name that is not a file is the pseudonym of a registered scan.

    Raises
    ------
    ConfigError
        A setting is bad, --through names an earlier step, a mask is missing, or the pseudonym is unknown.
    """
    from pydantic import ValidationError

    from flows.liver.hand_steps import StepRequest, needs_liver, steps_between
    from medad.config.liver import PreprocessSettings

    try:
        settings = PreprocessSettings.model_validate(parse_overrides(overrides))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--set {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    names = steps_between(name, through or name)
    if not names:
        raise ConfigError(f"--through {through}: comes before {name}")
    case = None if source.exists() else _registered(str(source))
    if case is not None:
        names, source = steps_between("window", names[-1]), case.scan
        if liver is None:
            liver, liver_labels = case.liver, liver_labels or list(case.liver_labels)
    elif needs_liver(names) and liver is None:
        raise ConfigError(MASK_RULE)
    return StepRequest(
        names=names,
        source=source.absolute(),
        pseudonym=None if case is None else case.id,
        liver=None if liver is None else liver.absolute(),
        liver_labels=tuple(liver_labels or ()),
        settings=settings,
        header=header,
    )


def _registered(name: str) -> RegisteredCase | None:
    """Return the case of a pseudonym. None: the name cannot be one. Raises ConfigError for an unknown pseudonym."""
    from flows.privacy.case_ids import ID_PATTERN, resolve

    return resolve(name) if re.fullmatch(ID_PATTERN, name) else None
