"""Who is who among the scans, which patients train and which test, and whether one is on both sides.

Published code for this method splits its folds by slice, so that slices of one patient train and test; here a patient
is never divided. Everything follows from content and ids: names and order of files play no part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from medad.base.text import natural_order
from medad.config.liver import FoldSettings

Kind = Literal["patient", "scan", "liver"]
"""By what two cases are told to be of one patient: who it is said to be, the scan's files, the liver's voxels."""
KINDS: tuple[Kind, ...] = ("patient", "scan", "liver")
"""In the order in which they name a patient."""

SHARED: dict[Kind, str] = {
    "scan": "are one scan",
    "liver": "show one liver, voxel for voxel",
    "patient": "are scans of one patient",
}
"""What is said of two cases that share a mark, the most certain first."""


@dataclass(frozen=True)
class Mark:
    """What all scans of one patient may have in common."""

    kind: Kind
    digest: str
    """Hexadecimal. A patient's is plain, and short texts are found out from it: it stays in memory."""


@dataclass(frozen=True)
class Member:
    """A case, as far as telling patients apart goes. Two that share a mark are of one patient."""

    case_id: str
    marks: frozenset[Mark]


@dataclass(frozen=True)
class Leak:
    """A patient on both sides, by one case of either."""

    train: str
    test: str
    kind: Kind

    @property
    def rule(self) -> str:
        """One sentence, with both ids."""
        return f"{self.train} in training and {self.test} in testing {SHARED[self.kind]}"


def patient_mark(patient: str) -> Mark:
    """The mark of a patient who is known by a text: a DICOM PatientID, or part of a name."""
    return Mark("patient", hashlib.sha256(f"patient {patient}".encode(errors="surrogateescape")).hexdigest())


def patients_of(members: Sequence[Member]) -> list[str]:
    """For each case a key of its patient, whatever the order: equal if and only if marks link the two cases.

    Links are transitive: a copy of a patient's second scan is of that patient as well. The key is the kind and
    the smallest digest of all linked marks of the first kind that there is. A case without marks, whose
    file cannot be read, has the key "".
    """
    parent: dict[Mark, Mark] = {}

    def root(mark: Mark) -> Mark:
        while (above := parent.setdefault(mark, mark)) != mark:
            mark = above
        return mark

    for member in members:
        marks = list(member.marks)
        for mark in marks:
            parent[root(mark)] = root(marks[0])
    linked: dict[Mark, list[Mark]] = {}
    for mark in list(parent):
        linked.setdefault(root(mark), []).append(mark)
    names = {first: min(marks, key=_by_kind) for first, marks in linked.items()}
    keys = {first: f"{mark.kind} {mark.digest}" for first, mark in names.items()}
    return [keys[root(next(iter(member.marks)))] if member.marks else "" for member in members]


def _by_kind(mark: Mark) -> tuple[int, str]:
    return KINDS.index(mark.kind), mark.digest


def assign_folds(train: Collection[str], test: Collection[str], folds: FoldSettings) -> dict[str, int]:
    """Assign patients to folds: key of a patient -> number of its fold, 0 to `folds.count` - 1.

    Of the patients of either data set every fold gets the same number, or one more; a patient of both sets gets one
    fold. A function of the two sets of keys, the count and the seed alone.

    Parameters
    ----------
    train, test
        Keys of the patients of each data set, as `patients_of` gives them.
    """

    def shuffled(patients: set[str]) -> list[str]:
        return sorted(patients, key=lambda key: hashlib.sha256(f"{folds.seed} {key}".encode()).digest())

    both = set(train) & set(test)
    assigned = {key: place % folds.count for place, key in enumerate(shuffled(both))}
    for alone in (set(train) - both, set(test) - both):
        # each goes on where the patients of both sets ended, so that the folds of either set are equally full
        assigned |= {key: place % folds.count for place, key in enumerate(shuffled(alone), start=len(both))}
    return assigned


def find_leaks(train: Sequence[Member], test: Sequence[Member]) -> list[Leak]:
    """Patients on both sides, each by its first case of either in natural order of ids; empty where all is well."""
    patients = patients_of([*train, *test])
    sides: dict[str, tuple[list[Member], list[Member]]] = {}
    for place, (member, patient) in enumerate(zip([*train, *test], patients, strict=True)):
        if patient:
            sides.setdefault(patient, ([], []))[place >= len(train)].append(member)
    leaks = [_leak(*both) for both in sides.values() if all(both)]
    return sorted(leaks, key=lambda leak: (natural_order(leak.train), natural_order(leak.test)))


def _leak(train: list[Member], test: list[Member]) -> Leak:
    """Linked cases of two sides: wherever the links cross from one to the other, two cases share a mark."""
    marks = [frozenset[Mark]().union(*(member.marks for member in side)) for side in (train, test)]
    shared = min(marks[0] & marks[1], key=lambda mark: (list(SHARED).index(mark.kind), mark.digest))
    ids = [
        min((member.case_id for member in side if shared in member.marks), key=natural_order) for side in (train, test)
    ]
    return Leak(ids[0], ids[1], shared.kind)
