"""The patients behind the scans, the train/test split by patient, and the search for patients in both parts.

Published code for this method splits its folds by slice, so that slices of one patient are in training and testing.
Here a patient is never divided. Everything depends on content and ids only, not on names or order of files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from medad.base.text import natural_order
from medad.config.liver import FoldSettings

MarkKind = Literal["patient", "scan", "liver"]
"""Evidence that two cases show the same patient: the stated patient, equal files of the scan, equal voxels of the
liver."""
MARK_KINDS: tuple[MarkKind, ...] = ("patient", "scan", "liver")
"""All kinds of marks. The first kind that a patient has gives the patient's key."""

LEAK_TEXTS: dict[MarkKind, str] = {
    "scan": "are the same scan",
    "liver": "show the same liver, voxel for voxel",
    "patient": "are scans of the same patient",
}
"""Texts about two cases that share a mark, with the strongest evidence first."""


@dataclass(frozen=True)
class PatientMark:
    """A property that several scans of a patient may share."""

    kind: MarkKind
    digest: str
    """Digest of the property, hexadecimal. A patient's digest has no key, so short texts can be guessed from it.
    It must stay in memory."""


@dataclass(frozen=True)
class MarkedCase:
    """A case with its marks. Two cases with a common mark show the same patient."""

    case_id: str
    marks: frozenset[PatientMark]


@dataclass(frozen=True)
class Leak:
    """A patient in both training and testing, shown by one case of each."""

    train: str
    test: str
    kind: MarkKind

    @property
    def rule(self) -> str:
        """Return a sentence with both ids."""
        return f"{self.train} in training and {self.test} in testing {LEAK_TEXTS[self.kind]}"


def patient_mark(patient: str) -> PatientMark:
    """Return the mark of a patient given by a text: a DICOM PatientID, or part of a name."""
    return PatientMark("patient", hashlib.sha256(f"patient {patient}".encode(errors="surrogateescape")).hexdigest())


def patients_of(members: Sequence[MarkedCase]) -> list[str]:
    """Return a patient's key for each case. Two keys are equal if and only if marks link the two cases.

    Links are transitive: a copy of a patient's second scan shows that patient too. The key contains the first kind in
    `MARK_KINDS` that the linked marks have, and the smallest digest of that kind. It does not depend on the order of
    the cases. A case without marks has the key "": its file cannot be read.
    """
    parent: dict[PatientMark, PatientMark] = {}

    def root(mark: PatientMark) -> PatientMark:
        while (above := parent.setdefault(mark, mark)) != mark:
            mark = above
        return mark

    for member in members:
        marks = list(member.marks)
        for mark in marks:
            parent[root(mark)] = root(marks[0])
    linked: dict[PatientMark, list[PatientMark]] = {}
    for mark in list(parent):
        linked.setdefault(root(mark), []).append(mark)
    names = {first: min(marks, key=_by_kind) for first, marks in linked.items()}
    keys = {first: f"{mark.kind} {mark.digest}" for first, mark in names.items()}
    return [keys[root(next(iter(member.marks)))] if member.marks else "" for member in members]


def _by_kind(mark: PatientMark) -> tuple[int, str]:
    return MARK_KINDS.index(mark.kind), mark.digest


def assign_folds(train: Collection[str], test: Collection[str], folds: FoldSettings) -> dict[str, int]:
    """Assign patients to folds: key of a patient -> number of its fold, 0 to `folds.count` - 1.

    The numbers of a data set's patients in two folds differ by at most one. A patient in both data sets gets one fold.
    The result depends only on the two sets of keys, the count and the seed.

    Parameters
    ----------
    train, test
        Keys of the patients of each data set, from `patients_of`.
    """

    def shuffled(patients: set[str]) -> list[str]:
        return sorted(patients, key=lambda key: hashlib.sha256(f"{folds.seed} {key}".encode()).digest())

    both = set(train) & set(test)
    assigned = {key: place % folds.count for place, key in enumerate(shuffled(both))}
    for only_one in (set(train) - both, set(test) - both):
        # continue after the patients of both sets, so that the folds of each set stay equally large
        assigned |= {key: place % folds.count for place, key in enumerate(shuffled(only_one), start=len(both))}
    return assigned


def find_leaks(train: Sequence[MarkedCase], test: Sequence[MarkedCase]) -> list[Leak]:
    """Return the patients in both training and testing, each by its first case of both in natural order of ids."""
    patients = patients_of([*train, *test])
    by_patient: dict[str, tuple[list[MarkedCase], list[MarkedCase]]] = {}
    for place, (member, patient) in enumerate(zip([*train, *test], patients, strict=True)):
        if patient:
            by_patient.setdefault(patient, ([], []))[place >= len(train)].append(member)
    leaks = [_leak(*pair) for pair in by_patient.values() if all(pair)]
    return sorted(leaks, key=lambda leak: (natural_order(leak.train), natural_order(leak.test)))


def _leak(train: list[MarkedCase], test: list[MarkedCase]) -> Leak:
    """Return the leak of a patient with cases in both parts: one case of each that share a mark.

    Such a pair exists, because the links between the two parts must cross from one to the other somewhere.
    """
    marks = [frozenset[PatientMark]().union(*(member.marks for member in part)) for part in (train, test)]
    shared = min(marks[0] & marks[1], key=lambda mark: (list(LEAK_TEXTS).index(mark.kind), mark.digest))
    ids = [
        min((member.case_id for member in part if shared in member.marks), key=natural_order) for part in (train, test)
    ]
    return Leak(ids[0], ids[1], shared.kind)
