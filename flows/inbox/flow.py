"""The inbox flow: one pass over a folder into which scans are dropped. Each new scan is segmented once, or fails once.

A pass remembers nothing itself: what is done is told by the records in the folder of results (`flows.inbox.results`),
what was computed by the cache. So a pass may be killed anywhere, and two may run at once.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flows.inbox.arrivals import (
    ARRIVING,
    Arrival,
    ChangedError,
    Content,
    Waiting,
    content_of,
    look,
    recalled,
    settle,
    still_holds,
    unchanged,
    vanished,
)
from flows.inbox.config import ALL_FAILED, Inbox, InboxRequest
from flows.inbox.results import IN_MANIFEST, FailedCase, Row, now
from flows.liver import run_folder as liver_folder
from flows.liver import steps
from flows.liver.run_folder import NETS, Models
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
from medad.steps.results import CaseResult

CASE_FILES = ("mask.nii.gz", "probability.nii.gz", "lesions.json")
REPORT_FILES = ("report.html", "report.json", "preview.png")
GONE = "its scan is no longer in the inbox"


def case_id_of(arrival: Arrival, content: Content) -> str:
    """What a case is called: the id of its scan, and what tells one mask of it from another."""
    [scan_id] = case_ids.identify([arrival.scan])
    return f"{scan_id}-{case_ids.keyed(content.digest)[:6]}"


@dataclass(frozen=True)
class Taken:
    """A scan that this pass is to segment."""

    id: str
    arrival: Arrival
    content: Content


@dataclass
class Pass:
    """One look into the inbox, and all that follows."""

    inbox: Inbox
    stages: Stages
    retry: tuple[str, ...]
    waiting: list[Waiting] = field(default_factory=list)
    done: list[Row] = field(default_factory=list)
    failed: list[CaseFailure] = field(default_factory=list)
    busy: int = 0
    """Scans that another pass is at work on."""
    models: Models | None = None
    trouble: CaseFailure | None = None
    """The machine's, or the model's: no use in going on."""

    @property
    def dry(self) -> bool:
        return not self.stages.runner.makes_artifacts

    def run(self) -> None:
        """Raises UserError for what is wrong with the inbox, the model or the folder of results as a whole."""
        folder, settings = self.inbox.folder, self.inbox.settings
        found = look(settings)
        self.waiting += found.waiting
        rows = folder.rows()
        self.inbox.check_retry(rows, self.retry)
        if not self.dry:
            folder.prepare()
        taken = self._wanted(found.arrivals, rows)
        # a few at a time: the first results are there soon, and another pass may take others
        while self.trouble is None and (batch := list(itertools.islice(taken, 2 * worker_count()))):
            self._process(batch, rows)
        if not self.dry:
            self._update()

    def _wanted(self, arrivals: Iterable[Arrival], rows: Mapping[str, Row]) -> Iterator[Taken]:
        """The scans to segment, each read only when its turn comes."""
        labels, settle_s = self.inbox.settings.liver_labels, self.inbox.settings.settle_s
        known = {arrival: recalled(arrival, labels) for arrival in arrivals}
        fresh = [arrival for arrival, content in known.items() if content is None]
        if not self.dry:
            whole, moving = settle(fresh, settle_s)
            self.waiting += moving
            for waits in set(fresh) - set(whole):
                del known[waits]
        seen: set[str] = set()
        ids: set[str] = set()
        for arrival, recall in known.items():
            try:
                content = recall or content_of(arrival, labels, watched_s=0 if self.dry else settle_s)
            except UserError as error:
                self.waiting.append(Waiting(arrival.scan, to_case_failure("", "find", error).rule))
                continue
            except ChangedError:
                self.waiting.append(Waiting(arrival.scan, ARRIVING))
                continue
            if row := rows.get(content.digest):
                ids.add(row.case)
            if content.digest not in seen and self.inbox.wants(content, rows, self.retry):
                case_id = case_id_of(arrival, content)
                self._learn(arrival, case_id)
                terminal.line(f"{case_id} is {arrival.scan}")
                if not self.dry:
                    labels = self.inbox.settings.liver_labels
                    case_ids.register_found(
                        [case_ids.RegisteredCase(case_id.rpartition("-")[0], arrival.scan, arrival.liver, labels)]
                    )
                yield Taken(case_id, arrival, content)
            seen.add(content.digest)
        for case_id in self.retry:
            if case_id not in ids and case_id != ALL_FAILED:
                self.stages.runner.record_failure(CaseFailure(case_id, "find", GONE))

    def _learn(self, arrival: Arrival, case_id: str) -> None:
        """Its paths, and the folders that may be named after a patient, become the id in every log line."""
        root = self.inbox.settings.inbox_folder
        for path in (arrival.scan, arrival.liver):
            for part in (path, *path.parents):
                if part == root:
                    break
                path_filter.learn(part, case_id)

    def _process(self, batch: list[Taken], rows: Mapping[str, Row]) -> None:
        """Segment some scans and publish each as soon as it is done; each is this pass's alone meanwhile."""
        from medad.cohort.datasets import Case

        models = self.models = self.models or self.stages.adopt(self.inbox.settings.model_folder)
        if models is None:
            self.trouble = self.stages.runner.failures[-1]
            return
        with contextlib.ExitStack() as held:
            mine = [taken for taken in batch if self._claim(held, taken, rows)]
            data = self.inbox.liver.test_data
            labels = data.liver_labels or ()
            cases = [Case(each.id, each.arrival.scan, each.arrival.liver, labels, None) for each in mine]
            ready = {each.case.id: each for each in self.stages.prepare_cases(cases, data)}
            sound = {each.id for each in mine if each.id in ready and self._was_read(each, ready[each.id])}
            for taken in mine:
                if taken.id in sound:
                    results = self.stages.segment_and_evaluate([ready[taken.id]], models, data)
                    for result in results:
                        self._publish(taken, result, models)
                self._note_failure(taken, rows)
                if self.trouble is not None:
                    return

    def _claim(self, held: contextlib.ExitStack, taken: Taken, rows: Mapping[str, Row]) -> bool:
        """Hold a scan's lock until the batch is done. False where another pass holds it or has done it meanwhile."""
        if self.dry:
            return True
        content = taken.content.digest
        if not held.enter_context(self.inbox.folder.lock(content)):
            self.busy += 1
            return False
        try:
            self.inbox.folder.check_free(content, taken.id)
        except ConfigError as error:
            self.stages.runner.record_failure(to_case_failure(taken.id, "publish", error))
            return False
        there = self.inbox.folder.find(content, taken.id)
        return there is None or there == rows.get(content)

    def _was_read(self, taken: Taken, ready: ReadyCase) -> bool:
        """Whether the preparation read what was looked at, and not a file that somebody was writing to."""
        if not ready.prepared.made:  # of a dry run
            return True
        inputs = ArtifactStore().sidecar(ready.prepared).parts["inputs"]["case"]
        same = (inputs["scan"], inputs["label"]) == (taken.content.scan, taken.content.liver)
        if same and (unchanged(taken.arrival) or vanished(taken.arrival)):
            return True
        self.waiting.append(Waiting(taken.arrival.scan, ARRIVING))
        return False

    def _publish(self, taken: Taken, result: CaseResult[Ref], models: Models) -> None:
        """The case's report and folder, in one move."""
        runner = self.stages.runner
        call = steps.report(
            self.inbox.liver, [result], (), models.restoration, models.segmentation, installed_versions(), ()
        )
        report = runner.run(taken.id, call)
        if report is None or self.dry or result.segmented is None:
            return
        view = copy.copy(runner)  # of this case alone
        view.records = [record for record in runner.records if record.case_id in {taken.id, *NETS}]
        view.failures = []
        used = [each for each in self.stages.used if each.case_id == taken.id]
        copies = [FileCopy(result.segmented, name, name) for name in CASE_FILES]
        copies += [FileCopy(report, name, name) for name in REPORT_FILES]
        entry = {"case": taken.id, "content": taken.content.digest, "lesions": _lesions(result)}
        run = RunFolder(
            path=self.inbox.folder.case(taken.id),
            settings=self.inbox.liver,
            copies=tuple(copies),
            manifest=lambda: liver_folder.manifest(used[-1:], models) | {IN_MANIFEST: entry},
            seconds=sum(record.seconds for record in view.records if record.case_id == taken.id),
        )
        try:
            publish_run_folder(run, view)
            self.inbox.folder.forget_failure(taken.id)
            row = self._update()[taken.content.digest]
        except UserError as error:
            runner.record_failure(to_case_failure(taken.id, "publish", error))
        except OSError as error:
            where = self.inbox.folder.path
            problem = ConfigError(f"{where}: the result cannot be written ({error.strerror})")
            runner.record_failure(to_case_failure(taken.id, "publish", problem))
        else:
            self.done.append(row)

    def _note_failure(self, taken: Taken, rows: Mapping[str, Row]) -> None:
        """Record why a case failed, unless it is the machine's fault or the file's that went away."""
        runner, content = self.stages.runner, taken.content
        failure = next((each for each in runner.failures if each.case_id == taken.id), None)
        if failure is None or self.dry:
            return
        if failure.of_machine:
            self.trouble = failure
            return
        if failure.bug is None and not still_holds(taken.arrival, content):
            runner.failures = [each for each in runner.failures if each.case_id != taken.id]
            self.waiting.append(Waiting(taken.arrival.scan, "changed or went away while it was read"))
            return
        self.failed.append(failure)
        if (row := rows.get(content.digest)) is not None and row.status == "done":
            return  # the earlier result stays
        record = FailedCase(
            case=taken.id,
            content=content.digest,
            stage=failure.stage,
            rule=failure.rule,
            finished=now(),
            tried_with=self.inbox.tried_with,
        )
        self.inbox.folder.fail(record)
        self._update()

    def _update(self) -> dict[str, Row]:
        return self.inbox.folder.update(self.inbox.settings.name, [each.rule for each in self.waiting])

    def summary(self) -> str:
        """`3 segmented, 1 failed: see failed/; 2 waiting`."""
        failures = len({each.case_id for each in self.stages.runner.failures if each is not self.trouble})
        parts = [f"{len(self.done)} segmented"] * bool(self.done)
        parts += [f"{failures} failed" + (": see failed/" if self.failed else "")] * bool(failures)
        said = ", ".join(parts) or "nothing new"
        said += f"; {self.busy} with another pass" * bool(self.busy)
        waiting = [f"{count} {rule}" for rule, count in sorted(Counter(each.rule for each in self.waiting).items())]
        return said + f"; waiting: {', '.join(waiting)}" * bool(waiting)

    def outcome(self) -> Outcome:
        """For the command line: what was done, in lines and as values."""
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
        stopped = "" if self.trouble is None else f"; stopped: {self.trouble.rule}"
        return Outcome.from_runner(
            self.stages.runner,
            details=details | {"lines": lines},
            useful=self.trouble is None,
            summary=self.summary() + stopped,
        )

    def show(self) -> None:
        """The pass's cases in Prefect's UI; nothing where there were none."""
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
    """What the overview says of a segmentation."""
    assert result.segmented is not None, "a finished case is segmented"
    table = json.loads((result.segmented.folder() / "lesions.json").read_text(encoding="utf-8"))
    return {name: table[name] for name in ("lesion_count", "lesion_ml", "liver_ml")}


def _found(row: Row) -> str:
    if not row.lesions:
        return "no lesion"
    return f"{row.lesions} lesion{'s' * (row.lesions > 1)}, {row.lesion_ml:.1f} mL"


@define_flow("liver-inbox", "inbox {request.label}")
def liver_inbox(request: InboxRequest, refresh: bool = False) -> Outcome:
    """Segment what is new in an inbox. With `refresh`, nothing that is segmented in this pass comes from the cache."""
    inbox = Inbox.open(request)
    one = Pass(inbox, Stages(inbox.liver, refresh=refresh), request.retry)
    one.run()
    one.show()
    return one.outcome()
