"""Training of a model: copies with lesions, the members' networks and classifiers, and the calibrated threshold.

Each member of a model is trained without one part of the patients. The members' trainings run one after the other on
one device, and side by side on several.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flows.liver import training_steps
from flows.liver.training_steps import TrainingCase, in_order
from flows.machine.terminal import terminal
from flows.runs.runner import Runner, SharedCall
from flows.store.references import Ref
from flows.store.step import Call
from medad.cohort.folds import assign_folds
from medad.config.liver import FoldSettings, LiverSettings
from medad.config.training import PhaseSettings
from medad.steps.results import LeftOut, Member, Model
from medad.steps.trained import NETS, Part


@dataclass(frozen=True)
class HealthyCase:
    """A prepared training case and the key of its patient."""

    case_id: str
    prepared: Ref
    patient: str
    """Key from `medad.cohort.folds.patients_of`. It stays in memory."""


def patients_left_out(patients: Sequence[str], members: int, seed: int) -> list[frozenset[str]]:
    """Return, for each member of a model, the patients that it is trained without.

    The sets are disjoint, contain all patients, and differ in size by at most one. With fewer patients than `members`,
    there is one member per patient. A single member is trained on all patients.

    Parameters
    ----------
    patients
        Key of the patient of each case. The result does not depend on their order.
    members
        Number of members that the settings request.
    seed
        Seed of the training.
    """
    keys = set(patients)
    count = min(members, len(keys))
    if count < 2:
        return [frozenset()]
    part_of = assign_folds(keys, (), FoldSettings(count=count, index=0, seed=seed))
    return [frozenset(key for key in keys if part_of[key] == part) for part in range(count)]


def member_seed(seed: int, number: int) -> int:
    """Return the seed of member `number`, counted from 1, of a model with several members. It is below 2^31."""
    return int.from_bytes(hashlib.sha256(f"member {number} of seed {seed}".encode()).digest()[:4]) >> 1


@dataclass(frozen=True)
class PlannedMember:
    """A member that is to be trained."""

    label: str
    """Label of its trainings."""
    settings: LiverSettings
    """Settings with the member's seed."""
    training: tuple[TrainingCase, ...]
    left_out: tuple[TrainingCase, ...]
    base: Member[Ref] | None
    """Member that its trainings start from. None: they start from random weights."""


class ModelTraining:
    """The training of one model with one runner."""

    def __init__(self, runner: Runner, settings: LiverSettings, base: Model[Ref] | None = None) -> None:
        """Create the training. `base` is the model whose members the trainings start from, in turn."""
        self.runner, self.settings, self.base = runner, settings, base
        self._waiting: deque[SharedCall] = deque()

    def run(self, cases: Sequence[HealthyCase]) -> Model[Ref] | None:
        """Train the model on these cases, at least one. None if a training failed; the runner recorded why."""
        parts = patients_left_out([case.patient for case in cases], self.settings.train.members, self.settings.seed)
        calibrated = len(parts) > 1 and not self.settings.preprocess.equalise
        ready = self._with_copies(cases, needed=self.settings.needs_solid_lesions or calibrated)
        if ready is None:
            return None
        self._note_fewer_members(len(parts), len({case.patient for case in cases}))
        planned = self._plan(parts, cases, ready)
        with terminal.stages(self._announced(len(planned))):
            members = self._train_members(planned)
            self._drain()
        if members is None or not calibrated:
            return None if members is None else Model(tuple(members))
        left_out = [_left_out(member, plan.left_out) for member, plan in zip(members, planned, strict=True)]
        threshold = self.runner.run("model", training_steps.calibration(left_out, self.settings))
        if threshold is None:
            return None
        if self.settings.train.final_factor:
            with terminal.stages(self._announced(1)):
                members = self._train_members([self._plan_final(ready)])
                self._drain()
        return None if members is None else Model(tuple(members), threshold)

    def _announced(self, members: int) -> dict[str, int]:
        """Return the numbers of trainings, by step."""
        nets = ("joint",) if self.settings.train.schedule == "joint" else NETS
        names = [*nets, *(["classifier"] if self.settings.classifier is not None else [])]
        return dict.fromkeys(names, members)

    def _plan_final(self, ready: Sequence[TrainingCase]) -> PlannedMember:
        """Return the member that is trained on all cases, for more steps than the others."""
        train, factor = self.settings.train, self.settings.train.final_factor
        phases = {name: _longer(getattr(train, name), factor) for name in NETS}
        settings = self.settings.model_copy(update={"train": train.model_copy(update=phases)})
        base = None if self.base is None else self.base.members[0]
        return PlannedMember("final member", settings, tuple(ready), (), base)

    def _with_copies(self, cases: Sequence[HealthyCase], *, needed: bool) -> list[TrainingCase] | None:
        """Return the cases with copies if these are `needed`. None if copies of a case cannot be made."""
        if not needed:
            return [TrainingCase(case.prepared) for case in cases]
        solid, seed = self.settings.synthesis.solid, self.settings.seed
        tasks = [
            self.runner.submit(case.case_id, training_steps.lesion_copies(case.prepared, solid, seed)) for case in cases
        ]
        found = [(case, task.ref()) for case, task in zip(cases, tasks, strict=True)]
        ready = [TrainingCase(case.prepared, copies) for case, copies in found if copies is not None]
        if len(ready) < len(cases):
            return None
        return ready if self.settings.classifier is None else self._with_samples(cases, ready)

    def _with_samples(self, cases: Sequence[HealthyCase], ready: Sequence[TrainingCase]) -> list[TrainingCase] | None:
        """Return the cases with the training voxels of the classifier. None if those of a case cannot be made."""
        tasks = [
            self.runner.submit(case.case_id, training_steps.voxel_samples(each.prepared, each.copies, self.settings))
            for case, each in zip(cases, ready, strict=True)
            if each.copies is not None
        ]
        samples = [task.ref() for task in tasks]
        if None in samples:
            return None
        return [replace(each, samples=ref) for each, ref in zip(ready, samples, strict=True)]

    def _note_fewer_members(self, count: int, patients: int) -> None:
        wanted = self.settings.train.members
        if count < wanted:
            note = (
                f"The training data have {patients} patient{'' if patients == 1 else 's'}, so the model has {count} "
                f"member{'' if count == 1 else 's'} instead of {wanted}."
            )
            self.runner.notes.append(note + " Its threshold was not calibrated." * (count == 1))

    def _plan(
        self, parts: Sequence[frozenset[str]], cases: Sequence[HealthyCase], ready: Sequence[TrainingCase]
    ) -> list[PlannedMember]:
        several = len(parts) > 1
        planned = []
        for number, part in enumerate(parts, start=1):
            left_out = [case.patient in part for case in cases]
            seed = member_seed(self.settings.seed, number) if several else self.settings.seed
            planned.append(
                PlannedMember(
                    label=f"member {number}" if several else "model",
                    settings=self.settings.model_copy(update={"seed": seed}),
                    training=tuple(case for case, out in zip(ready, left_out, strict=True) if not out),
                    left_out=tuple(case for case, out in zip(ready, left_out, strict=True) if out),
                    base=None if self.base is None else self.base.members[(number - 1) % len(self.base.members)],
                )
            )
        return planned

    def _train_members(self, planned: Sequence[PlannedMember]) -> list[Member[Ref]] | None:
        """Train all members. First come the networks and classifiers that wait for no other training."""
        if self.settings.train.schedule == "joint":
            return self._train_joint(planned[0])
        restorations = [self._train_net("restoration", plan) for plan in planned]
        classifiers = [self._train_classifier(plan) for plan in planned]
        segmentations = []
        for plan, task in zip(planned, restorations, strict=True):
            restoration = task.ref()
            if restoration is None:
                return None
            segmentations.append(self._train_net("segmentation", plan, restoration))
        members = [
            _member(restoration.ref(), segmentation.ref(), classifier)
            for restoration, segmentation, classifier in zip(restorations, segmentations, classifiers, strict=True)
        ]
        found = [member for member in members if member is not None]
        return found if len(found) == len(planned) else None

    def _train_joint(self, plan: PlannedMember) -> list[Member[Ref]] | None:
        classifier = self._train_classifier(plan)
        joint = self._submit(plan.label, training_steps.train("joint", plan.training, plan.settings)).ref()
        if joint is None:
            return None
        nets = [self.runner.run(plan.label, training_steps.adopt(Part(net, joint.folder() / net))) for net in NETS]
        member = _member(nets[0], nets[1], classifier)
        return None if member is None else [member]

    def _train_net(
        self, net: training_steps.Training, plan: PlannedMember, restoration: Ref | None = None
    ) -> SharedCall:
        initial = None if plan.base is None else getattr(plan.base, net)
        call = training_steps.train(net, plan.training, plan.settings, restoration, initial)
        return self._submit(plan.label, call)

    def _train_classifier(self, plan: PlannedMember) -> SharedCall | None:
        if plan.settings.classifier is None:
            return None
        initial = None if plan.base is None else plan.base.classifier
        return self._submit(plan.label, training_steps.classifier(plan.training, plan.settings, initial))

    def _submit(self, label: str, call: Call) -> SharedCall:
        """Start a training as soon as fewer trainings than devices are under way."""
        while len(self._waiting) >= self.runner.max_device_calls:
            self._waiting.popleft().ref()
        task = SharedCall(self.runner.submit(label, call))
        self._waiting.append(task)
        return task

    def _drain(self) -> None:
        """Wait for trainings that are under way after another one has failed."""
        while self._waiting:
            self._waiting.popleft().ref()


def _longer(phase: PhaseSettings, factor: int) -> PhaseSettings:
    """Return a phase with `factor` times its steps, or its epochs if these decide."""
    field = "epochs" if phase.steps is None else "steps"
    return phase.model_copy(update={field: factor * getattr(phase, field)})


def _member(restoration: Ref | None, segmentation: Ref | None, classifier: SharedCall | None) -> Member[Ref] | None:
    """Return a member. None if one of its trainings failed."""
    trees = None if classifier is None else classifier.ref()
    if restoration is None or segmentation is None or (classifier is not None and trees is None):
        return None
    return Member(restoration, segmentation, trees)


def _left_out(member: Member[Ref], cases: Sequence[TrainingCase]) -> LeftOut[Ref]:
    ordered = in_order(cases)
    copies = tuple(case.copies for case in ordered if case.copies is not None)
    return LeftOut(member, tuple(case.prepared for case in ordered), copies)
