"""The register of pseudonyms: it maps each id to a scan, in a file that only its owner can read.

    <private>/case-ids.json    id -> scan, liver mask, label values
    <private>/case-ids.key     the secret that ids are computed with
    <private>/case-ids.lock    a lock (flock), held while one of these files is written

`<private>` is $ADFLOWS_PRIVATE, else $XDG_DATA_HOME/adflows/private, else ~/.local/share/adflows/private.

An id is an HMAC of the scan's content, keyed with the secret. So a scan has the same id in every flow on this machine,
independent of its file name. Without the secret nobody can compute an id from a name or a copy of the scan, or get the
scan from its id. A plain digest of the content would let anyone with a copy of the scan find the patient's results.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flows.machine.environment import worker_count
from medad.base.errors import ConfigError, UserError
from medad.base.storage import atomic_path

ID_PATTERN = r"^[a-z0-9][a-z0-9-]{2,63}$"
"""Pattern of an id, for forms."""
REGISTER, KEY, LOCK = "case-ids.json", "case-ids.key", "case-ids.lock"
SCHEMA = "adflows case ids 1"
_ID_CHARACTERS = 12
_KEY_BYTES = 32


@dataclass(frozen=True)
class RegisteredCase:
    """A scan with its id, liver mask and label values."""

    id: str
    scan: Path
    liver: Path | None
    liver_labels: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    """One case in the file. A plain dataclass, since a path on disk need not be valid text, which pydantic requires."""

    scan: str
    liver: str | None
    liver_labels: tuple[int, ...]
    content: str
    """The full HMAC of the scan's content. The id is its beginning."""
    added: str
    """UTC, ISO 8601."""

    def case(self, case_id: str) -> RegisteredCase:
        liver = None if self.liver is None else Path(self.liver)
        return RegisteredCase(case_id, Path(self.scan), liver, self.liver_labels)

    @classmethod
    def of(cls, values: Any) -> _Entry:
        """Create an entry from JSON values. Raises KeyError, TypeError, ValueError."""
        liver = values["liver"]
        return cls(
            scan=str(values["scan"]),
            liver=None if liver is None else str(liver),
            liver_labels=tuple(int(value) for value in values["liver_labels"]),
            content=str(values["content"]),
            added=str(values["added"]),
        )


def private_folder() -> Path:
    """Return the folder of the register, which need not exist yet."""
    if explicit := os.environ.get("ADFLOWS_PRIVATE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return (Path(base).expanduser() / "adflows" / "private").absolute()


def identify(scans: Sequence[Path]) -> list[str]:
    """Return the id of each scan, computed from its content. Registers nothing.

    Files whose digest is not remembered are read, several at a time. A scan that cannot be read gets an id from its
    path, also keyed with the secret. Its later failure is listed under this id.
    """
    with ThreadPoolExecutor(worker_count(), thread_name_prefix="identify") as pool:
        digests = list(pool.map(_digest, scans))
    secret = _secret()
    found = []
    for scan, digest in zip(scans, digests, strict=True):
        text = f"path {scan.absolute()}" if digest is None else _scan_text(digest)
        found.append(_id_of(_keyed(secret, text)))
    return found


def keyed_digest(text: str) -> str:
    """Return a digest of `text` keyed with this machine's secret, hex. No other machine can compute it."""
    return _keyed(_secret(), text)


def register(scan: Path, liver: Path | None = None, liver_labels: tuple[int, ...] = ()) -> RegisteredCase:
    """Register a scan, and a liver mask on its grid.

    If the id is already registered, its path is replaced, and its mask if one is given.

    Raises
    ------
    InputError
        A file cannot be read.
    ConfigError
        The register is not private, or it is damaged.
    """
    from flows.store.digests import path_digest

    scan, liver = scan.absolute(), None if liver is None else liver.absolute()
    content = _keyed(_secret(), _scan_text(path_digest(scan)))
    if liver is not None:
        path_digest(liver)  # checks that it exists and can be read
    case_id = _id_of(content)
    with _rewriting() as cases:
        known = _known_entry(case_id, content, cases)
        if liver is None and known is not None and known.liver is not None:
            liver, liver_labels = Path(known.liver), known.liver_labels
        cases[case_id] = _entry(scan, liver, liver_labels, content)
        return cases[case_id].case(case_id)


def register_found(found: Iterable[RegisteredCase]) -> None:
    """Register cases that a flow found, with the ids that `identify` returned. Unreadable scans are left out.

    A mask that is already registered for an id is not replaced, since a user may have chosen it.
    """
    found = list(found)
    if not found:
        return
    with ThreadPoolExecutor(worker_count(), thread_name_prefix="identify") as pool:
        digests = list(pool.map(_digest, [case.scan for case in found]))
    secret = _secret()
    known = _read()
    entries = {}
    for case, digest in zip(found, digests, strict=True):
        if digest is None:
            continue
        content = _keyed(secret, _scan_text(digest))
        before = _known_entry(case.id, content, known)
        liver, labels = case.liver, case.liver_labels
        if before is not None and before.liver is not None:
            liver, labels = Path(before.liver), before.liver_labels
        entry = _entry(case.scan.absolute(), None if liver is None else liver.absolute(), labels, content)
        if before is None or replace(before, added=entry.added) != entry:
            entries[case.id] = entry
    if entries:  # a nightly run without new scans does not write the file
        with _rewriting() as cases:
            cases.update(entries)


def resolve(case_id: str) -> RegisteredCase:
    """Return the case of an id, and check that its scan is unchanged.

    Raises
    ------
    ConfigError
        The id is not registered, or its scan is missing or changed. No message contains a path: Prefect may store it.
    """
    if not re.fullmatch(ID_PATTERN, case_id):
        # the value may be a path or a name, so the message does not repeat it
        raise ConfigError("not a case id: expected an id from `adflows ids ls`, such as ct-0123456789ab")
    entry = _read().get(case_id)
    if entry is None:
        raise ConfigError(f"{case_id}: this machine's register has no such case; `adflows ids add SCAN` adds one")
    case = entry.case(case_id)
    digest = _digest(case.scan)
    if digest is None:
        raise ConfigError(f"{case_id}: its scan can no longer be read; `adflows ids which {case_id}` shows its path")
    if _keyed(_secret(), _scan_text(digest)) != entry.content:
        raise ConfigError(f"{case_id}: the scan at its path has changed; `adflows ids add SCAN` registers the new scan")
    return case


def look_up(case_id: str) -> RegisteredCase:
    """Return the case of an id without checking its files, for the owner's terminal. Raises ConfigError."""
    entry = _read().get(case_id)
    if entry is None:
        raise ConfigError(f"{case_id}: this machine's register has no such case")
    return entry.case(case_id)


def registered() -> list[RegisteredCase]:
    """Return all cases, in the order of their ids. Raises ConfigError."""
    return [entry.case(case_id) for case_id, entry in sorted(_read().items())]


def registered_count() -> int | None:
    """Return the number of registered cases, or None without a register. Creates nothing. Raises ConfigError."""
    try:
        private_folder().lstat()
    except FileNotFoundError:
        return None
    except OSError:
        pass  # _folder raises an error for it
    folder = _folder()
    if not (folder / REGISTER).exists() and not (folder / KEY).exists():
        return None
    _secret()
    return len(_read())


def forget(case_id: str) -> None:
    """Remove an id from the register. If the scan is registered again, it gets the same id. Raises ConfigError."""
    with _rewriting() as cases:
        if cases.pop(case_id, None) is None:
            raise ConfigError(f"{case_id}: this machine's register has no such case")


def _digest(path: Path) -> str | None:
    from flows.store.digests import path_digest

    try:
        return path_digest(path)
    except UserError:
        return None


def _scan_text(digest: str) -> str:
    return f"scan {digest}"


def _keyed(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(errors="surrogateescape"), "sha256").hexdigest()


def _id_of(content: str) -> str:
    return f"ct-{content[:_ID_CHARACTERS]}"


def _entry(scan: Path, liver: Path | None, liver_labels: tuple[int, ...], content: str) -> _Entry:
    return _Entry(
        scan=str(scan),
        liver=None if liver is None else str(liver),
        liver_labels=tuple(liver_labels),
        content=content,
        added=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _known_entry(case_id: str, content: str, cases: dict[str, _Entry]) -> _Entry | None:
    """Return the entry of this id, or None. Raises ConfigError if it belongs to another scan."""
    entry = cases.get(case_id)
    if entry is not None and entry.content != content:
        raise ConfigError(
            f"{private_folder() / REGISTER}: {case_id} belongs to another scan; was {KEY} replaced? Restore both from "
            "one backup, or remove both"
        )
    return entry


def _refuse_unless_private(path: Path, found: os.stat_result, *, mode: str) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path}: belongs to another user; it has names of patients, so only its owner may use it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{path}: other users can read it (mode {stat.S_IMODE(found.st_mode):03o}), but it has names of patients: "
            f"chmod {mode} it"
        )


def _folder() -> Path:
    """Return the private folder, and create it if needed. Raises ConfigError if it is not private."""
    folder = private_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be used for the register of case ids ({error.strerror})") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder}: not a folder; the register of case ids must be in a folder")
    _refuse_unless_private(folder, found, mode="700")
    return folder


def _private_text(path: Path) -> str | None:
    """Return the content of a private file, or None if it does not exist. Raises ConfigError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    with os.fdopen(descriptor, "rb") as file:
        _refuse_unless_private(path, os.fstat(descriptor), mode="600")
        try:
            return file.read().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read; restore it from a backup") from error


def _write_private(path: Path, text: str) -> None:
    for leftover in path.parent.glob(f".tmp-*-{path.name}"):  # left by a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """Hold the register's lock and yield its folder. The kernel frees it if its holder dies. Raises ConfigError."""
    folder = _folder()
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{folder / LOCK}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def _secret() -> bytes:
    """Return the secret, which is created at first use. Raises ConfigError."""
    text = _private_text(_folder() / KEY)
    if text is None:
        with _locked() as folder:
            text = _private_text(folder / KEY)
            if text is None:
                if (folder / REGISTER).exists():
                    raise ConfigError(
                        f"{folder / KEY}: missing, but the ids in {REGISTER} need it; restore it from a backup"
                    )
                text = secrets.token_hex(_KEY_BYTES) + "\n"
                _write_private(folder / KEY, text)
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    if len(secret) != _KEY_BYTES:
        raise ConfigError(f"{private_folder() / KEY}: damaged; restore it from a backup")
    return secret


def _read() -> dict[str, _Entry]:
    """Read all cases by id; empty without a register. Needs no lock, because writers replace the file atomically."""
    path = _folder() / REGISTER
    text = _private_text(path)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        schema = values["schema"]
        cases = (
            {str(case_id): _Entry.of(entry) for case_id, entry in values["cases"].items()} if schema == SCHEMA else {}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: damaged; restore it from a backup") from error
    if schema != SCHEMA:
        raise ConfigError(f"{path}: written by another version of adflows")
    return cases


@contextlib.contextmanager
def _rewriting() -> Iterator[dict[str, _Entry]]:
    """Yield the cases for changes, and write them when the block ends. Raises ConfigError."""
    with _locked() as folder:
        cases = _read()
        yield cases
        values = {case_id: asdict(entry) for case_id, entry in sorted(cases.items())}
        # JSON escapes, since names on disk need not be valid UTF-8
        _write_private(folder / REGISTER, json.dumps({"schema": SCHEMA, "cases": values}, indent=1) + "\n")
