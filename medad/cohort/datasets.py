"""Layouts of data sets on disk -> cases."""

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

_ENDINGS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr")
_LAYOUT_LIVER = {"btcv": (6,), "lits": (1, 2), "folder": ()}
_LAYOUT_TUMOUR = {"btcv": None, "lits": 2, "folder": None}
INSERTED_FILES = ("scan.nii.gz", "label.nii.gz")
"""Files of a scan with inserted lesions; the label has LiTS's values."""
INSERTED_LIVER, INSERTED_TUMOUR = 1, 2
_ID_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
_DIGEST_CHARACTERS = 12
_PSEUDONYM = re.compile(r"(case|ct)-[0-9a-f]{12}(-\d+)?")

Pseudonyms = Callable[[Sequence[Path]], Sequence[str]]
"""Scans -> their ids, in order, all at once. Whoever keeps a secret can give ids that nobody guesses from a name."""


@dataclass(frozen=True)
class Case:
    """One scan with its label; `liver_labels` are the label values of the liver ROI."""

    id: str
    scan: Path
    label: Path | None
    liver_labels: tuple[int, ...]
    tumour_label: int | None
    pseudonymous: bool = False
    """The id tells nothing of the names, and nothing that is shown of the case may."""
    patient: str | None = field(default=None, repr=False)
    """Whose scan it is, by the settings' `patients`; a name, so never shown."""


@dataclass(frozen=True)
class LabelledScan:
    """The files of a case and how they are read: what a result depends on, without the case's name."""

    scan: Path
    label: Path | None
    liver_labels: tuple[int, ...]
    tumour_label: int | None
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    affine_mismatch: Literal["error", "warn"] = "error"
    root: Path | None = field(default=None, repr=False, compare=False, metadata={"in_key": False})
    """Folder of the data set, whose name and what lies below it no log may show. It changes no result."""

    @classmethod
    def of(cls, case: Case, data: DatasetSettings) -> LabelledScan:
        """Return a case's files, read as its data set is."""
        labels = tuple(sorted(case.liver_labels))
        root = None if data.root.startswith(SAMPLES_PREFIX) or data.root in ("", "-", ".") else Path(data.root)
        return cls(case.scan, case.label, labels, case.tumour_label, data.affine_from, data.affine_mismatch, root)

    @classmethod
    def inserted(cls, folder: Path) -> LabelledScan:
        """Return the files that insertion wrote into `folder`."""
        scan, label = (folder / name for name in INSERTED_FILES)
        return cls(scan, label, (INSERTED_LIVER, INSERTED_TUMOUR), INSERTED_TUMOUR)


def case_with_lesions(case: Case, folder: Path) -> Case:
    """The case, under the same id, whose files insertion wrote into `folder`."""
    scan, label = (folder / name for name in INSERTED_FILES)
    return replace(
        case, scan=scan, label=label, liver_labels=(INSERTED_LIVER, INSERTED_TUMOUR), tumour_label=INSERTED_TUMOUR
    )


@dataclass(frozen=True)
class _FoundCase:
    key: str  # what the layout calls the case
    id: str
    scan: Path
    label: Path | None
    rule: str | None
    name: str = ""  # the id that the layout would give
    pseudonymous: bool = False
    patient: str | None = None


def find_cases(
    data: DatasetSettings,
    samples_dir: Path | None = None,
    pseudonyms: Pseudonyms | None = None,
    *,
    may_be_empty: bool = False,
) -> tuple[list[Case], list[CaseFailure]]:
    """List a data set's cases in natural order of their names (2 before 10). Files are not opened here.

    A DICOM series gets a pseudonym whatever the settings say: its folder is named by the machine that wrote it, after
    a patient, a date or a study.

    Parameters
    ----------
    data
        Root, layout, and which cases to take.
    samples_dir
        Where `samples:NAME` roots lie.
    pseudonyms
        Gives the pseudonyms, and may read the files. None: a plain digest of what `*` stands for, which anyone who
        knows the name can compute as well.
    may_be_empty
        A root without any case is no error: cases are yet to come.

    Returns
    -------
    cases
        Scans with their labels. Ids are unique and safe as file names: `btcv-0001`, `lits-17`; in layout `folder`
        what `*` stands for. A second scan to which `pseudonyms` gives an id gets it with `-2`.
    problems
        Scans without their label, scans there twice, cases whose name tells no patient though the settings say that
        it does, and cases asked for that are not there.

    Raises
    ------
    InputError
        The root is missing, or holds no case at all.
    """
    root = data_root(data.root, samples_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder of cases")
    search = {"btcv": _btcv, "lits": _lits, "folder": _folder}[data.layout]
    found = sorted(search(root, data), key=lambda item: natural_order(item.key))
    found = _with_unique_ids([_with_safe_id(item, data) for item in found], pseudonyms)
    if not found and not may_be_empty:
        raise InputError(root, f"no case of layout {data.layout} in this folder; expected {_expected(data)}")
    requested = data.cases
    # a pseudonymous case can also be chosen by its file's name, which the author of the settings knows
    wanted = found if requested is None else [item for item in found if not {item.id, item.name}.isdisjoint(requested)]
    liver = data.liver_labels if data.liver_labels is not None else _LAYOUT_LIVER[data.layout]
    tumour = data.tumour_label if data.tumour_label is not None else _LAYOUT_TUMOUR[data.layout]
    cases = [
        Case(item.id, item.scan, item.label, liver, tumour, item.pseudonymous, item.patient)
        for item in wanted
        if item.rule is None
    ]
    problems = [
        # what follows the first mark lists file names, which pseudonyms are there to hide
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
    """Cases that the settings ask for and that are not there; by their place in the settings where names are hidden."""
    there = {item.id for item in found} | {item.name for item in found}
    hidden = data.pseudonyms or any(item.pseudonymous for item in found)
    problems = []
    requested = enumerate(dict.fromkeys(data.cases or ()), start=1)
    for place, name in sorted(requested, key=lambda item: natural_order(item[1])):
        if name not in there:
            shown = f"asked-{place}" if hidden and not _PSEUDONYM.fullmatch(name) else name
            rule = "the settings ask for this case, the folder does not hold it"
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
        raise ValueError("layout folder without `images`")  # the settings' own validation forbids it
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
    """Paths that match, each with what the pattern's one `*` stands for."""
    if Path(pattern).is_absolute():
        raise ConfigError(f"{pattern}: a pattern is relative to the data set's root")
    before, after = pattern.split("*")
    expression = re.compile(f"{_literal(before)}([^/]+){_literal(after)}")
    for path in sorted(root.glob(pattern)):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if match and not path.name.startswith(".") and (path.is_dir() or path.name.lower().endswith(_ENDINGS)):
            yield _without_ending(match.group(1)) if after == "" else match.group(1), path


def _literal(part: str) -> str:
    """A glob's text around its one `*`; `?` and `[...]` stay wildcards of one character."""
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
    """With an id that is safe as a file name."""
    safe = (_ID_CHARACTERS.sub("-", item.id).strip("-.") or "case")[:64]
    item = _with_patient(item, data)
    return replace(item, id=safe, name=safe, pseudonymous=data.pseudonyms or item.scan.is_dir())


def _with_patient(item: _FoundCase, data: DatasetSettings) -> _FoundCase:
    """With whose scan it is, by the layout's own name for it."""
    if data.patients is None:
        return item
    match = re.search(data.patients, item.id)
    patient = None if match is None else match.group(1)
    if not patient:
        # guessing would put one patient on both sides
        return replace(item, rule=item.rule or "its name tells no patient by the settings' `patients`")
    return replace(item, patient=patient)


def _with_unique_ids(found: list[_FoundCase], pseudonyms: Pseudonyms | None) -> list[_FoundCase]:
    """Pseudonyms where they are due; then no two ids that a file system which ignores case would mix up."""
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
        if item.pseudonymous:  # the digest below is of the name
            before[case_id] += 1
            case_id = case_id if before[case_id] == 1 else f"{case_id}-{before[case_id]}"
        elif seen[case_id.casefold()] > 1:
            case_id = f"{case_id[:50]}-{_digest(item.key)}"
        unique.append(replace(item, id=case_id))
    return unique


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARACTERS]
