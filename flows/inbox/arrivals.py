"""The scans in an inbox: which are complete, which are still arriving, and the content of each.

This module does not rely on clocks that can be set, or on those of other machines. A scan is complete once it was
*seen* unchanged for `unchanged_s` seconds, by this machine's monotonic clock. Time stamps only show
that a file changed.

Nothing in the inbox is ever written, moved or removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.store.artifacts import ArtifactStore
from flows.store.digests import MIN_UNCHANGED_S
from flows.store.references import canonical_json
from medad.base.errors import InputError
from medad.config.inbox import InboxSettings

TEMPORARY = (".partial", ".part", ".tmp", ".filepart", ".crdownload", "~")
"""Usual endings of files and folders that are still being copied. Hidden files are ignored too."""

ARRIVING = "still arriving"
NO_MASK = "no liver mask yet"

Stamp = tuple[tuple[str, int, int, int, int], ...]
"""Name, size, both time stamps and inode of every file of a scan and its mask."""


@dataclass(frozen=True)
class Arrival:
    """A scan with its liver mask; both exist."""

    scan: Path
    liver: Path
    stamp: Stamp = field(repr=False)
    """State of the files when the inbox was listed."""


@dataclass(frozen=True)
class Waiting:
    """A scan that cannot be read yet, and the reason. The path is only for the terminal."""

    path: Path
    rule: str


@dataclass(frozen=True)
class Content:
    """The content of a scan and its mask, independent of file names."""

    scan: str
    """sha256 of the scan, by `medad.ct.io.source_digest`."""
    liver: str
    liver_labels: tuple[int, ...]

    @property
    def digest(self) -> str:
        """One sha256 over all fields."""
        values = {"scan": self.scan, "liver": self.liver, "liver_labels": sorted(self.liver_labels)}
        return hashlib.sha256(canonical_json(values).encode()).hexdigest()


class ChangedError(Exception):
    """The files of a scan have changed since the inbox was listed."""


@dataclass(frozen=True)
class InboxContents:
    """The scans in an inbox: complete or arriving, and waiting."""

    arrivals: tuple[Arrival, ...]
    waiting: tuple[Waiting, ...]


def list_arrivals(settings: InboxSettings) -> InboxContents:
    """List the scans of an inbox. Opens only headers that refer to another file (.mhd, .nhdr).

    Raises
    ------
    InputError
        The folder is missing or cannot be read.
    """
    from medad.cohort.datasets import find_cases

    root = settings.inbox_folder
    if not root.is_dir():
        raise InputError(root, "the inbox: no such folder")
    try:
        cases, problems = find_cases(settings.data(str(root)), may_be_empty=True)
    except OSError as error:
        raise InputError(root, f"the inbox cannot be read ({error.strerror})") from error
    arrivals, waiting = [], []
    for problem in problems:
        path = Path(problem.path)
        if not _hidden(path, root):
            rule = NO_MASK if problem.rule.startswith("no label") else problem.rule
            waiting.append(Waiting(path, ARRIVING if _temporary(path, root) else rule))
    for case in cases:
        assert case.label is not None  # the settings have a pattern for it
        if _hidden(case.scan, root) or _hidden(case.label, root):
            continue
        if _temporary(case.scan, root) or _temporary(case.label, root):
            waiting.append(Waiting(case.scan, ARRIVING))
            continue
        try:
            arrivals.append(Arrival(case.scan, case.label, _stamp(case.scan, case.label)))
        except InputError as error:
            waiting.append(Waiting(error.path, error.rule))
        except ChangedError:
            waiting.append(Waiting(case.scan, ARRIVING))
    return InboxContents(tuple(arrivals), tuple(waiting))


def wait_until_unchanged(arrivals: Sequence[Arrival], unchanged_s: float) -> tuple[list[Arrival], list[Waiting]]:
    """Wait for `unchanged_s` seconds, and return the scans that did not change and those that did."""
    if not arrivals:
        return [], []
    deadline = time.monotonic() + unchanged_s
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)
    whole: list[Arrival] = []
    waiting: list[Waiting] = []
    for arrival in arrivals:
        if unchanged(arrival):
            whole.append(arrival)
        else:
            waiting.append(Waiting(arrival.scan, ARRIVING))
    return whole, waiting


def unchanged(arrival: Arrival) -> bool:
    """Return whether the files are unchanged since the inbox was listed."""
    try:
        return _stamp(arrival.scan, arrival.liver) == arrival.stamp
    except (InputError, ChangedError):
        return False


def vanished(arrival: Arrival) -> bool:
    """Return whether the scan or its mask was removed."""
    return not arrival.scan.exists() or not arrival.liver.exists()


def seen_whole(path: Path) -> str:
    """Return the digest of a scan or mask that was watched until it was complete.

    The digest is remembered under this function's name. Digests by other commands do not show that a file was complete.
    """
    from medad.ct.io import source_digest, source_files

    return ArtifactStore().digests.get(path, source_digest, source_files(path), watched=True)


def recall_content(arrival: Arrival, liver_labels: Sequence[int]) -> Content | None:
    """Return the remembered content of an arrival. None if these files were not watched and read before."""
    from medad.ct.io import source_files

    memory = ArtifactStore().digests
    try:
        found = [memory.recall(seen_whole, source_files(path)) for path in (arrival.scan, arrival.liver)]
    except (InputError, OSError):
        return None
    scan, liver = found
    return None if scan is None or liver is None else Content(scan, liver, tuple(liver_labels))


def content_of(arrival: Arrival, liver_labels: Sequence[int], *, watched_s: float) -> Content:
    """Read a scan and its mask. Their digests are remembered if they were watched for long enough.

    Raises
    ------
    ChangedError
        The files have changed since the inbox was listed.
    InputError
        One of them cannot be read.
    """
    from medad.ct.io import source_digest, source_files

    memory = ArtifactStore().digests
    watched = watched_s > MIN_UNCHANGED_S
    compute = seen_whole if watched else source_digest
    try:
        if not unchanged(arrival):
            raise ChangedError
        scan, liver = (
            memory.get(path, compute, source_files(path), watched=watched) for path in (arrival.scan, arrival.liver)
        )
    except FileNotFoundError as error:
        raise ChangedError from error
    except OSError as error:
        raise InputError(arrival.scan, f"cannot be read ({error.strerror})") from error
    if not unchanged(arrival):
        raise ChangedError
    return Content(scan, liver, tuple(liver_labels))


def still_holds(arrival: Arrival, content: Content) -> bool:
    """Read the files again, and return whether they still have this content. A lost network share makes reads fail."""
    from medad.ct.io import source_digest

    try:
        return (source_digest(arrival.scan), source_digest(arrival.liver)) == (content.scan, content.liver)
    except (InputError, OSError):
        return False


def _stamp(scan: Path, liver: Path) -> Stamp:
    """Return the state of all files.

    Raises
    ------
    ChangedError
        A file appears or disappears, or it is still being copied.
    InputError
        A file cannot be read.
    """
    from medad.ct.io import source_files

    rows = []
    try:
        for path in (scan, liver):
            for file in {*source_files(path), *(_files_below(path) if path.is_dir() else ())}:
                stat = file.stat()
                if not os.access(file, os.R_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                rows.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    except FileNotFoundError as error:
        raise ChangedError from error
    except OSError as error:
        raise InputError(scan, f"cannot be read ({error.strerror})") from error
    return tuple(sorted(rows))


def _files_below(folder: Path) -> Iterable[Path]:
    """Yield all files of a DICOM folder, including files that are not slices: any of them may still be arriving."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(TEMPORARY):
                raise ChangedError
            yield Path(parent) / name


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _temporary(path: Path, root: Path) -> bool:
    return any(part.lower().endswith(TEMPORARY) for part in path.relative_to(root).parts)
