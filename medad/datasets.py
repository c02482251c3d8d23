"""Layouts of data sets on disk -> cases."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medad.config import DatasetSettings
from medad.errors import ConfigError, InputError
from medad.settings import data_root
from medad.words import natural_order

SAMPLES_PREFIX = "samples:"
_ENDINGS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr")
_LAYOUT_LIVER = {"btcv": (6,), "lits": (1, 2), "folder": ()}
_LAYOUT_TUMOUR = {"btcv": None, "lits": 2, "folder": None}
PLANTED_FILES = ("scan.nii.gz", "label.nii.gz")
"""What planting lesions writes; the label has LiTS's values."""
PLANTED_LIVER, PLANTED_TUMOUR = 1, 2
_ID_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
_DIGEST_CHARACTERS = 12


@dataclass(frozen=True)
class Case:
    """One scan with its label; `liver_labels` are the label values of the liver ROI."""

    id: str
    scan: Path
    label: Path | None
    liver_labels: tuple[int, ...]
    tumour_label: int | None


def planted_case(case: Case, folder: Path) -> Case:
    """The case, under the same id, whose files planting wrote into `folder`."""
    scan, label = (folder / name for name in PLANTED_FILES)
    return Case(case.id, scan, label, (PLANTED_LIVER, PLANTED_TUMOUR), PLANTED_TUMOUR)


@dataclass(frozen=True)
class CaseProblem:
    """A case that cannot be used, and why."""

    case_id: str
    path: Path
    rule: str


@dataclass(frozen=True)
class _Found:
    key: str  # what the layout calls the case
    id: str
    scan: Path
    label: Path | None
    rule: str | None


def find_cases(
    data: DatasetSettings, samples_dir: Path | None = None, *, may_be_empty: bool = False
) -> tuple[list[Case], list[CaseProblem]]:
    """List a data set's cases in natural order (2 before 10). Files are not opened.

    Parameters
    ----------
    data
        Root, layout, and which cases to take.
    samples_dir
        Where `samples:NAME` roots lie.
    may_be_empty
        A root without any case is no error: cases are yet to come.

    Returns
    -------
    cases
        Scans with their labels. Ids are unique and safe as file names: `btcv-0001`, `lits-17`; in layout `folder`
        what `*` stands for; with `opaque_ids` a digest of that.
    problems
        Scans without their label, scans there twice, and cases asked for that are not there.

    Raises
    ------
    InputError
        The root is missing, or holds no case at all.
    """
    root = data_root(data.root, samples_dir)
    if not root.is_dir():
        raise InputError(root, "no such folder of cases")
    search = {"btcv": _btcv, "lits": _lits, "folder": _folder}[data.layout]
    found = _with_unique_ids(
        sorted(search(root, data), key=lambda item: natural_order(item.key)), opaque=data.opaque_ids
    )
    if not found and not may_be_empty:
        raise InputError(root, f"no case of layout {data.layout} in this folder; expected {_expected(data)}")
    wanted = found if data.cases is None else [item for item in found if item.id in data.cases]
    liver = data.liver_labels if data.liver_labels is not None else _LAYOUT_LIVER[data.layout]
    tumour = data.tumour_label if data.tumour_label is not None else _LAYOUT_TUMOUR[data.layout]
    cases = [Case(item.id, item.scan, item.label, liver, tumour) for item in wanted if item.rule is None]
    problems = [
        # what follows the first mark lists file names, which opaque ids are there to hide
        CaseProblem(item.id, item.scan, re.split("[:;]", item.rule)[0] if data.opaque_ids else item.rule)
        for item in wanted
        if item.rule is not None
    ]
    missing = sorted(set(data.cases or ()) - {item.id for item in found}, key=natural_order)
    problems += [
        CaseProblem(name, root, "the settings ask for this case, the folder does not hold it") for name in missing
    ]
    return cases, problems


def _expected(data: DatasetSettings) -> str:
    return {
        "btcv": "img/img0001.nii.gz with label/label0001.nii.gz",
        "lits": "volume-N.nii[.gz] with segmentation-N.nii[.gz]",
        "folder": f"files that match {data.images}",
    }[data.layout]


def _btcv(root: Path, data: DatasetSettings) -> Iterator[_Found]:
    yield from _numbered(root / "img", "img", root / "label", "label", prefix="btcv-")


def _lits(root: Path, data: DatasetSettings) -> Iterator[_Found]:
    yield from _numbered(root, "volume-", root, "segmentation-", prefix="lits-")


def _numbered(images: Path, image_stem: str, labels: Path, label_stem: str, *, prefix: str) -> Iterator[_Found]:
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


def _folder(root: Path, data: DatasetSettings) -> Iterator[_Found]:
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


def _pair(key: str, case_id: str, scans: list[Path], labels: list[Path] | None, expected: str) -> _Found:
    rule = None
    if len(scans) > 1:
        rule = f"{len(scans)} scans for one case: {', '.join(path.name for path in scans)}"
    elif labels is not None and not labels:
        rule = f"no label for this scan; expected {expected}"
    elif labels is not None and len(labels) > 1:
        rule = f"{len(labels)} labels for one scan: {', '.join(path.name for path in labels)}"
    return _Found(key, case_id, scans[0], labels[0] if labels else None, rule)


def _with_unique_ids(found: list[_Found], *, opaque: bool) -> list[_Found]:
    """Ids safe as file names; a digest tells apart two that a file system which ignores case would mix up."""
    ids = []
    for item in found:
        safe = _ID_CHARACTERS.sub("-", item.id).strip("-.") or "case"
        ids.append(f"case-{_digest(item.key)}" if opaque else safe[:64])
    seen = [case_id.casefold() for case_id in ids]
    return [
        _Found(
            item.key,
            case_id if seen.count(case_id.casefold()) == 1 else f"{case_id[:50]}-{_digest(item.key)}",
            item.scan,
            item.label,
            item.rule,
        )
        for item, case_id in zip(found, ids, strict=True)
    ]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARACTERS]
