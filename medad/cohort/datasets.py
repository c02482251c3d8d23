"""Search for the cases of a data set on disk, by its layout."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from medad.base.errors import CaseFailure, ConfigError, InputError
from medad.base.private import SAMPLES_PREFIX
from medad.base.settings import data_root
from medad.base.text import natural_order
from medad.config.liver import DatasetSettings

_ZIP = ".zip"
_ENDINGS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr", _ZIP)
_LAYOUT_LIVER = {"btcv": (6,), "lits": (1, 2), "folder": ()}
_LAYOUT_TUMOUR = {"btcv": None, "lits": 2, "folder": None}
INSERTED_FILES = ("scan.nii.gz", "label.nii.gz")
"""Files of a scan with inserted lesions. The label has the values of LiTS."""
INSERTED_LIVER, INSERTED_TUMOUR = 1, 2
_ID_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
_DIGEST_CHARACTERS = 12
_PSEUDONYM = re.compile(r"(case|ct)-[0-9a-f]{12}(-\d+)?")

Pseudonyms = Callable[[Sequence[Path]], Sequence[str]]
"""Function from all scans to their pseudonyms, in order. With a secret key it gives ids that nobody can guess from a
name."""


ChooseSeries = Callable[[Path, Path | None], Path]
"""Function from a DICOM export and the label to the path of one series. Raises InputError if none can be chosen."""


@dataclass(frozen=True)
class Case:
    """One scan with its label. `liver_labels` are the label values of the liver ROI. Empty: the label's only value."""

    id: str
    scan: Path
    label: Path | None
    liver_labels: tuple[int, ...]
    tumour_label: int | None
    pseudonymous: bool = False
    """Whether the id is a pseudonym. Then no name of the case's files may be shown."""
    patient: str | None = field(default=None, repr=False)
    """Patient, found by the setting `patients`. It may be a name, so it is never shown."""


@dataclass(frozen=True)
class LabelledScan:
    """The files of a case and the settings for reading them. A result depends on these, but not on the case's name."""

    scan: Path
    label: Path | None
    liver_labels: tuple[int, ...]
    tumour_label: int | None
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    affine_mismatch: Literal["error", "warn"] = "error"
    spacing_mm: tuple[float, float, float] | None = None
    fill_cavities: bool = False
    """Whether closed cavities of the liver mask are filled."""
    root: Path | None = field(default=None, repr=False, compare=False, metadata={"in_key": False})
    """Folder of the data set. Logs must not show its name or anything below it. It does not change results."""

    @classmethod
    def of(cls, case: Case, data: DatasetSettings) -> LabelledScan:
        """Return a case's files with the reading settings of its data set."""
        labels = tuple(sorted(case.liver_labels))
        root = None if data.root.startswith(SAMPLES_PREFIX) or data.root in ("", "-", ".") else Path(data.root)
        rules = (data.affine_from, data.affine_mismatch, data.spacing_mm, data.fill_cavities)
        return cls(case.scan, case.label, labels, case.tumour_label, *rules, root)

    @classmethod
    def inserted(cls, folder: Path) -> LabelledScan:
        """Return the files that insertion wrote into `folder`."""
        scan, label = (folder / name for name in INSERTED_FILES)
        return cls(scan, label, (INSERTED_LIVER, INSERTED_TUMOUR), INSERTED_TUMOUR)


def case_with_lesions(case: Case, folder: Path) -> Case:
    """Return the case with the same id and the files that insertion wrote into `folder`."""
    scan, label = (folder / name for name in INSERTED_FILES)
    return replace(
        case, scan=scan, label=label, liver_labels=(INSERTED_LIVER, INSERTED_TUMOUR), tumour_label=INSERTED_TUMOUR
    )


@dataclass(frozen=True)
class _FoundCase:
    key: str  # the case's name in the layout
    id: str
    scan: Path
    label: Path | None
    rule: str | None
    name: str = ""  # the id without a pseudonym
    pseudonymous: bool = False
    patient: str | None = None


def find_cases(
    data: DatasetSettings,
    samples_dir: Path | None = None,
    pseudonyms: Pseudonyms | None = None,
    *,
    choose: ChooseSeries | None = None,
    may_be_empty: bool = False,
) -> tuple[list[Case], list[CaseFailure]]:
    """List a data set's cases in natural order of their names (2 before 10).

    A DICOM series always gets a pseudonym. The machine that wrote it may have named the folder after a patient, a date
    or a study.

    Parameters
    ----------
    data
        Root, layout, and cases to use.
    samples_dir
        Folder of the sample data, for roots `samples:NAME`.
    pseudonyms
        Function that gives the pseudonyms. It may read the files. None: use a plain digest of the text that `*`
        matches. Anyone who knows the name can compute this digest too.
    choose
        Function that chooses one of several series of a DICOM export. None: no series is chosen, and no file is opened.
    may_be_empty
        Whether a root without cases is allowed, because cases may arrive later.

    Returns
    -------
    cases
        Scans with their labels. Ids are unique and safe as file names: `btcv-0001`, `lits-17`, or in layout `folder`
        the text that `*` matches. If `pseudonyms` gives two scans the same id, the second one gets the suffix `-2`.
    problems
        Scans without a label, cases with several scans, cases without a patient in their name although the settings
        expect one, and requested cases that do not exist.

    Raises
    ------
    InputError
        The root is missing or contains no case.
    """
    root = data_root(data.root, samples_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder")
    search = {"btcv": _btcv, "lits": _lits, "folder": _folder}[data.layout]
    found = sorted(search(root, data), key=lambda item: natural_order(item.key))
    found = [item if choose is None else _with_series(item, choose) for item in found]
    found = _with_unique_ids([_with_safe_id(item, data) for item in found], pseudonyms)
    if not found and not may_be_empty:
        raise InputError(root, f"no case of layout {data.layout} in this folder; expected {_expected(data)}")
    requested = data.cases
    # a pseudonymous case can also be selected by its file's name, which the author of the settings knows
    wanted = found if requested is None else [item for item in found if not {item.id, item.name}.isdisjoint(requested)]
    liver = data.liver_labels if data.liver_labels is not None else _LAYOUT_LIVER[data.layout]
    tumour = data.tumour_label if data.tumour_label is not None else _LAYOUT_TUMOUR[data.layout]
    cases = [
        Case(item.id, item.scan, item.label, liver, tumour, item.pseudonymous, item.patient)
        for item in wanted
        if item.rule is None
    ]
    problems = [
        # the text after the first colon or semicolon lists file names, which a pseudonym must hide
        _failed(
            item.id, item.scan, re.split("[:;]", item.rule)[0] if item.pseudonymous else item.rule, item.pseudonymous
        )
        for item in wanted
        if item.rule is not None
    ]
    return cases, problems + _missing(root, found, data)


def _failed(case_id: str, path: Path, rule: str, pseudonymous: bool) -> CaseFailure:
    return CaseFailure(case_id, "find", rule, str(path), pseudonymous=pseudonymous)


def _missing(root: Path, found: list[_FoundCase], data: DatasetSettings) -> list[CaseFailure]:
    """Return the requested cases that do not exist. If names are hidden, a case is shown by its place in `cases`."""
    there = {item.id for item in found} | {item.name for item in found}
    hidden = data.pseudonyms or any(item.pseudonymous for item in found)
    problems = []
    requested = enumerate(dict.fromkeys(data.cases or ()), start=1)
    for place, name in sorted(requested, key=lambda item: natural_order(item[1])):
        if name not in there:
            shown = f"asked-{place}" if hidden and not _PSEUDONYM.fullmatch(name) else name
            rule = "the settings list this case, but the folder does not contain it"
            problems.append(_failed(shown, root, rule, hidden))
    return problems


def _expected(data: DatasetSettings) -> str:
    return {
        "btcv": "img/img0001.nii.gz with label/label0001.nii.gz",
        "lits": "volume-N.nii[.gz] with segmentation-N.nii[.gz]",
        "folder": f"files that match {data.images}",
    }[data.layout]


def _btcv(root: Path, data: DatasetSettings) -> Iterator[_FoundCase]:
    yield from _numbered(root / "img", "img", root / "label", "label", prefix="btcv-")


def _lits(root: Path, data: DatasetSettings) -> Iterator[_FoundCase]:
    yield from _numbered(root, "volume-", root, "segmentation-", prefix="lits-")


def _numbered(images: Path, image_stem: str, labels: Path, label_stem: str, *, prefix: str) -> Iterator[_FoundCase]:
    scans = _by_number(images, image_stem)
    partners = _by_number(labels, label_stem)
    for number, paths in scans.items():
        yield _pair(number, prefix + number, paths, partners.get(number, []), f"{label_stem}{number}.nii.gz")


def _by_number(folder: Path, stem: str) -> dict[str, list[Path]]:
    result: dict[str, list[Path]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            match = re.fullmatch(rf"{re.escape(stem)}(\d+)\.nii(\.gz)?", path.name)
            if match:
                result.setdefault(match.group(1), []).append(path)
    return result


def _folder(root: Path, data: DatasetSettings) -> Iterator[_FoundCase]:
    if data.images is None:
        raise ValueError("layout folder without `images`")  # the validation of the settings forbids this
    partners: dict[str, list[Path]] = {}
    if data.labels is not None:
        for key, path in _matches(root, data.labels):
            partners.setdefault(key, []).append(path)
    scans: dict[str, list[Path]] = {}
    for key, path in _matches(root, data.images):
        scans.setdefault(key, []).append(path)
    for key, paths in scans.items():
        if data.labels is None:
            yield _pair(key, key, paths, None, "")
        else:
            yield _pair(key, key, paths, partners.get(key, []), data.labels.replace("*", key))


def _matches(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    """Yield for each matching path the text that the pattern's `*` matches, and the path."""
    if Path(pattern).is_absolute():
        raise ConfigError(f"{pattern}: a pattern must be relative to the data set's root")
    before, after = pattern.split("*")
    expression = re.compile(f"{_literal(before)}([^/]+){_literal(after)}")
    for path in sorted(root.glob(pattern)):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if match and not path.name.startswith(".") and (path.is_dir() or path.name.lower().endswith(_ENDINGS)):
            yield _without_ending(match.group(1)) if after == "" else match.group(1), path


def _literal(part: str) -> str:
    """Return a part of a glob as a regular expression. `?` and `[...]` remain wildcards of one character."""
    pieces = re.split(r"(\?|\[[^\]]+\])", part)
    return "".join("[^/]" if p == "?" else p if p.startswith("[") and p.endswith("]") else re.escape(p) for p in pieces)


def _without_ending(name: str) -> str:
    ending = next((ending for ending in _ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _pair(key: str, case_id: str, scans: list[Path], labels: list[Path] | None, expected: str) -> _FoundCase:
    rule = None
    if len(scans) > 1:
        rule = f"{len(scans)} scans for one case: {', '.join(path.name for path in scans)}"
    elif labels is not None and not labels:
        rule = f"no label for this scan; expected {expected}"
    elif labels is not None and len(labels) > 1:
        rule = f"{len(labels)} labels for one scan: {', '.join(path.name for path in labels)}"
    return _FoundCase(key, case_id, scans[0], labels[0] if labels else None, rule)


def _with_safe_id(item: _FoundCase, data: DatasetSettings) -> _FoundCase:
    """Return the case with an id that is safe as a file name."""
    safe = (_ID_CHARACTERS.sub("-", item.id).strip("-.") or "case")[:64]
    item = _with_patient(item, data)
    return replace(item, id=safe, name=safe, pseudonymous=data.pseudonyms or _is_dicom_name(item.scan))


def _with_series(item: _FoundCase, choose: ChooseSeries) -> _FoundCase:
    """Return the case with one series of its export. If none can be chosen, the case has that rule."""
    if item.rule is not None or not is_export(item.scan):
        return item
    try:
        return replace(item, scan=choose(item.scan, item.label))
    except InputError as error:
        return replace(item, rule=error.rule)


def is_export(path: Path) -> bool:
    """Return whether a path is a DICOM export by its kind or name: a folder or a zip. Nothing is opened."""
    return path.is_dir() or path.suffix.lower() == _ZIP


def _is_dicom_name(scan: Path) -> bool:
    return is_export(scan) or (is_export(scan.parent) and not scan.exists())


def _with_patient(item: _FoundCase, data: DatasetSettings) -> _FoundCase:
    """Return the case with its patient, found in the case's name."""
    if data.patients is None:
        return item
    match = re.search(data.patients, item.id)
    patient = None if match is None else match.group(1)
    if not patient:
        # a guess could put one patient into both training and testing
        return replace(item, rule=item.rule or "the setting `patients` finds no patient in its name")
    return replace(item, patient=patient)


def _with_unique_ids(found: list[_FoundCase], pseudonyms: Pseudonyms | None) -> list[_FoundCase]:
    """Return the cases with pseudonyms where required, and with unique ids even if upper and lower case are ignored."""
    hidden = [item for item in found if item.pseudonymous]
    if pseudonyms is not None and hidden:
        given = iter(pseudonyms([item.scan for item in hidden]))
    else:
        given = iter([f"case-{_digest(item.key)}" for item in hidden])
    found = [replace(item, id=next(given)) if item.pseudonymous else item for item in found]
    seen = Counter(item.id.casefold() for item in found)
    unique, before = [], Counter[str]()
    for item in found:
        case_id = item.id
        if item.pseudonymous:  # the digest below would be that of the name
            before[case_id] += 1
            case_id = case_id if before[case_id] == 1 else f"{case_id}-{before[case_id]}"
        elif seen[case_id.casefold()] > 1:
            case_id = f"{case_id[:50]}-{_digest(item.key)}"
        unique.append(replace(item, id=case_id))
    return unique


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARACTERS]
