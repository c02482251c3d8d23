"""The inbox flow: one pass over a folder that receives scans. Each new scan is segmented once, or fails once.

A pass stores no state itself. The records in the result folder (`flows.inbox.results`) show which scans are done, and
the cache has all computed artifacts. So a pass may be killed at any time, and two passes may run in parallel.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.inbox.arrivals import (
    ARRIVING,
    Arrival,
    ChangedError,
    Content,
    Waiting,
    content_of,
    list_arrivals,
    recall_content,
    still_holds,
    unchanged,
    vanished,
    wait_until_unchanged,
)
from flows.inbox.config import ALL_FAILED, Inbox, InboxRequest
from flows.inbox.results import IN_MANIFEST, FailedCase, Row, utc_now
from flows.liver import run_folder as liver_folder
from flows.liver import steps
from flows.liver.case_pages import add_pages
from flows.liver.dicom_results import FOLDER as DICOM_FOLDER
from flows.liver.dicom_results import write_case
from flows.liver.liver_masks import find_livers, mask_facts, mask_notes
from flows.liver.stages import ReadyCase, Stages
from flows.machine.environment import worker_count
from flows.machine.terminal import terminal
from flows.privacy import case_ids
from flows.privacy.log_filter import path_filter
from flows.runs import ui_artifacts
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.run_folder import FileCopy, RunFolder, installed_versions, publish_run_folder
from flows.runs.runner import to_case_failure
from flows.store.artifacts import ArtifactStore
from flows.store.references import Ref
from medad.base.errors import CaseFailure, ConfigError, UserError
from medad.steps.results import CaseResult, Model
from medad.steps.trained import parts_of

if TYPE_CHECKING:
    from medad.cohort.datasets import Case

CASE_FILES = ("mask.nii.gz", "probability.nii.gz", "lesions.json")
REPORT_FILES = ("report.html", "report.json", "preview.png")
GONE = "its scan is no longer in the inbox"


def case_id_of(arrival: Arrival, content: Content) -> str:
    """Return the id of a case: the id of its scan and a suffix that depends on the mask."""
    [scan_id] = case_ids.identify([arrival.scan])
    return f"{scan_id}-{case_ids.keyed_digest(content.digest)[:6]}"


@dataclass(frozen=True)
class NewScan:
    """A scan to segment in this pass."""

    id: str
    arrival: Arrival
    content: Content


@dataclass
class Pass:
    """One pass over the inbox."""

    inbox: Inbox
    stages: Stages
    retry: tuple[str, ...]
    waiting: list[Waiting] = field(default_factory=list)
    done: list[Row] = field(default_factory=list)
    failed: list[CaseFailure] = field(default_factory=list)
    busy: int = 0
    """Number of scans that another pass is processing."""
    model: Model[Ref] | None = None
    fatal_failure: CaseFailure | None = None
    """Failure of the machine or the model that ends the pass. None: the pass continues."""

    @property
    def dry(self) -> bool:
        return not self.stages.runner.makes_artifacts

    def run(self) -> None:
        """Process all new scans. Raises UserError if the inbox, the model or the result folder cannot be used."""
        folder, settings = self.inbox.folder, self.inbox.settings
        found = list_arrivals(settings)
        self.waiting += found.waiting
        rows = folder.rows()
        self.inbox.check_retry(rows, self.retry)
        if not self.dry:
            folder.prepare()
        scans = self._new_scans(found.arrivals, rows)
        # in small batches, so that first results appear early and a parallel pass can take other scans
        with terminal.stages():
            while self.fatal_failure is None and (batch := list(itertools.islice(scans, 2 * worker_count()))):
                self._process(batch, rows)
        if not self.dry:
            self._update()

    def _new_scans(self, arrivals: Iterable[Arrival], rows: Mapping[str, Row]) -> Iterator[NewScan]:
        """Yield the scans to segment. Each is read only when it is needed."""
        labels, unchanged_s = self.inbox.settings.liver_labels, self.inbox.settings.unchanged_s
        known = {arrival: recall_content(arrival, labels) for arrival in arrivals}
        fresh = [arrival for arrival, content in known.items() if content is None]
        if not self.dry:
            whole, moving = wait_until_unchanged(fresh, unchanged_s)
            self.waiting += moving
            for waiting in set(fresh) - set(whole):
                del known[waiting]
        seen: set[str] = set()
        ids: set[str] = set()
        new = sum(each is None or self.inbox.should_segment(each, rows, self.retry) for each in known.values())
        terminal.announce({steps.PREPARE.name: new})
        for arrival, recall in known.items():
            try:
                content = recall or content_of(arrival, labels, watched_s=0 if self.dry else unchanged_s)
            except UserError as error:
                self.waiting.append(Waiting(arrival.scan, to_case_failure("", "find", error).rule))
                continue
            except ChangedError:
                self.waiting.append(Waiting(arrival.scan, ARRIVING))
                continue
            if row := rows.get(content.digest):
                ids.add(row.case)
            if content.digest not in seen and self.inbox.should_segment(content, rows, self.retry):
                case_id = case_id_of(arrival, content)
                self._learn(arrival, case_id)
                self.stages.name_scan(case_id, arrival.scan)
                if not self.dry:
                    case_ids.register_found(
                        [case_ids.RegisteredCase(case_id.rpartition("-")[0], arrival.scan, arrival.liver, labels)]
                    )
                yield NewScan(case_id, arrival, content)
            seen.add(content.digest)
        for case_id in self.retry:
            if case_id not in ids and case_id != ALL_FAILED:
                self.stages.runner.record_failure(CaseFailure(case_id, "find", GONE))

    def _learn(self, arrival: Arrival, case_id: str) -> None:
        """Let the log filter replace a scan's paths and folders, which may be named after a patient, by its id."""
        root = self.inbox.settings.inbox_folder
        for path in arrival.files:
            for part in (path, *path.parents):
                if part == root:
                    break
                path_filter.learn(part, case_id)

    def _process(self, batch: list[NewScan], rows: Mapping[str, Row]) -> None:
        """Segment a batch of scans, and publish each as soon as it is done. This pass has their locks meanwhile."""
        from medad.cohort.datasets import Case

        model = self.model = self.model or self.stages.adopt(self.inbox.settings.model_folder)
        if model is None:
            self.fatal_failure = self.stages.runner.failures[-1]
            return
        with contextlib.ExitStack() as held:
            mine = [scan for scan in batch if self._claim(held, scan, rows)]
            data = self.inbox.liver.test_data
            labels = data.liver_labels or ()
            cases = [Case(each.id, each.arrival.scan, each.arrival.liver, labels, None) for each in mine]
            settings = self.inbox.settings
            network, trust = settings.liver_model_path, settings.trust_liver_model
            cases = find_livers(self.stages, cases, data, network, trust=trust)
            ready = {each.case.id: each for each in self.stages.prepare_cases(cases, data)}
            sound = {each.id for each in mine if each.id in ready and self._was_read(each, ready[each.id])}
            for scan in mine:
                if scan.id in sound:
                    results = self.stages.segment_and_evaluate([ready[scan.id]], model, data)
                    for result in results:
                        self._publish(scan, ready[scan.id].case, result, model)
                self._note_failure(scan, rows)
                if self.fatal_failure is not None:
                    return

    def _claim(self, held: contextlib.ExitStack, scan: NewScan, rows: Mapping[str, Row]) -> bool:
        """Lock a scan until the batch is done. Returns False if another pass has locked or finished it."""
        if self.dry:
            return True
        content = scan.content.digest
        if not held.enter_context(self.inbox.folder.lock(content)):
            self.busy += 1
            return False
        try:
            self.inbox.folder.check_free(content, scan.id)
        except ConfigError as error:
            self.stages.runner.record_failure(to_case_failure(scan.id, "publish", error))
            return False
        there = self.inbox.folder.find(content, scan.id)
        return there is None or there == rows.get(content)

    def _was_read(self, scan: NewScan, ready: ReadyCase) -> bool:
        """Return whether the preparation read the listed content, and not a file that was still being written."""
        if not ready.prepared.made:  # a dry run
            return True
        store = ArtifactStore()
        inputs = store.sidecar(ready.prepared).parts["inputs"]["case"]
        same = inputs["scan"] == scan.content.scan
        if (mask := self.stages.liver_masks.get(scan.id)) is None:
            same = same and inputs["label"] == scan.content.liver
        else:
            same = same and store.sidecar(mask).parts["inputs"]["scan"] == scan.content.scan
        if same and (unchanged(scan.arrival) or vanished(scan.arrival)):
            return True
        self.waiting.append(Waiting(scan.arrival.scan, ARRIVING))
        return False

    def _publish(self, scan: NewScan, case: Case, result: CaseResult[Ref], model: Model[Ref]) -> None:
        """Write the case's report, and publish the case's folder atomically."""
        runner = self.stages.runner
        [result] = add_pages(runner, self.inbox.liver, self.stages.scans, [result])
        masks = {scan.id: mask} if (mask := self.stages.liver_masks.get(scan.id)) is not None else {}
        call = steps.report(self.inbox.liver, [result], (), model, installed_versions(), mask_notes(masks))
        report = runner.run(scan.id, call)
        if report is None or self.dry or result.segmented is None:
            return
        parts = {part.name for part in parts_of(model)}
        case_runner = copy.copy(runner)  # with the records of this case only
        case_runner.records = [record for record in runner.records if record.case_id in {scan.id, *parts}]
        case_runner.failures = []
        used = [each for each in self.stages.used if each.case_id == scan.id]
        copies = [FileCopy(result.segmented, name, name) for name in CASE_FILES]
        copies += [FileCopy(report, name, name) for name in REPORT_FILES]
        copies += liver_folder.page_copies([result])
        copies += liver_folder.mask_copies(masks)
        entry: dict[str, Any] = {"case": scan.id, "content": scan.content.digest, "lesions": _lesions(result)}
        if mask is not None:
            entry["liver"] = mask_facts(mask)
        run = RunFolder(
            path=self.inbox.folder.case(scan.id),
            settings=self.inbox.liver,
            copies=tuple(copies),
            manifest=lambda: liver_folder.manifest(used[-1:], model) | {IN_MANIFEST: entry},
            seconds=sum(record.seconds for record in case_runner.records if record.case_id == scan.id),
            write_more=lambda folder: entry.update(
                self._write_dicom(folder, case, result, report.folder() / "preview.png")
            ),
        )
        try:
            publish_run_folder(run, case_runner)
            self.inbox.folder.forget_failure(scan.id)
            row = self._update()[scan.content.digest]
        except UserError as error:
            runner.record_failure(to_case_failure(scan.id, "publish", error))
        except OSError as error:
            where = self.inbox.folder.path
            problem = ConfigError(f"{where}: the result cannot be written ({error.strerror})")
            runner.record_failure(to_case_failure(scan.id, "publish", problem))
        else:
            self.done.append(row)

    def _write_dicom(self, folder: Path, case: Case, result: CaseResult[Ref], preview: Path) -> dict[str, str]:
        """Write the DICOM results if the inbox has them. Return entries of the manifest: why there are none."""
        if not self.inbox.settings.dicom:
            return {}
        data, picture = self.inbox.liver.test_data, preview if preview.is_file() else None
        rule = write_case(self.stages.runner, case, result, data, folder / DICOM_FOLDER, picture)
        return {"rule": rule} if rule else {}

    def _note_failure(self, scan: NewScan, rows: Mapping[str, Row]) -> None:
        """Record why a case failed, unless the machine was the cause or the file changed or disappeared."""
        runner, content = self.stages.runner, scan.content
        failure = next((each for each in runner.failures if each.case_id == scan.id), None)
        if failure is None or self.dry:
            return
        if failure.machine_fault:
            self.fatal_failure = failure
            return
        if failure.bug is None and not still_holds(scan.arrival, content):
            runner.failures = [each for each in runner.failures if each.case_id != scan.id]
            self.waiting.append(Waiting(scan.arrival.scan, "changed or disappeared while it was read"))
            return
        self.failed.append(failure)
        if (row := rows.get(content.digest)) is not None and row.status == "done":
            return  # the earlier result is still valid
        record = FailedCase(
            case=scan.id,
            content=content.digest,
            stage=failure.stage,
            rule=failure.rule,
            finished=utc_now(),
            tried_with=self.inbox.tried_with,
        )
        self.inbox.folder.fail(record)
        self._update()

    def _update(self) -> dict[str, Row]:
        return self.inbox.folder.update(self.inbox.settings.name, [each.rule for each in self.waiting])

    def summary(self) -> str:
        """Return one line, such as `3 segmented, 1 failed: see failed/; waiting: 2 still arriving`."""
        failures = len({each.case_id for each in self.stages.runner.failures if each is not self.fatal_failure})
        parts = [f"{len(self.done)} segmented"] * bool(self.done)
        parts += [f"{failures} failed" + (": see failed/" if self.failed else "")] * bool(failures)
        text = ", ".join(parts) or "nothing new"
        text += f"; {self.busy} in another pass" * bool(self.busy)
        waiting = [f"{count} {rule}" for rule, count in sorted(Counter(each.rule for each in self.waiting).items())]
        return text + f"; waiting: {', '.join(waiting)}" * bool(waiting)

    def outcome(self) -> Outcome:
        """Return the outcome for the command line: the results as lines and as values."""
        folder = self.inbox.folder.path
        waiting = Counter(each.rule for each in self.waiting)
        details: dict[str, Any] = {
            "out": str(folder),
            "segmented": [row.case for row in self.done],
            "waiting": [{"rule": rule, "count": count} for rule, count in sorted(waiting.items())],
            "busy": self.busy,
        }
        if self.dry:
            plan = Outcome.from_runner(self.stages.runner)
            return replace(plan, details=plan.details | details)
        lines = [f"{row.case}: {_found(row)}: {folder / row.report}" for row in self.done]
        lines += [f"waiting: {each.rule}: {each.path}" for each in self.waiting]
        lines += [self.summary(), f"overview: {folder / 'inbox.csv'}"]
        stopped = "" if self.fatal_failure is None else f"; stopped: {self.fatal_failure.rule}"
        return Outcome.from_runner(
            self.stages.runner,
            details=details | {"lines": lines},
            useful=self.fatal_failure is None,
            summary=self.summary() + stopped,
        )

    def show(self) -> None:
        """Show the cases of this pass in Prefect's UI, if there are any."""
        rows: list[dict[str, Any]] = [
            {"case": row.case, "status": "done", "lesions": row.lesions, "lesion mL": row.lesion_ml, "rule": ""}
            for row in self.done
        ]
        rows += [
            {"case": f.case_id, "status": f"failed: {f.stage}", "lesions": "", "lesion mL": "", "rule": f.rule}
            for f in self.stages.runner.failures
        ]
        if rows:
            self.stages.runner.show_in_ui(lambda: ui_artifacts.create_table("liver-inbox", "cases of this pass", rows))


def _lesions(result: CaseResult[Ref]) -> dict[str, Any]:
    """Return the figures of a segmentation for the overview."""
    assert result.segmented is not None, "a finished case is segmented"
    table = json.loads((result.segmented.folder() / "lesions.json").read_text(encoding="utf-8"))
    return {name: table[name] for name in ("lesion_count", "lesion_ml", "liver_ml")}


def _found(row: Row) -> str:
    if not row.lesions:
        return "no lesion"
    return f"{row.lesions} lesion{'s' * (row.lesions > 1)}, {row.lesion_ml:.1f} mL"


@define_flow("liver-inbox", "inbox {request.label}")
def liver_inbox(request: InboxRequest, refresh: bool = False) -> Outcome:
    """Segment the new scans of an inbox. With `refresh`, cached results are not used for them."""
    inbox = Inbox.open(request)
    one = Pass(inbox, Stages(inbox.liver, refresh=refresh), request.retry)
    one.run()
    one.show()
    return one.outcome()
