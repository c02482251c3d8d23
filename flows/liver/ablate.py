"""The flow liver-ablate: variants of one liver configuration, each trained and evaluated over seeds, in one report.

What variants have in common (preparation, trainings of equal settings) is computed once. Variants and seeds go beside
each other as far as devices do. One that fails is listed, the others go on, and the report is written whatever happens.
"""

from __future__ import annotations

import contextvars
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.devices.engines import RUNNER
from flows.liver import run_folder as liver_folder
from flows.liver.ablate_steps import AblationReport, Embed, Examples, Judged, SnapshotRow, VariantRow, Yardstick
from flows.liver.flow import ReadyCase, Stages
from flows.liver.run_folder import Models, UsedCase
from flows.machine.stopping import stopping
from flows.machine.terminal import terminal
from flows.privacy.log_filter import confined
from flows.runs import artifacts as ui
from flows.runs.outcome import Outcome, failed_steps, final_state
from flows.runs.plan import Plan, new_tally, planned
from flows.runs.row_runner import Once, RowTally
from flows.runs.run_folder import Copied, RunFolder, copied, installed_versions, publish
from flows.runs.runner import Failure, Submitted, describe
from flows.store.artifacts import Ref, canonical_json
from flows.store.step import FailedStep, json_values
from medad.base.errors import UserError
from medad.config.ablation import CURVE, ROWS, YARDSTICK, AblationSettings, Variant
from medad.config.liver import LiverSettings

REPORT_FILES = (
    *("report.html", "report.json", "preview.png"),
    *("summary.csv", "seeds.csv", "cases.csv", "paired.csv", "curve.csv", "table.tex"),
)
NOT_OF_DATA = frozenset(
    {"name", "seed", "synthesis", "restoration", "segmentation", "train", "inference", "postprocess", "evaluation"}
)
"""Settings that finding and preparing cases does not depend on."""
NO_TRUTH = "no test case has a tumour label to evaluate against"
_SNAPSHOT = re.compile(r"snapshot-(\d+)\.safetensors")


@dataclass(frozen=True)
class Data:
    """Found and prepared cases, for all variants that ask for the same."""

    stages: Stages
    training: list[Submitted]
    test: list[ReadyCase]

    @property
    def trained_on(self) -> tuple[Ref, ...]:
        return tuple(ref for task in self.training if (ref := task.ref()) is not None)


@dataclass
class Trained:
    """One variant and seed: its networks, its results, and those by length of phase two."""

    variant: Variant
    seed: int
    models: Models | None = None
    cases: tuple[Judged, ...] = ()
    snapshots: dict[int, tuple[Judged, ...]] = field(default_factory=dict)


class AblationStages:
    """The stages over one tally: each takes what the one before gave and leaves out what failed."""

    def __init__(self, settings: AblationSettings, *, refresh: bool) -> None:
        self.settings = settings
        self.tally = new_tally(settings.machine, refresh=refresh)
        self.variants = settings.variants()
        self.base = settings.base_settings()
        self.used: list[UsedCase] = []
        self.planted: set[str] = set()
        self.opaque = False
        self._lock = threading.Lock()
        self._data: dict[str, Data | None] = {}
        self._labels: dict[str, tuple[str, str]] = {}
        """Label of a task -> the variant it belongs to, and what of it."""

    def tally_of(self, one: Trained, part: str = "") -> RowTally:
        """The tally as one variant and seed see it, or a part of them."""
        return RowTally(self.tally, one.variant.id, f"seed {one.seed}{part}", self._lock, self._labels)

    def prepare(self) -> None:
        """Find and prepare what the variants ask for, each thing once."""
        wanted = [variant.settings for variant in self.variants]
        wanted += [self.base] if self.has_yardstick else []
        for settings in {_data_key(one): one for one in reversed(wanted)}.values():
            self._data[_data_key(settings)] = self._prepare(settings)

    @property
    def has_yardstick(self) -> bool:
        return self.settings.yardstick and self.settings.has(YARDSTICK)

    def data(self, settings: LiverSettings) -> Data | None:
        """None where the data set as a whole cannot be used; why is noted."""
        return self._data[_data_key(settings)]

    def _prepare(self, settings: LiverSettings) -> Data | None:
        stages = Stages(settings, refresh=self.tally.refresh, tally=self.tally)
        try:
            training: list[Submitted] = [Once(task) for task in stages.prepare_training()]
            test = stages.prepare_test()
        except UserError as error:
            self.tally.fail(describe("data", "prepare", error))
            return None
        found = [(task.label, ref) for task in training if (ref := task.ref()) is not None]
        self.opaque = self.opaque or stages.opaque
        self.used += stages.used
        self.planted |= {ready.case.id for ready in test if ready.planted is not None}
        if test and not any(_has_truth(ready) for ready in test):
            self.tally.fail(Failure("test data", "find", NO_TRUTH))
        if stages.leaked or not stages.apart(found, test):  # noted once here, not by every row
            return None
        return Data(stages, training, test)

    def train(self) -> list[Trained]:
        """Every variant with every seed, trained, segmented and evaluated."""
        todo = [Trained(variant, seed) for seed in self.settings.seeds for variant in self.variants]
        # one more than devices: while a row's cases are evaluated, the next one trains
        at_a_time = 1 if isinstance(self.tally, Plan) else min(len(todo), self.tally.device_jobs_at_a_time + 1)
        _beside_each_other(self._guarded, todo, at_a_time)
        return todo

    def _guarded(self, one: Trained) -> None:
        try:
            self._train(one)
        except Exception as error:
            if stopping.is_set():
                raise
            self.tally_of(one).fail(describe("all of it", "ablate", error))

    def _train(self, one: Trained) -> None:
        data = self.data(one.variant.settings)
        if data is None:
            return
        settings = one.variant.settings.model_copy(update={"seed": one.seed})
        stages = data.stages.over(settings, self.tally_of(one))
        one.models = stages.train(list(data.training))
        self.used += stages.used
        if one.models is None:
            return
        if one.variant.group != CURVE:
            one.cases = _judged(stages, data, one.models)
            return
        for epochs, name in _snapshots(one.models.segmentation):
            at = stages.over(stages.settings, self.tally_of(one, f", {epochs} epochs"))
            one.snapshots[epochs] = _judged(at, data, replace(one.models, snapshot=name))

    def judge_yardstick(self) -> tuple[Judged, ...]:
        """Each test case of the base by its smoothed HU."""
        data = self.data(self.base) if self.has_yardstick else None
        if data is None:
            return ()
        base, sigma_mm = self.base, self.settings.yardstick_sigma_mm
        small = base.postprocess.min_lesion_mm3
        tasks = [
            (
                ready,
                self.tally.submit(
                    ready.case.id,
                    Yardstick(ready.case, base.test_data, ready.prepared, sigma_mm, small, base.evaluation),
                ),
            )
            for ready in data.test
            if _has_truth(ready)
        ]
        found = [(ready, task.ref()) for ready, task in tasks]
        return tuple(Judged(ready.case.id, ready.prepared, None, ref) for ready, ref in found if ref is not None)

    def examples(self, trained: Iterable[Trained]) -> dict[str, Ref]:
        """By row: synthesised slices as its first seed's restoration sees them."""
        if not self.settings.panels:
            return {}
        tasks = []
        for one in trained:
            if one.variant.group != ROWS or one.models is None or one.seed != self.settings.seeds[0]:
                continue
            data = self.data(one.variant.settings)
            assert data is not None, "it was trained on"
            settings = one.variant.settings
            job = Examples(
                data.trained_on,
                one.models.restoration,
                settings.synthesis,
                one.seed,
                self.settings.panels,
                settings.inference.batch_size,
                self.settings.machine,
            )
            tasks.append((one.variant.name, self.tally_of(one).submit("examples", job)))
        found = [(name, task.ref()) for name, task in tasks]
        return {name: ref for name, ref in found if ref is not None}

    def embed(self, trained: Iterable[Trained]) -> tuple[str, int, Ref] | None:
        """Real, healthy and synthesised slices by the main row's restoration."""
        main, seed = self.settings.main_row, self.settings.seeds[0]
        chosen = next((t for t in trained if (t.variant.group, t.variant.name, t.seed) == (ROWS, main, seed)), None)
        if not self.settings.embedding or chosen is None or chosen.models is None or not chosen.cases:
            return None
        data = self.data(chosen.variant.settings)
        assert data is not None, "it was trained on"
        settings = chosen.variant.settings
        job = Embed(
            data.trained_on,
            tuple((case.prepared, case.evaluated) for case in chosen.cases),
            chosen.models.restoration,
            settings.synthesis,
            seed,
            settings.inference.batch_size,
            self.settings.machine,
        )
        ref = self.tally_of(chosen).run("embedding", job)
        return None if ref is None else (chosen.variant.name, seed, ref)

    def report(self, trained: Sequence[Trained], yardstick: tuple[Judged, ...]) -> Ref | None:
        """Everything in one report."""
        examples = self.examples(trained)
        job = AblationReport(
            settings=self.settings,
            variants=tuple(
                VariantRow(
                    variant.group,
                    variant.name,
                    tuple((t.seed, t.cases) for t in trained if t.variant is variant and t.cases),
                    examples.get(variant.name) if variant.group == ROWS else None,
                )
                for variant in self.variants
                if variant.group != CURVE
            ),
            snapshots=_snapshot_rows(trained),
            yardstick=yardstick,
            embedding=self.embed(trained),
            planted=tuple(sorted(self.planted)),
            failures=self._failures(),
            versions=tuple(sorted(installed_versions().items())),
            notes=tuple(dict.fromkeys(self.tally.notes)),
        )
        return self.tally.run("report", job)

    def _failures(self) -> tuple[tuple[str, FailedStep], ...]:
        found = []
        for failure in failed_steps(self.tally, opaque=self.opaque):
            row, what = self._labels.get(failure.case_id, ("", failure.case_id))
            found.append((row, replace(failure, case_id=what)))
        return tuple(found)

    def finish(self, out: Path, report: Ref | None, started: float) -> Outcome:
        """Publish into the run folder and show in Prefect's UI."""
        if (plan := planned(self.tally)) is not None:
            return plan
        used = {(one.use, one.case_id, one.ref.digest): one for one in self.used}
        run = RunFolder(
            path=out,
            settings=self.settings,
            copies=self._copies(report),
            manifest={"inputs": liver_folder.manifest(used.values(), None)["inputs"]},
            seconds=time.monotonic() - started,
        )
        publish(run, self.tally)
        ui.show_run(ui.ABLATION, out, self.tally, private=False)
        return Outcome.of(self.tally, run_folder=out, details={"rows": _row_figures(out)})

    def _copies(self, report: Ref | None) -> tuple[Copied, ...]:
        names = [f"table_{sweep.name}.tex" for sweep in self.settings.chosen_sweeps]
        return tuple(copied(report, *REPORT_FILES, *names))


def _data_key(settings: LiverSettings) -> str:
    return canonical_json(json_values(settings, *NOT_OF_DATA))


def _has_truth(ready: ReadyCase) -> bool:
    return ready.case.tumour_label is not None and ready.case.label is not None


def _judged(stages: Stages, data: Data, models: Models) -> tuple[Judged, ...]:
    results = stages.segment_and_evaluate(data.test, models, stages.settings.test_data)
    return tuple(
        Judged(one.case_id, one.prepared, one.segmented, one.evaluated) for one in results if one.evaluated is not None
    )


def _snapshots(segmentation: Ref) -> list[tuple[int, str]]:
    """Epochs and file of each snapshot of phase two; none of what a dry run does not make."""
    if not segmentation.made:
        return []
    found = [(_SNAPSHOT.fullmatch(path.name), path.name) for path in segmentation.folder().iterdir()]
    return sorted((int(match[1]), name) for match, name in found if match is not None)


def _snapshot_rows(trained: Sequence[Trained]) -> tuple[SnapshotRow, ...]:
    lengths = sorted({epochs for one in trained for epochs in one.snapshots})
    return tuple(
        SnapshotRow(epochs, tuple((t.seed, t.snapshots[epochs]) for t in trained if t.snapshots.get(epochs)))
        for epochs in lengths
        if any(t.snapshots.get(epochs) for t in trained)
    )


def _beside_each_other(work: Callable[[Trained], None], todo: Sequence[Trained], at_a_time: int) -> None:
    """Do all, so many at a time; each thread is within the flow's own context."""
    if at_a_time <= 1:
        for one in todo:
            work(one)
        return
    with ThreadPoolExecutor(at_a_time, thread_name_prefix="row") as pool:
        futures = [pool.submit(contextvars.copy_context().run, work, one) for one in todo]
        try:
            for future in futures:
                future.result()
        except BaseException:  # Ctrl-C, a cancellation: leaving waits for what is under way, which must then end
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _row_figures(folder: Path) -> list[dict[str, Any]]:
    """The rows' means, for the terminal and --json."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    rows = [*report["rows"], *([report["yardstick"]["row"]] if report["yardstick"] else [])]
    return [
        {
            "row": row["name"],
            "seeds": len(row["seeds"]) if row["seeded"] else None,
            **{key: None if stat is None else {"mean": stat["mean"], "sd": stat["sd"]}
               for key, stat in row["stats"].items()},
        }
        for row in rows
    ]  # fmt: skip


@flow(
    name="liver-ablate",
    flow_run_name="ablate {settings.name}",
    task_runner=RUNNER,
    persist_result=False,
    log_prints=True,
)
@confined
def ablate(settings: AblationSettings, out: Path, refresh: bool = False) -> State[Outcome]:
    """Train and evaluate every row, sweep and curve of the configuration; the report lies in the run folder `out`."""
    started = time.monotonic()
    stages = AblationStages(settings, refresh=refresh)
    with terminal.bars():
        stages.prepare()
        yardstick = stages.judge_yardstick()
        trained = stages.train()
    report = stages.report(trained, yardstick)
    outcome = stages.finish(out, report, started)
    return final_state(outcome, useful=any(one.cases or one.snapshots for one in trained))
