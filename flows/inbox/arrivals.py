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
from dataclasses import dataclass, field, replace
from pathlib import Path

from flows.liver.series import SeriesChooser
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
    liver: Path | None
    """Liver mask. None: the liver is to be found automatically."""
    stamp: Stamp = field(repr=False)
    """State of the files when the inbox was listed."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Scan and mask, each a file or a DICOM folder."""
        return (self.scan,) if self.liver is None else (self.scan, self.liver)


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
    liver: str | None
    """sha256 of the mask. None: the liver is found automatically, and the method is not content."""
    liver_labels: tuple[int, ...]
    """Values of liver in the mask. Empty without a mask."""

    @classmethod
    def of(cls, digests: Sequence[str], liver_labels: Sequence[int]) -> Content:
        """Create the content from the digests of the scan and, if there is one, its mask."""
        scan, *masks = digests
        return cls(scan, masks[0], tuple(liver_labels)) if masks else cls(scan, None, ())

    @property
    def files(self) -> tuple[str, ...]:
        """Digests, in the order of `Arrival.files`."""
        return (self.scan,) if self.liver is None else (self.scan, self.liver)

    @property
    def digest(self) -> str:
        """One sha256 over all fields."""
        values = {"scan": self.scan, "liver": self.liver, "liver_labels": sorted(self.liver_labels) or [1]}
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
        choose = SeriesChooser(settings.series, lenient=True)
        cases, problems = find_cases(settings.data(str(root)), choose=choose, may_be_empty=True)
    except OSError as error:
        raise InputError(root, f"the inbox cannot be read ({error.strerror})") from error
    arrivals, waiting = [], []
    for problem in problems:
        path = Path(problem.path)
        if not _hidden(path, root):
            rule = NO_MASK if problem.rule.startswith("no label") else problem.rule
            waiting.append(Waiting(path, ARRIVING if _temporary(path, root) else rule))
    for case in cases:
        arrival = Arrival(case.scan, case.label, ())
        if any(_hidden(path, root) for path in arrival.files):
            continue
        if any(_temporary(path, root) for path in arrival.files):
            waiting.append(Waiting(case.scan, ARRIVING))
            continue
        try:
            arrivals.append(replace(arrival, stamp=_stamp(arrival.files)))
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
        return _stamp(arrival.files) == arrival.stamp
    except (InputError, ChangedError):
        return False


def vanished(arrival: Arrival) -> bool:
    """Return whether the scan or its mask was removed."""
    return not all(path.exists() for path in arrival.files)


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
        found = [memory.recall(path, seen_whole, source_files(path)) for path in arrival.files]
    except (InputError, OSError):
        return None
    known = [digest for digest in found if digest is not None]
    return Content.of(known, liver_labels) if len(known) == len(found) else None


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
        found = [memory.get(path, compute, source_files(path), watched=watched) for path in arrival.files]
    except FileNotFoundError as error:
        raise ChangedError from error
    except OSError as error:
        raise InputError(arrival.scan, f"cannot be read ({error.strerror})") from error
    if not unchanged(arrival):
        raise ChangedError
    return Content.of(found, liver_labels)


def still_holds(arrival: Arrival, content: Content) -> bool:
    """Read the files again, and return whether they still have this content. A lost network share makes reads fail."""
    from medad.ct.io import source_digest

    try:
        return tuple(source_digest(path) for path in arrival.files) == content.files
    except (InputError, OSError):
        return False


def _stamp(paths: Sequence[Path]) -> Stamp:
    """Return the state of all files of a scan and its mask. The scan is the first path.

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
        for path in paths:
            for file in {*source_files(path), *(_files_below(path) if path.is_dir() else ())}:
                stat = file.stat()
                if not os.access(file, os.R_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                rows.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    except FileNotFoundError as error:
        raise ChangedError from error
    except OSError as error:
        raise InputError(paths[0], f"cannot be read ({error.strerror})") from error
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
