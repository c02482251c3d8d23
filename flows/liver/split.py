"""The train/test split: which cases train and which are tested, with no patient in both.

A patient is identified by a DICOM series' PatientID, by the settings' `patients` and by the scan's files. Once cases
are prepared, the voxels of the liver identify the patient too. Texts that name a patient are digested immediately, and
their digests never leave the process. A run folder contains only a digest keyed with the machine's secret.
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
from medad.cohort.folds import MARK_KINDS, Leak, MarkedCase, PatientMark, assign_folds, patient_mark, patients_of
from medad.config.liver import FoldSettings

if TYPE_CHECKING:
    from medad.cohort.datasets import Case

Use = Literal["train", "test"]
BOTH: tuple[Use, ...] = ("train", "test")
SPLIT_LABEL = "train and test data"
"""Name of the train/test split in the list of failures."""


@dataclass(frozen=True)
class SplitCase:
    """A case of the split and the marks that identify its patient."""

    case: Case
    marks: frozenset[PatientMark]
    """Marks of the patient. Empty if the file cannot be read; the preparation reports that error."""

    @property
    def member(self) -> MarkedCase:
        return MarkedCase(self.case.id, self.marks)

    def salted(self) -> str | None:
        """Return the patient's digest keyed with this machine's secret, or None if no text names the patient.

        Raises ConfigError.
        """
        named = sorted(mark.digest for mark in self.marks if mark.kind == "patient")
        return case_ids.keyed_digest(f"patient {named[0]}") if named else None


@dataclass(frozen=True)
class Split:
    """The training cases and the test cases."""

    train: tuple[SplitCase, ...] = ()
    test: tuple[SplitCase, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for the report."""
    salted: Mapping[tuple[Use, str], str] = field(default_factory=dict)
    """(use, case id) -> the patient's keyed digest, for cases that have one."""

    @classmethod
    def of(cls, train: Sequence[Case], test: Sequence[Case]) -> Split:
        """Create a split from these cases. Scans whose digest is not remembered are read, several at a time."""
        with ThreadPoolExecutor(worker_count(), thread_name_prefix="patients") as pool:
            marked = list(pool.map(_mark_case, [*train, *test]))
        return cls(tuple(marked[: len(train)]), tuple(marked[len(train) :]))

    def members(self, use: Use) -> list[MarkedCase]:
        return [marked.member for marked in getattr(self, use)]

    def fold(self, folds: FoldSettings) -> Split:
        """Return the split of one fold: patients in the fold are tested, all others train.

        A case whose file cannot be read stays in its data set.

        Raises
        ------
        ConfigError
            The fold leaves no training case or no test case.
        """
        patients = patients_of([*self.members("train"), *self.members("test")])
        of_train, of_test = patients[: len(self.train)], patients[len(self.train) :]
        fold_of = assign_folds(set(of_train) - {""}, set(of_test) - {""}, folds)
        inside = {patient for patient, number in fold_of.items() if number == folds.index}
        train = tuple(marked for marked, patient in zip(self.train, of_train, strict=True) if patient not in inside)
        test = tuple(
            marked for marked, patient in zip(self.test, of_test, strict=True) if not patient or patient in inside
        )
        for use, left, patients in (("train", train, of_train), ("test", test, of_test)):
            if not left:
                raise ConfigError(
                    f"fold {folds.index} of {folds.count} leaves no case in {use}_data; "
                    f"folds.count must be at most its number of patients, {len(set(patients))}"
                )
        counts = [len(set(some) - {""}) for some in (set(of_train) - inside, set(of_test) & inside)]
        note = (
            f"Fold {folds.index} of {folds.count} (counted from 0), patients assigned with seed {folds.seed}: "
            f"{counts[0]} in training, {counts[1]} in testing."
        )
        return Split(train, test, (note,))

    def with_salted(self) -> Split:
        """Return the split with the keyed digests that a run folder may contain. Raises ConfigError."""
        salted = {
            (use, marked.case.id): digest
            for use in BOTH
            for marked in getattr(self, use)
            if (digest := marked.salted()) is not None
        }
        return Split(self.train, self.test, self.notes, salted)

    def prepared_member(self, use: Use, case_id: str, ref: Ref) -> MarkedCase:
        """Return the marks of a prepared (or inserted) case, including one for its liver's voxels."""
        marked = next((each for each in getattr(self, use) if each.case.id == case_id), None)
        marks = frozenset() if marked is None else marked.marks
        return MarkedCase(case_id, marks | _liver_mark(ref))


def salted_member(member: MarkedCase, salted: str | None) -> MarkedCase:
    """Return the case with the marks that a run's manifest has: the patient is identified only by the keyed digest."""
    marks = {mark for mark in member.marks if mark.kind != "patient"}
    return MarkedCase(member.case_id, frozenset(marks | ({PatientMark("patient", salted)} if salted else set())))


def _mark_case(case: Case) -> SplitCase:
    try:
        marks = {PatientMark("scan", path_digest(case.scan))}
    except UserError:
        return SplitCase(case, frozenset())
    if (patient := _patient(case)) is not None:
        marks.add(patient_mark(patient))
    return SplitCase(case, frozenset(marks))


def _patient(case: Case) -> str | None:
    if case.scan.is_dir():
        from medad.ct.dicom_choice import patient_id

        if (found := patient_id(case.scan)) is not None:
            return found
    return case.patient


def _liver_mark(ref: Ref) -> frozenset[PatientMark]:
    digest = liver_digest(ref)
    return frozenset() if digest is None else frozenset({PatientMark("liver", digest)})


def liver_digest(ref: Ref) -> str | None:
    """Return the fingerprint of the liver in a case's artifact. None in a dry run."""
    from medad.ct.fingerprint import FINGERPRINT

    if not ref.made:
        return None
    found = json.loads((ref.folder() / "case.json").read_text(encoding="utf-8")).get(FINGERPRINT)
    return None if found is None else str(found)


def leakage_failure(leaks: Sequence[Leak]) -> CaseFailure:
    """Return one failure for all patients that are in both training and test data."""
    more = len(leaks) - 1
    others = f" (and {more} more patient{'s' * (more > 1)})" if more else ""
    return CaseFailure(SPLIT_LABEL, "leakage", f"{leaks[0].rule}{others}; no patient may be in both")


def training_rows(run: Path) -> list[dict[str, Any]]:
    """Return the training cases listed in a run folder's manifest. Empty if it lists none."""
    rows = read_manifest(run).get("inputs")
    return [row for row in rows if isinstance(row, dict) and row.get("use") == "train"] if rows else []


def trained_members(rows: Iterable[Mapping[str, Any]]) -> list[MarkedCase]:
    """Return the cases of `training_rows` with marks. Keyed digests of patients match only on the same machine."""
    found = []
    for row in rows:
        digests = {"patient": row.get("patient")} | {name: row["sha256"].get(name) for name in ("scan", "liver")}
        marks = frozenset(PatientMark(kind, str(digests[kind])) for kind in MARK_KINDS if digests[kind])
        found.append(MarkedCase(str(row["case"]), marks))
    return found
