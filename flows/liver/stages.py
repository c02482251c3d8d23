"""The stages of the liver flows, all with one runner."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.liver import case_pages, dicom_results, statistics, steps, training_steps
from flows.liver import run_folder as liver_folder
from flows.liver.run_folder import UsedCase
from flows.liver.series import SeriesChooser
from flows.liver.split import BOTH, SPLIT_LABEL, Split, Use, leakage_failure, salted_member, trained_members
from flows.liver.training import HealthyCase, ModelTraining
from flows.machine.terminal import terminal
from flows.privacy import case_ids
from flows.privacy.log_filter import learn_data, path_filter
from flows.runs import ui_artifacts
from flows.runs.outcome import Outcome, finish_run
from flows.runs.run_folder import RunFolder, installed_versions
from flows.runs.runner import Runner, SubmittedCall, new_runner, to_case_failure
from flows.store.references import Ref
from medad.base.errors import CaseFailure, UserError
from medad.cohort.folds import MarkedCase, find_leaks, patients_of
from medad.config.liver import DatasetSettings, LiverSettings
from medad.steps.results import CaseResult, Model
from medad.steps.trained import TrainedModel, has_model, model_of, parts_of

if TYPE_CHECKING:
    from medad.cohort.datasets import Case, LabelledScan


MAX_NAMED = 8
"""Number of scans that a run shows on the terminal with their pseudonyms. `--verbose` shows all."""


@dataclass(frozen=True)
class ReadyCase:
    """A test case after preprocessing."""

    case: Case
    prepared: Ref
    inserted: Ref | None


def has_ground_truth(ready: ReadyCase) -> bool:
    """Return whether a case can be evaluated: it has a tumour label and a liver mask."""
    return ready.case.tumour_label is not None and ready.case.label is not None


class Stages:
    """The stages of a liver flow. Each takes the results of the one before and skips failed cases."""

    def __init__(
        self, settings: LiverSettings, *, refresh: bool, uses: tuple[Use, ...] = BOTH, runner: Runner | None = None
    ) -> None:
        """Create the stages. If a `runner` is given, its own `refresh` is used."""
        self.settings = settings
        self.uses = uses
        """The data sets that are used. Folds always read both."""
        self.runner = runner or new_runner(settings.machine, refresh=refresh)
        self.used: list[UsedCase] = []
        self.leaked = False
        """Whether a patient was in both training and test data. Then nothing is trained or evaluated."""
        self.trained: list[dict[str, Any]] = []
        """Training cases of an adopted model. Its run's manifest lists them."""
        self.base: Model[Ref] | None = None
        """Adopted model whose weights the training starts from. None: they are random."""
        self.liver_masks: dict[str, Ref] = {}
        """Liver masks that were found automatically, by case."""
        self._split: tuple[Any, Split] | None = None
        self._tested: list[ReadyCase] = []
        self._trained_on: dict[Model[Ref], list[MarkedCase]] = {}
        self.pseudonymous = settings.test_data.pseudonyms or settings.train_data.pseudonyms
        """Whether file names must not appear in outputs."""
        self.dicom_cases: dict[str, Case] = {}
        """Cases whose DICOM results are written, by id."""
        self.names: dict[str, str] = {}
        """Names of the files of cases in the run folder, instead of their pseudonyms."""
        self.scans: dict[str, LabelledScan] = {}
        """Scans of the segmented cases, for their pages."""
        self._named = 0
        """Number of scans that `name_scan` has shown."""

    def with_settings(self, settings: LiverSettings, runner: Runner) -> Stages:
        """Return stages with the same found and prepared cases, but other settings and another runner.

        `settings` may only differ in fields that do not affect the finding and preparing of cases.
        """
        other = copy.copy(self)
        other.settings, other.runner, other.used = settings, runner, []
        return other

    def find(self, data: DatasetSettings, use: str) -> list[Case]:
        """Find the cases of a data set. Problems are added to the failures."""
        from medad.cohort.datasets import find_cases
        from medad.cohort.samples import samples_dir

        learn_data(data, f"{use} data")
        try:
            cases, problems = find_cases(data, samples_dir(), case_ids.identify, choose=SeriesChooser(data.series))
            for case in cases:
                for path in (case.scan, case.label):
                    if path is not None:
                        path_filter.learn(path, case.id)
            self.record_pseudonyms([case for case in cases if case.pseudonymous])
        except UserError as error:
            self.runner.record_failure(to_case_failure(f"{use} data", "find", error))
            return []
        for problem in problems:
            path_filter.learn(Path(problem.path), problem.case_id)
            if problem.pseudonymous:
                self.pseudonymous = True
                self.name_scan(problem.case_id, Path(problem.path))
            self.runner.record_failure(problem)
        return cases

    def record_pseudonyms(self, cases: Sequence[Case]) -> None:
        """Register the scan of each pseudonym, and show it on the user's terminal."""
        self.pseudonymous = self.pseudonymous or bool(cases)
        for case in cases:
            self.name_scan(case.id, case.scan)
        if self.runner.makes_artifacts:  # a dry run writes nothing
            case_ids.register_found(
                case_ids.RegisteredCase(case.id, case.scan, case.label, case.liver_labels) for case in cases
            )

    def name_scan(self, case_id: str, scan: Path) -> None:
        """Show the scan of a pseudonym on the user's terminal. Of many scans the first ones are shown."""
        self._named += 1
        show = terminal.line if self._named <= MAX_NAMED else terminal.detail
        show(f"{case_id} is {scan}")
        if self._named == MAX_NAMED + 1:
            terminal.line("... and more scans; `adflows ids ls --paths` lists all")

    def split(self) -> Split:
        """Return the train/test split. It is empty if a patient is in both training and test data."""
        settings = self.settings
        of = (settings.train_data, settings.test_data, settings.folds)
        if self._split is None or self._split[0] != of:
            self._split = of, self._find_split()
        return self._split[1]

    def _find_split(self) -> Split:
        settings, folds = self.settings, self.settings.folds
        wanted = self.uses if folds is None else BOTH
        found: dict[Use, list[Case]] = {use: [] for use in BOTH}
        for use in wanted:
            found[use] = self.find(settings.train_data if use == "train" else settings.test_data, use)
        if folds is not None and not all(found.values()):
            return Split()  # the fold of only one data set would differ
        try:
            split = Split.of(found["train"], found["test"])
            if folds is not None:
                split = split.fold(folds)
            if self.runner.makes_artifacts:
                split = split.with_salted()
        except UserError as error:
            self.runner.record_failure(to_case_failure(SPLIT_LABEL, "find", error))
            return Split()
        self.runner.notes += split.notes
        if "test" not in self.uses or self._no_leaks(split, split.members("train"), split.members("test")):
            return split
        return Split()

    def _no_leaks(self, split: Split, train: Sequence[MarkedCase], test: Sequence[MarkedCase]) -> bool:
        """Return whether no patient of `test` is in `train` or trained an adopted model. Leaks become failures."""
        leaks = find_leaks(train, test)
        if self.trained:
            salted = [salted_member(member, split.salted.get(("test", member.case_id))) for member in test]
            leaks += find_leaks(trained_members(self.trained), salted)
        if leaks:
            self.leaked = True
            failure = leakage_failure(leaks)
            if failure not in self.runner.failures:
                self.runner.record_failure(failure)
        return not leaks

    def passes_leakage_check(self, train: Sequence[tuple[str, Ref]], test: Sequence[ReadyCase]) -> bool:
        """Return whether no patient is in both `train` and `test`, comparing also the voxels of the prepared livers.

        A leak is added to the failures.
        """
        split = self.split()
        return self._no_leaks_into([split.prepared_member("train", case_id, ref) for case_id, ref in train], test)

    def _no_leaks_into(self, train: Sequence[MarkedCase], test: Sequence[ReadyCase]) -> bool:
        split = self.split()
        tested = [split.prepared_member("test", each.case.id, each.inserted or each.prepared) for each in test]
        return self._no_leaks(split, train, tested)

    def prepare_training(self) -> list[SubmittedCall]:
        """Start the preparation of every training case."""
        data = self.settings.train_data
        return [self._prepare(marked.case, data, training=True) for marked in self.split().train]

    def prepare_test(self) -> list[ReadyCase]:
        """Insert lesions into the test cases if the settings say so, prepare the cases, and wait for the results."""
        self._tested = self.prepare_cases([marked.case for marked in self.split().test], self.settings.test_data)
        return self._tested

    def prepare_cases(self, cases: list[Case], data: DatasetSettings) -> list[ReadyCase]:
        """Prepare the given cases as `prepare_test` does."""
        from medad.cohort.datasets import LabelledScan, case_with_lesions

        inserted: dict[str, Ref] = {}
        if data.insert is not None:
            settings = data.insert
            submitted = [
                self.runner.submit(case.id, steps.insert(LabelledScan.of(case, data), settings)) for case in cases
            ]
            healthy, cases = cases, []
            for case, task in zip(healthy, submitted, strict=True):
                if (ref := task.ref()) is not None:
                    inserted[case.id] = ref
                    cases.append(case_with_lesions(case, ref.folder()))
        tasks = [self._prepare(case, data, training=False) for case in cases]
        ready = [(case, task.ref()) for case, task in zip(cases, tasks, strict=True)]
        found = [ReadyCase(case, ref, inserted.get(case.id)) for case, ref in ready if ref is not None]
        self.used += [self._used("test", each.case.id, each.inserted or each.prepared) for each in found]
        return found

    def _used(self, use: Use, case_id: str, ref: Ref) -> UsedCase:
        salted = {} if self._split is None else self._split[1].salted
        return UsedCase(use, case_id, ref, salted.get((use, case_id)))

    def _prepare(self, case: Case, data: DatasetSettings, *, training: bool) -> SubmittedCall:
        from medad.cohort.datasets import LabelledScan

        # training livers keep vessels and fat, so that both are learned as healthy
        exclude = () if training else self.settings.inference.exclude
        scan = LabelledScan.of(case, data)
        call = steps.prepare(scan, self.settings.preprocess, training=training, exclude=exclude)
        return self.runner.submit(case.id, call)

    def train(self, prepared: list[SubmittedCall]) -> Model[Ref] | None:
        """Train the model by the configured schedule. None if no case can be used or a training failed."""
        found = [(task.label, ref) for task in prepared if (ref := task.ref()) is not None]
        self.used += [self._used("train", case_id, ref) for case_id, ref in found]
        if not self.passes_leakage_check(found, self._tested):
            return None
        if not found:
            if not self.leaked:  # otherwise the leak is the reason
                self.runner.record_failure(CaseFailure("model", "restoration", "no training case could be prepared"))
            return None
        marked = [self.split().prepared_member("train", case_id, ref) for case_id, ref in found]
        cases = [
            HealthyCase(case_id, ref, patient)
            for (case_id, ref), patient in zip(found, patients_of(marked), strict=True)
        ]
        if self.base is not None:
            self._note_known_to_base(marked)
        model = ModelTraining(self.runner, self.settings, self.base).run(cases)
        if model is not None:
            self._trained_on[model] = marked
        return model

    def _note_known_to_base(self, marked: Sequence[MarkedCase]) -> None:
        """Note that the base's training cases train again, if so. A member may then know a case it is left out for."""
        salted = [salted_member(each, self.split().salted.get(("train", each.case_id))) for each in marked]
        if self.settings.train.members > 1 and find_leaks(trained_members(self.trained), salted):
            self.runner.notes.append(
                "Some training cases also trained the model that the training started from, "
                "so the calibrated threshold may be too low."
            )

    def adopt(self, run: Path) -> Model[Ref] | None:
        """Copy the model of an earlier run's folder into the cache. None if that failed."""
        try:
            parts = parts_of(TrainedModel.of_run(run).model)
        except UserError as error:
            self.runner.record_failure(to_case_failure("model", training_steps.MODEL.name, error))
            return None
        found = {part.name: self.runner.run(part.name, training_steps.adopt(part)) for part in parts}
        folders = {name: ref for name, ref in found.items() if ref is not None}
        return model_of(folders) if len(folders) == len(found) else None

    def segment_and_evaluate(
        self, cases: list[ReadyCase], model: Model[Ref], data: DatasetSettings
    ) -> list[CaseResult[Ref]]:
        """Segment the cases, one per device at a time, and evaluate each while the next ones are segmented."""
        from medad.cohort.datasets import LabelledScan

        settings = self.settings
        self.scans |= {ready.case.id: LabelledScan.of(ready.case, data) for ready in cases}
        trained = self._trained_on.get(model, [])
        if "test" in self.uses and (trained or self.trained) and not self._no_leaks_into(trained, cases):
            return []
        waiting: deque[tuple[ReadyCase, SubmittedCall]] = deque()
        under_way: list[tuple[ReadyCase, Ref, SubmittedCall | None]] = []

        def evaluate_next() -> None:
            ready, task = waiting.popleft()
            segmented = task.ref()
            if segmented is None:
                return
            evaluation = None
            if has_ground_truth(ready):
                case = LabelledScan.of(ready.case, data)
                evaluate = steps.evaluate(case, ready.prepared, segmented, settings.evaluation)
                evaluation = self.runner.submit(ready.case.id, evaluate)
            under_way.append((ready, segmented, evaluation))

        labelled = sum(has_ground_truth(each) for each in cases)
        with terminal.stages({steps.SEGMENT.name: len(cases), steps.EVALUATE.name: labelled}):
            for ready in cases:
                if len(waiting) >= self.runner.max_device_calls:
                    evaluate_next()
                segment = steps.segment(
                    ready.prepared, model, settings.inference, settings.postprocess, settings.machine
                )
                waiting.append((ready, self.runner.submit(ready.case.id, segment)))
            while waiting:
                evaluate_next()
            return [
                CaseResult(
                    ready.case.id, ready.prepared, segmented, None if task is None else task.ref(), ready.inserted
                )
                for ready, segmented, task in under_way
            ]

    def report(self, results: list[CaseResult[Ref]], model: Model[Ref] | None, notes: tuple[str, ...]) -> Ref | None:
        """Write report.html and report.json."""
        call = steps.report(
            self.settings,
            results,
            self.runner.failures_for_report(pseudonymous=self.pseudonymous),
            model,
            installed_versions(),
            (*notes, *self.runner.notes),
        )
        return self.runner.run("report", call)

    def finish(
        self,
        out: Path,
        results: list[CaseResult[Ref]],
        model: Model[Ref] | None,
        notes: tuple[str, ...],
        started: float,
        *,
        private: bool = False,
    ) -> Outcome:
        """Write the report, publish the results into the run folder, and show them in Prefect's UI.

        The UI does not show the path of a `private` folder.
        """
        if model is None and has_model(out):
            # an earlier run's networks and masks must not be replaced by an empty report
            out = out.with_name(f"{out.name}.failed")
        results = case_pages.add_pages(self.runner, self.settings, self.scans, results)
        report = self.report(results, model, notes)
        run = RunFolder(
            path=out,
            settings=self.settings,
            copies=(
                *liver_folder.copies(report, results, model, self.names),
                *liver_folder.mask_copies(self.liver_masks, self.names),
            ),
            write_more=lambda folder: self._write_more(folder, results),
            manifest=lambda: liver_folder.manifest(self.used, model, self.trained),
            seconds=time.monotonic() - started,
        )
        useful = bool(results) if self.uses != ("train",) else model is not None
        return finish_run(
            self.runner,
            run,
            ui_artifacts.LIVER,
            private=private,
            useful=useful,
            details=lambda: {"cases": [self._written(out, result) for result in results]},
        )

    def _write_more(self, folder: Path, results: list[CaseResult[Ref]]) -> None:
        """Write the table of all cases, and DICOM results if they are wanted."""
        if not results:
            return
        table = statistics.statistics_table(results, self.names)
        (folder / statistics.FILE).write_text(table, encoding="utf-8", newline="")
        for result in results:
            if (case := self.dicom_cases.get(result.case_id)) is not None:
                name = self.names.get(result.case_id, result.case_id)
                out = folder / dicom_results.FOLDER / name
                dicom_results.write_case(self.runner, case, result, self.settings.test_data, out)

    def _written(self, out: Path, result: CaseResult[Ref]) -> dict[str, Any]:
        """Return a case's figures and the paths of its files, for the command's JSON."""
        name = self.names.get(result.case_id, result.case_id)
        files = dict(liver_folder.CASE_FILES)
        if result.case_id in self.liver_masks:
            files["liver.nii.gz"] = liver_folder.LIVER_MASK_FILE
        paths = {file.partition(".")[0]: str(out / target.format(name)) for file, target in files.items()}
        row = statistics.case_statistics(result, self.names.get(result.case_id, ""))
        return {key: value for key, value in row.items() if value not in ("", None)} | paths
