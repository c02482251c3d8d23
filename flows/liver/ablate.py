"""The flow liver-ablate: variants of one liver configuration, each trained and evaluated over seeds, in one report.

Results that variants share (preparation, trainings with equal settings) are computed once. Variants and seeds run in
parallel if there are several devices. A variant that fails is listed, and the others continue. The report is always
written.
"""

from __future__ import annotations

import contextvars
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from flows.liver import run_folder as liver_folder
from flows.liver import steps, training_steps
from flows.liver.run_folder import UsedCase
from flows.liver.stages import ReadyCase, Stages, has_ground_truth
from flows.liver.training_steps import TrainingCase
from flows.machine.stopping import stopping
from flows.machine.terminal import terminal
from flows.runs import ui_artifacts
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome, finish_run
from flows.runs.run_folder import FileCopy, RunFolder, copies_of, installed_versions
from flows.runs.runner import GroupRunner, SharedCall, SubmittedCall, new_runner, to_case_failure
from flows.store.references import Ref, canonical_json
from medad.base.errors import CaseFailure, UserError
from medad.config.ablation import BASELINE, CURVE, ROWS, AblationSettings, Variant
from medad.config.liver import LiverSettings
from medad.steps.results import AblationResults, CaseResult, EmbeddingResult, Model, SnapshotResult, VariantResult

REPORT_FILES = (
    *("report.html", "report.json", "preview.png"),
    *("summary.csv", "seeds.csv", "cases.csv", "paired.csv", "curve.csv", "table.tex"),
)
EvaluatedCase = CaseResult[Ref]
"""One evaluated test case."""
FIELDS_WITHOUT_EFFECT_ON_DATA = frozenset(
    {
        *("name", "seed", "synthesis", "restoration", "segmentation", "classifier", "train"),
        *("inference", "postprocess", "evaluation"),
    }
)
"""Settings that do not affect the finding and preparing of cases. Of `inference`, `exclude` does."""
MEMBER_NOTE = "Pictures of restorations and of features show member 1 of models with several members."
NO_GROUND_TRUTH = "no test case has a tumour label to evaluate against"
_SNAPSHOT = re.compile(r"snapshot-(\d+)\.safetensors")


@dataclass(frozen=True)
class Data:
    """Found and prepared cases, shared by all variants with the same data settings."""

    stages: Stages
    training: list[SubmittedCall]
    test: list[ReadyCase]

    @property
    def trained_on(self) -> tuple[Ref, ...]:
        return tuple(ref for task in self.training if (ref := task.ref()) is not None)


@dataclass
class Trained:
    """One variant and seed: its model, its results, and its results per snapshot of phase two."""

    variant: Variant
    seed: int
    model: Model[Ref] | None = None
    cases: tuple[EvaluatedCase, ...] = ()
    snapshots: dict[int, tuple[EvaluatedCase, ...]] = field(default_factory=dict)


class AblationStages:
    """The stages of an ablation. Each takes the results of the one before and skips what failed."""

    def __init__(self, settings: AblationSettings, *, refresh: bool) -> None:
        self.settings = settings
        self.runner = new_runner(settings.machine, refresh=refresh)
        self.variants = settings.variants()
        self.base = settings.base_settings()
        self.used: list[UsedCase] = []
        self.inserted: set[str] = set()
        self.pseudonymous = False
        self._data: dict[str, Data | None] = {}

    def runner_of(self, one: Trained, part: str = "") -> GroupRunner:
        """Return the runner with labels for one variant and seed, or for a part of them."""
        return self.runner.for_group(one.variant.id, f"seed {one.seed}{part}")

    def prepare(self) -> None:
        """Find and prepare the cases of all variants, each case once."""
        wanted = [variant.settings for variant in self.variants]
        wanted += [self.base] if self.has_baseline else []
        for settings in {_data_key(one): one for one in reversed(wanted)}.values():
            self._data[_data_key(settings)] = self._prepare(settings)

    @property
    def has_baseline(self) -> bool:
        return self.settings.baseline and self.settings.is_selected(BASELINE)

    def data(self, settings: LiverSettings) -> Data | None:
        """Return the cases for these settings. None if the data sets cannot be used; the failures say why."""
        return self._data[_data_key(settings)]

    def _prepare(self, settings: LiverSettings) -> Data | None:
        stages = Stages(settings, refresh=self.runner.refresh, runner=self.runner)
        try:
            training: list[SubmittedCall] = [SharedCall(task) for task in stages.prepare_training()]
            test = stages.prepare_test()
        except UserError as error:
            self.runner.record_failure(to_case_failure("data", "prepare", error))
            return None
        found = [(task.label, ref) for task in training if (ref := task.ref()) is not None]
        self.pseudonymous = self.pseudonymous or stages.pseudonymous
        self.used += stages.used
        self.inserted |= {ready.case.id for ready in test if ready.inserted is not None}
        if test and not any(has_ground_truth(ready) for ready in test):
            self.runner.record_failure(CaseFailure("test data", "find", NO_GROUND_TRUTH))
        if stages.leaked or not stages.passes_leakage_check(found, test):  # noted once here instead of once per row
            return None
        return Data(stages, training, test)

    def train(self) -> list[Trained]:
        """Train, segment and evaluate every variant with every seed."""
        todo = [Trained(variant, seed) for seed in self.settings.seeds for variant in self.variants]
        # one more than devices: the next row trains while the cases of this one are evaluated
        at_a_time = min(len(todo), self.runner.max_device_calls + 1) if self.runner.makes_artifacts else 1
        _map_in_threads(self._train_and_record_errors, todo, at_a_time)
        return todo

    def _train_and_record_errors(self, one: Trained) -> None:
        try:
            self._train(one)
        except Exception as error:
            if stopping.is_set():
                raise
            self.runner_of(one).record_failure(to_case_failure("all of it", "ablate", error))

    def _train(self, one: Trained) -> None:
        data = self.data(one.variant.settings)
        if data is None:
            return
        settings = one.variant.settings.model_copy(update={"seed": one.seed})
        stages = data.stages.with_settings(settings, self.runner_of(one))
        one.model = stages.train(list(data.training))
        self.used += stages.used
        if one.model is None:
            return
        if one.variant.group != CURVE:
            one.cases = _evaluate(stages, data, one.model)
            return
        [member] = one.model.members  # settings with snapshots have one
        for epochs, name in _snapshots(member.segmentation):
            at = stages.with_settings(stages.settings, self.runner_of(one, f", {epochs} epochs"))
            one.snapshots[epochs] = _evaluate(at, data, Model((replace(member, snapshot=name),)))

    def evaluate_baseline(self) -> tuple[EvaluatedCase, ...]:
        """Evaluate each test case of the base settings by only its smoothed HU."""
        from medad.cohort.datasets import LabelledScan

        data = self.data(self.base) if self.has_baseline else None
        if data is None:
            return ()
        base, sigma_mm = self.base, self.settings.baseline_sigma_mm
        small = base.postprocess.min_lesion_mm3
        tasks = []
        for ready in filter(has_ground_truth, data.test):
            case = LabelledScan.of(ready.case, base.test_data)
            call = steps.baseline(case, ready.prepared, sigma_mm, small, base.evaluation)
            tasks.append((ready, self.runner.submit(ready.case.id, call)))
        found = [(ready, task.ref()) for ready, task in tasks]
        return tuple(
            EvaluatedCase(ready.case.id, ready.prepared, evaluated=ref) for ready, ref in found if ref is not None
        )

    def _training_cases(self, one: Trained, data: Data) -> list[TrainingCase]:
        """Return the training cases of a row for pictures of its pseudo anomalies, with copies if these use them."""
        synthesis = one.variant.settings.synthesis
        if synthesis.kind != "solid_lesions":
            return [TrainingCase(prepared) for prepared in data.trained_on]
        runner = self.runner_of(one)
        calls = [training_steps.lesion_copies(each, synthesis.solid, one.seed) for each in data.trained_on]
        copies = [runner.run("examples", call) for call in calls]
        pairs = zip(data.trained_on, copies, strict=True)
        return [TrainingCase(prepared, ref) for prepared, ref in pairs if ref is not None]

    def examples(self, trained: Iterable[Trained]) -> dict[str, Ref]:
        """Return, for each row, synthesised slices and their restorations by the network of the first seed."""
        if not self.settings.panels:
            return {}
        tasks = []
        for one in trained:
            if one.variant.group != ROWS or one.model is None or one.seed != self.settings.seeds[0]:
                continue
            data = self.data(one.variant.settings)
            assert data is not None, "it was trained on"
            settings = one.variant.settings
            call = steps.examples(
                self._training_cases(one, data),
                one.model.members[0].restoration,
                settings.synthesis,
                one.seed,
                self.settings.panels,
                settings.inference.batch_size,
                self.settings.machine,
            )
            tasks.append((one.variant.name, self.runner_of(one).submit("examples", call)))
        found = [(name, task.ref()) for name, task in tasks]
        return {name: ref for name, ref in found if ref is not None}

    def embed(self, trained: Iterable[Trained]) -> EmbeddingResult[Ref] | None:
        """Return features of real, healthy and synthesised slices from the main row's restoration network."""
        main, seed = self.settings.main_row, self.settings.seeds[0]
        chosen = next((t for t in trained if (t.variant.group, t.variant.name, t.seed) == (ROWS, main, seed)), None)
        if not self.settings.embedding or chosen is None or chosen.model is None or not chosen.cases:
            return None
        data = self.data(chosen.variant.settings)
        assert data is not None, "it was trained on"
        settings = chosen.variant.settings
        call = steps.embedding(
            self._training_cases(chosen, data),
            [(case.prepared, case.evaluated) for case in chosen.cases if case.evaluated is not None],
            chosen.model.members[0].restoration,
            settings.synthesis,
            seed,
            settings.inference.batch_size,
            self.settings.machine,
        )
        ref = self.runner_of(chosen).run("embedding", call)
        return None if ref is None else EmbeddingResult(chosen.variant.name, seed, ref)

    def report(self, trained: Sequence[Trained], baseline: tuple[EvaluatedCase, ...]) -> Ref | None:
        """Write the report of all results."""
        examples = self.examples(trained)
        results = AblationResults(
            variants=tuple(
                VariantResult(
                    variant.group,
                    variant.name,
                    {t.seed: t.cases for t in trained if t.variant is variant and t.cases},
                    examples.get(variant.name) if variant.group == ROWS else None,
                )
                for variant in self.variants
                if variant.group != CURVE
            ),
            snapshots=_snapshot_rows(trained),
            baseline=baseline,
            embedding=self.embed(trained),
            inserted=tuple(sorted(self.inserted)),
            failures=self.runner.failures_for_report(pseudonymous=self.pseudonymous),
        )
        several = any(one.model is not None and len(one.model.members) > 1 for one in trained)
        notes = tuple(dict.fromkeys([*self.runner.notes, *([MEMBER_NOTE] if several else [])]))
        return self.runner.run("report", steps.ablation_report(self.settings, results, installed_versions(), notes))

    def finish(self, out: Path, report: Ref | None, trained: Sequence[Trained], started: float) -> Outcome:
        """Publish the results into the run folder and show them in Prefect's UI."""
        used = {(one.use, one.case_id, one.ref.digest): one for one in self.used}
        run = RunFolder(
            path=out,
            settings=self.settings,
            copies=self._copies(report),
            manifest=lambda: {"inputs": liver_folder.manifest(used.values(), None)["inputs"]},
            seconds=time.monotonic() - started,
        )
        useful = any(one.cases or one.snapshots for one in trained)
        outcome = finish_run(
            self.runner, run, ui_artifacts.ABLATION, useful=useful, details=lambda: {"rows": _row_figures(out)}
        )
        return replace(outcome, headline={})

    def _copies(self, report: Ref | None) -> tuple[FileCopy, ...]:
        names = [f"table_{sweep.name}.tex" for sweep in self.settings.selected_sweeps]
        return tuple(copies_of(report, *REPORT_FILES, *names))


def _data_key(settings: LiverSettings) -> str:
    # with the real folders: this text never leaves the process
    values = settings.model_dump(exclude=set(FIELDS_WITHOUT_EFFECT_ON_DATA))
    return canonical_json(to_jsonable_python(values | {"exclude": settings.inference.exclude}))


def _evaluate(stages: Stages, data: Data, model: Model[Ref]) -> tuple[EvaluatedCase, ...]:
    results = stages.segment_and_evaluate(data.test, model, stages.settings.test_data)
    return tuple(one for one in results if one.evaluated is not None)


def _snapshots(segmentation: Ref) -> list[tuple[int, str]]:
    """Return the epochs and file name of each snapshot of phase two. Empty in a dry run."""
    if not segmentation.made:
        return []
    found = [(_SNAPSHOT.fullmatch(path.name), path.name) for path in segmentation.folder().iterdir()]
    return sorted((int(match[1]), name) for match, name in found if match is not None)


def _snapshot_rows(trained: Sequence[Trained]) -> tuple[SnapshotResult[Ref], ...]:
    lengths = sorted({epochs for one in trained for epochs in one.snapshots})
    return tuple(
        SnapshotResult(epochs, {t.seed: t.snapshots[epochs] for t in trained if t.snapshots.get(epochs)})
        for epochs in lengths
        if any(t.snapshots.get(epochs) for t in trained)
    )


def _map_in_threads(work: Callable[[Trained], None], todo: Sequence[Trained], at_a_time: int) -> None:
    """Call `work` for all items, `at_a_time` in parallel. Each thread runs in the flow's context."""
    if at_a_time <= 1:
        for one in todo:
            work(one)
        return
    with ThreadPoolExecutor(at_a_time, thread_name_prefix="row") as pool:
        futures = [pool.submit(contextvars.copy_context().run, work, one) for one in todo]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C or a cancellation: the pool waits for running threads, so these must end
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _row_figures(folder: Path) -> list[dict[str, Any]]:
    """Return the means of the rows, for the terminal and --json."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    rows = [*report["rows"], *([report["baseline"]["row"]] if report["baseline"] else [])]
    return [
        {
            "row": row["name"],
            "seeds": len(row["seeds"]) if row["seeded"] else None,
            **{key: None if stat is None else {"mean": stat["mean"], "sd": stat["sd"]}
               for key, stat in row["stats"].items()},
        }
        for row in rows
    ]  # fmt: skip


@define_flow("liver-ablate", "ablate {settings.name}")
def ablate(settings: AblationSettings, out: Path, refresh: bool = False) -> Outcome:
    """Train and evaluate every row, sweep and curve of the configuration. Writes the report to the run folder `out`."""
    started = time.monotonic()
    stages = AblationStages(settings, refresh=refresh)
    with terminal.stages():
        stages.prepare()
        baseline = stages.evaluate_baseline()
        trained = stages.train()
    report = stages.report(trained, baseline)
    return stages.finish(out, report, trained, started)
