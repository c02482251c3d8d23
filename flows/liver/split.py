"""Which cases train and which are tested, and that no patient is on both sides.

Patients are known by a DICOM series' PatientID, by the settings' `patients`, by the scan's files and, once cases are
prepared, by the voxels of the liver. What names a patient is digested at once and never leaves the process; what a run
folder keeps of it is a digest under the machine's secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.machine.environment import worker_count
from flows.privacy import case_ids
from flows.store.digests import path_digest
from flows.store.references import Ref
from medad.base.errors import CaseFailure, ConfigError, UserError
from medad.base.manifest import read_manifest
from medad.cohort.folds import MARK_KINDS, Leak, MarkedCase, PatientMark, deal, patient_mark, patients_of
from medad.config.liver import FoldSettings

if TYPE_CHECKING:
    from medad.cohort.datasets import Case

Use = Literal["train", "test"]
BOTH: tuple[Use, ...] = ("train", "test")
PLACE = "train and test data"
"""What a failure of both sides together is called by."""


@dataclass(frozen=True)
class Known:
    """A case and what tells its patient."""

    case: Case
    marks: frozenset[PatientMark]
    """Empty of a file that cannot be read, which its preparation will say."""

    @property
    def member(self) -> MarkedCase:
        return MarkedCase(self.case.id, self.marks)

    def salted(self) -> str | None:
        """The patient's digest under this machine's secret, where a text names the patient. Raises ConfigError."""
        named = sorted(mark.digest for mark in self.marks if mark.kind == "patient")
        return case_ids.keyed(f"patient {named[0]}") if named else None


@dataclass(frozen=True)
class Sides:
    """The cases of either side."""

    train: tuple[Known, ...] = ()
    test: tuple[Known, ...] = ()
    notes: tuple[str, ...] = ()
    """For the report."""
    salted: Mapping[tuple[Use, str], str] = field(default_factory=dict)
    """(Side, case id) -> its patient's salted digest, where one is known."""

    @classmethod
    def of(cls, train: Sequence[Case], test: Sequence[Case]) -> Sides:
        """Reads what is not remembered of the scans, several at a time."""
        with ThreadPoolExecutor(worker_count(), thread_name_prefix="patients") as pool:
            known = list(pool.map(_known, [*train, *test]))
        return cls(tuple(known[: len(train)]), tuple(known[len(train) :]))

    def members(self, use: Use) -> list[MarkedCase]:
        return [known.member for known in getattr(self, use)]

    def fold(self, folds: FoldSettings) -> Sides:
        """The patients outside the fold train, those in it are tested. A file that cannot be read stays on its side.

        Raises
        ------
        ConfigError
            The fold leaves a side without any patient.
        """
        patients = patients_of([*self.members("train"), *self.members("test")])
        of_train, of_test = patients[: len(self.train)], patients[len(self.train) :]
        dealt = deal(set(of_train) - {""}, set(of_test) - {""}, folds)
        inside = {patient for patient, number in dealt.items() if number == folds.index}
        train = tuple(known for known, patient in zip(self.train, of_train, strict=True) if patient not in inside)
        test = tuple(
            known for known, patient in zip(self.test, of_test, strict=True) if not patient or patient in inside
        )
        for use, kept, all_of_them in (("train", train, of_train), ("test", test, of_test)):
            if not kept:
                raise ConfigError(
                    f"fold {folds.index} of {folds.count} leaves no case in {use}_data, whose patients are "
                    f"{len(set(all_of_them))}; set folds.count to that at most"
                )
        counts = [len(set(some) - {""}) for some in (set(of_train) - inside, set(of_test) & inside)]
        note = (
            f"Fold {folds.index} of {folds.count}, counted from 0, dealt by patient with seed {folds.seed}: "
            f"{counts[0]} in training, {counts[1]} tested."
        )
        return Sides(train, test, (note,))

    def with_salted(self) -> Sides:
        """With digests that may be kept. Raises ConfigError."""
        salted = {
            (use, known.case.id): digest
            for use in BOTH
            for known in getattr(self, use)
            if (digest := known.salted()) is not None
        }
        return Sides(self.train, self.test, self.notes, salted)

    def prepared(self, use: Use, case_id: str, ref: Ref) -> MarkedCase:
        """A prepared (or inserted) case, told by its liver's voxels as well."""
        known = next((each for each in getattr(self, use) if each.case.id == case_id), None)
        marks = frozenset() if known is None else known.marks
        return MarkedCase(case_id, marks | _liver_mark(ref))


def salted_member(member: MarkedCase, salted: str | None) -> MarkedCase:
    """The case as a run's manifest knows it: its patient by the salted digest alone."""
    marks = {mark for mark in member.marks if mark.kind != "patient"}
    return MarkedCase(member.case_id, frozenset(marks | ({PatientMark("patient", salted)} if salted else set())))


def _known(case: Case) -> Known:
    try:
        marks = {PatientMark("scan", path_digest(case.scan))}
    except UserError:
        return Known(case, frozenset())
    if (patient := _patient(case)) is not None:
        marks.add(patient_mark(patient))
    return Known(case, frozenset(marks))


def _patient(case: Case) -> str | None:
    if case.scan.is_dir():
        from medad.ct.dicom import patient_id

        if (found := patient_id(case.scan)) is not None:
            return found
    return case.patient


def _liver_mark(ref: Ref) -> frozenset[PatientMark]:
    digest = liver_digest(ref)
    return frozenset() if digest is None else frozenset({PatientMark("liver", digest)})


def liver_digest(ref: Ref) -> str | None:
    """The fingerprint of the liver that a case's artifact came from; None of what a dry run does not make."""
    from medad.ct.fingerprint import FINGERPRINT

    if not ref.made:
        return None
    found = json.loads((ref.folder() / "case.json").read_text(encoding="utf-8")).get(FINGERPRINT)
    return None if found is None else str(found)


def leakage(leaks: Sequence[Leak]) -> CaseFailure:
    """One line for all patients that are on both sides."""
    more = len(leaks) - 1
    others = f" (and {more} more patient{'s' * (more > 1)})" if more else ""
    return CaseFailure(PLACE, "leakage", f"{leaks[0].rule}{others}; no patient may be on both sides")


def training_rows(run: Path) -> list[dict[str, Any]]:
    """What a run folder's manifest says of the cases that trained its networks; empty where it does not say."""
    rows = read_manifest(run).get("inputs")
    return [row for row in rows if isinstance(row, dict) and row.get("use") == "train"] if rows else []


def trained_members(rows: Iterable[Mapping[str, Any]]) -> list[MarkedCase]:
    """The cases of `training_rows`; their patients by salted digests, which other machines cannot compare."""
    found = []
    for row in rows:
        digests = {"patient": row.get("patient")} | {name: row["sha256"].get(name) for name in ("scan", "liver")}
        marks = frozenset(PatientMark(kind, str(digests[kind])) for kind in MARK_KINDS if digests[kind])
        found.append(MarkedCase(str(row["case"]), marks))
    return found
