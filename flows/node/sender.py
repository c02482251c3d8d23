"""Sending of an inbox's DICOM results to a node by C-STORE.

A case is sent until the node has taken all its files. Only then is it marked, in `.inbox/sent` of the result folder. If
the program is killed in between, the same files are sent again. Their UIDs are the same, so the node has each once.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.uid import Comprehensive3DSRStorage, EncapsulatedPDFStorage, SegmentationStorage
from pynetdicom import AE

from flows.liver.dicom_results import FOLDER
from flows.node.tls import tls_context
from medad.base.storage import file_digest, write_bytes
from medad.config.node import SendSettings

Stamp = tuple[tuple[str, int, int], ...]
"""Path, time stamp in ns and size of each file of a case."""
SENT = Path(".inbox", "sent")
FIRST_WAIT_S, LONGEST_WAIT_S = 10.0, 600.0
"""Time after which a case that was not taken is sent again. It doubles with each attempt."""
ANSWER_S = 30.0
"""Longest time that the node may take for an answer."""
_CLASSES = (SegmentationStorage, Comprehensive3DSRStorage, EncapsulatedPDFStorage)
TAKEN = {0x0000, 0xB000, 0xB006, 0xB007}
"""Statuses with which a node has taken a file (PS3.4, table B.2-1)."""


@dataclass
class _Attempts:
    """Attempts to send a case that the node has not taken."""

    files: str
    """Digest of the files."""
    wait_s: float = FIRST_WAIT_S
    due: float = 0.0


@dataclass
class ResultSender:
    """Sender of the DICOM results in a result folder."""

    out: Path
    settings: SendSettings
    say: Callable[[str], None]
    """Receiver of a line about each case that was sent, and about each new problem."""
    clock: Callable[[], float] = time.monotonic
    _attempts: dict[str, _Attempts] = field(default_factory=dict)
    _problem: str = ""
    _looked_ns: int = -1
    """Time stamp of the result folder at the last look. A case that is published changes it."""
    _digests: dict[Stamp, str] = field(default_factory=dict)

    def unsent(self) -> dict[str, list[Path]]:
        """Return the files of each case that the node does not have, or not in this version."""
        found = {}
        for folder in sorted(self.out.glob(f"[!.]*/{FOLDER}")):
            files = sorted(folder.glob("*.dcm"))
            if files and self._mark(folder.parent.name) != self._digest(files):
                found[folder.parent.name] = files
        return found

    def send_due(self) -> None:
        """Send cases that are new, or whose next attempt is due. Cheap if nothing has changed."""
        stamp = self.out.stat().st_mtime_ns if self.out.is_dir() else 0
        if stamp != self._looked_ns or any(each.due <= self.clock() for each in self._attempts.values()):
            self._looked_ns = stamp
            self.send({case: files for case, files in self.unsent().items() if self._is_due(case, files)})

    def send(self, cases: dict[str, list[Path]]) -> bool:
        """Send cases, over one association. Return whether the node took them all."""
        if not cases:
            return True
        problem = self._send_all(cases)
        if problem and problem != self._problem:
            self.say(problem)
        self._problem = problem
        return not problem

    def _is_due(self, case: str, files: list[Path]) -> bool:
        attempts = self._attempts.get(case)
        return attempts is None or attempts.files != self._digest(files) or self.clock() >= attempts.due

    def _send_all(self, cases: dict[str, list[Path]]) -> str:
        """Return the last problem, or an empty text."""
        entity = AE(ae_title=self.settings.own_ae_title)
        for sop_class in _CLASSES:
            entity.add_requested_context(sop_class)
        entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = ANSWER_S
        tls = (
            None if self.settings.tls is None else (tls_context(self.settings.tls, server=False), self.settings.address)
        )
        where = f"{self.settings.ae_title} at {self.settings.address}:{self.settings.port}"
        association = entity.associate(
            self.settings.address, self.settings.port, ae_title=self.settings.ae_title, tls_args=tls
        )
        problem = ""
        try:
            for case, files in cases.items():
                rule = _send_files(association, files)
                if rule:
                    problem = f"{case}: its DICOM results are not sent yet: {where} {rule}"
                    self._put_off(case, files)
                    continue
                self._attempts.pop(case, None)
                write_bytes(self._mark_file(case), self._digest(files).encode())
                self.say(f"{case}: {len(files)} DICOM results sent to {where}")
        finally:
            with contextlib.suppress(RuntimeError):
                association.release() if association.is_established else association.abort()
        return problem

    def _put_off(self, case: str, files: list[Path]) -> None:
        digest = self._digest(files)
        attempts = self._attempts.get(case)
        if attempts is None or attempts.files != digest:
            attempts = self._attempts[case] = _Attempts(digest)
        else:
            attempts.wait_s = min(2 * attempts.wait_s, LONGEST_WAIT_S)
        attempts.due = self.clock() + attempts.wait_s

    def _digest(self, files: list[Path]) -> str:
        """Return a digest over names and contents. Files that have not changed are not read again."""
        stamp = tuple((str(file), (found := file.stat()).st_mtime_ns, found.st_size) for file in files)
        if stamp not in self._digests:
            contents = [f"{file.name} {file_digest(file)}" for file in files]
            self._digests[stamp] = hashlib.sha256("\n".join(contents).encode()).hexdigest()
        return self._digests[stamp]

    def _mark_file(self, case: str) -> Path:
        file = self.out / SENT / case
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _mark(self, case: str) -> str:
        try:
            return (self.out / SENT / case).read_text(encoding="ascii")
        except OSError:
            return ""


def _send_files(association: Any, files: list[Path]) -> str:
    """Send the files of a case. Return why the node has not taken one, or an empty text."""
    for file in files:
        if association.is_rejected:
            return "refuses this program; are both AE titles known there?"
        if not association.is_established:
            return "does not answer"
        try:
            code = association.send_c_store(file).get("Status")
        except ValueError:
            return f"does not take files like {file.name}"
        except (AttributeError, RuntimeError):
            code = None
        if code not in TAKEN:
            ended = "has ended the connection, or does not answer"
            return ended if code is None else f"refused {file.name} with status 0x{code:04X}"
    return ""
