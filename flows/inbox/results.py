"""The result folder of an inbox: results and failures of its scans, and an overview of both.

<out>/<case>/manifest.json, report.html ...   One folder per segmented case, written atomically.
<out>/failed/<case>.json                      Why a case failed. Remove the file to try the case again.
<out>/inbox.json, inbox.csv                   The overview of the above.
<out>/.inbox/locks/                           One lock (flock) per scan while it is being segmented.

The case folders and failure records are the only state of an inbox. A scan is found in them by its content. So its file
name, its folder and the name of its case do not affect whether it is new.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import errno
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.store.artifacts import ArtifactStore
from medad.base.errors import ConfigError
from medad.base.manifest import MANIFEST
from medad.base.storage import write_bytes

SCHEMA = "adflows inbox 1"
FAILED = "failed"
OVERVIEW, TABLE = "inbox.json", "inbox.csv"
IN_MANIFEST = "inbox"
"""Key of the manifest's entry that marks the folder of a case."""
COLUMNS = (
    "case", "status", "finished", "lesions", "lesion_ml", "liver_ml", "liver_mask", "sureness", "seconds", "rule",
    "report",
)  # fmt: skip
GIVEN = "given"
"""Method of a liver mask that came with its scan."""


Status = Literal["done", "failed"]


class FailedCase(BaseModel):
    """The content of failed/<case>.json."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_: Literal["adflows inbox failure 1"] = Field("adflows inbox failure 1", alias="schema")
    case: str
    content: str
    stage: str
    rule: str
    finished: str
    """Time of the failure, UTC, ISO 8601."""
    tried_with: str
    """sha256 over the model, the settings and the program. If it has changed, the case is tried again."""


class Row(BaseModel):
    """One case of the overview."""

    model_config = ConfigDict(frozen=True)

    case: str
    status: Status
    finished: str
    lesions: int | None = None
    lesion_ml: float | None = None
    liver_ml: float | None = None
    liver_mask: str
    """Method that found the liver, or `given`. Empty for a failed case."""
    sureness: float | None = None
    """Sureness of an automatic mask, 0..1."""
    seconds: float | None = None
    rule: str = ""
    report: str = ""
    """Path of the report, relative to the folder."""
    content: str
    tried_with: str = ""
    record_ns: int
    """Time stamp of the record that the row was read from, ns."""


KnownRows = Mapping[tuple[str, Status, int], Row]
"""Rows by case, status and time stamp of the record."""


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class OutFolder:
    """The result folder. Safe for parallel passes on one machine or a share with flock, and for kill -9."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks = ArtifactStore(path / ".inbox")  # in the result folder, since passes may use different caches

    def case(self, case_id: str) -> Path:
        return self.path / case_id

    def lock(self, content: str) -> contextlib.AbstractContextManager[bool]:
        """Lock a scan while the `with` block runs. Yields False, without the lock, if another pass has it."""
        return self._locks.lock(content, wait=False)

    def prepare(self) -> None:
        """Create the folder. Raises ConfigError if it cannot be written to."""
        try:
            (self.path / FAILED).mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written to ({error.strerror})") from error

    def rows(self) -> dict[str, Row]:
        """Return all cases by content, from their records. Unchanged rows are taken from the overview."""
        known = {(row.case, row.status, row.record_ns): row for row in self._overview()}
        found: dict[str, Row] = {}
        for case_id in self._failed_ids():
            if (row := self._row(case_id, "failed", known)) is not None:
                found[row.content] = row
        for case_id in self._result_ids():  # a result replaces a failure
            if (row := self._row(case_id, "done", known)) is not None:
                found[row.content] = row
        return found

    def _failed_ids(self) -> list[str]:
        return sorted(path.stem for path in (self.path / FAILED).glob("[!.]*.json"))

    def _result_ids(self) -> list[str]:
        if not self.path.is_dir():
            return []
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())

    def _record(self, case_id: str, status: Status) -> Path:
        return self.path / FAILED / f"{case_id}.json" if status == "failed" else self.case(case_id) / MANIFEST

    def _row(self, case_id: str, status: Status, known: KnownRows | None = None) -> Row | None:
        """Return the row of a case. None if its record is missing, damaged or of another program."""
        record = self._record(case_id, status)
        try:
            stamp = record.stat().st_mtime_ns
            row = (known or {}).get((case_id, status, stamp))
            read = _row_of_failure if status == "failed" else _row_of_result
            return row or read(case_id, record, stamp)
        except (OSError, ValueError, KeyError, TypeError):  # pydantic's errors are ValueErrors
            return None

    def _overview(self) -> list[Row]:
        try:
            return [Row.model_validate(row) for row in json.loads((self.path / OVERVIEW).read_bytes())["cases"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def find(self, content: str, case_id: str) -> Row | None:
        """Read the current record of one case."""
        rows = (self._row(case_id, "done"), self._row(case_id, "failed"))
        return next((row for row in rows if row is not None and row.content == content), None)

    def check_free(self, content: str, case_id: str) -> None:
        """Raise ConfigError if the case's folder contains other data, which must not be overwritten."""
        folder = self.case(case_id)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
        except (OSError, ValueError):  # missing, or a record damaged by a failing disk
            return
        row = self._row(case_id, "done")
        if (row is None or row.content != content) and manifest:
            raise ConfigError(f"{folder}: contains other data than this case's result; move it to another place")

    def fail(self, failure: FailedCase) -> None:
        """Record why a case failed. Raises DiskFullError."""
        with self._locks.lock("overview"):  # since the holder of this lock removes temporary files
            (self.path / FAILED).mkdir(parents=True, exist_ok=True)
            text = failure.model_dump_json(indent=1, by_alias=True)
            write_bytes(self._record(failure.case, "failed"), f"{text}\n".encode())

    def forget_failure(self, case_id: str) -> None:
        """Remove the failure record of a case that now has a result."""
        self._record(case_id, "failed").unlink(missing_ok=True)

    def update(self, name: str, waiting: Iterable[str] = ()) -> dict[str, Row]:
        """Update the overview from the records, and remove files that killed passes left. Returns all cases.

        Unchanged files are not written. `waiting` has the reason of each waiting scan.

        Raises DiskFullError.
        """
        with self._locks.lock("overview"):
            self._sweep()
            rows = self.rows()
            cases = [row.model_dump() for row in sorted(rows.values(), key=lambda row: (row.finished, row.case))]
            count = Counter(row.status for row in rows.values())
            rules = Counter(waiting)
            overview = {
                "schema": SCHEMA,
                "name": name,
                "done": count["done"],
                "failed": count["failed"],
                "waiting": [{"rule": rule, "count": rules[rule]} for rule in sorted(rules)],
                "cases": cases,
            }
            self._write(OVERVIEW, json.dumps(overview, indent=1) + "\n")
            self._write(TABLE, _csv(cases))
        return rows

    def _write(self, name: str, text: str) -> None:
        file = self.path / name
        with contextlib.suppress(OSError):
            if file.read_bytes() == text.encode():
                return
        write_bytes(file, text.encode())

    def _sweep(self) -> None:
        """Remove temporary files and locks of killed passes, and failure records of cases that now have a result."""
        for folder in (self.path, self.path / FAILED):
            for leftover in folder.glob(".tmp-*"):
                leftover.unlink(missing_ok=True)
        for lock in (self._locks.root / "locks").glob("*.lock"):
            if lock.stem != "overview":
                with self._locks.lock(lock.stem, wait=False):  # releasing a lock removes its file
                    pass
        for case_id in self._failed_ids():
            failure, result = self._row(case_id, "failed"), self._row(case_id, "done")
            if failure is not None and result is not None and failure.content == result.content:
                self.forget_failure(case_id)


def _row_of_failure(case_id: str, record: Path, stamp: int) -> Row:
    failure = FailedCase.model_validate_json(record.read_bytes())
    if failure.case != case_id:
        raise ValueError(record)
    values = failure.model_dump(include={"case", "content", "rule", "finished", "tried_with"})
    return Row(status="failed", liver_mask="", record_ns=stamp, **values)


def _row_of_result(case_id: str, record: Path, stamp: int) -> Row:
    manifest: dict[str, Any] = json.loads(record.read_bytes())
    ours = manifest[IN_MANIFEST]
    if ours["case"] != case_id:
        raise ValueError(record)
    lesions = ours["lesions"]
    mask = ours.get("liver", {"method": GIVEN, "sureness": None})
    return Row(
        case=case_id,
        status="done",
        finished=manifest["created"],
        lesions=lesions["lesion_count"],
        lesion_ml=round(lesions["lesion_ml"], 3),
        liver_ml=round(lesions["liver_ml"], 3),
        liver_mask=mask["method"],
        sureness=mask["sureness"],
        seconds=manifest["seconds"],
        rule=ours.get("rule", ""),
        report=f"{case_id}/report.html",
        content=ours["content"],
        record_ns=stamp,
    )


def _csv(cases: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cases)
    return text.getvalue()
