"""The steps of the liver flow; what each depends on and the domain call it makes.

Training gets settings in which all that it must not depend on stands at a neutral value, so that it cannot.
"""

from __future__ import annotations

import abc
import functools
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flows.store.artifacts import ArtefactStore, Ref, Step, library_versions
from flows.store.step import DeviceJob, Job, json_values
from medad.base.errors import InputError
from medad.base.settings import ANY_MACHINE, MACHINE_FIELDS, MachineSettings
from medad.config.liver import (
    DatasetSettings,
    EvaluationSettings,
    InferenceSettings,
    LesionSettings,
    LiverSettings,
    PlantSettings,
    PostprocessSettings,
    PreprocessSettings,
    SynthesisSettings,
    TextureSettings,
)

if TYPE_CHECKING:
    from flows.devices.child import Place
    from medad.cohort.datasets import Case

_READING = ("nibabel", "numpy", "SimpleITK")
_NETS = ("monai", "numpy", "safetensors", "torch")
_TEXTURES = ("pillow",)
"""What reading a folder of textures takes; of no matter to a training without one."""
_IMAGES = ("numpy", "scikit-image", "scipy", "torch")


def source_digest(path: Path) -> str:
    """Digest of a scan, a label or any file; of a folder's files for a DICOM series. Raises InputError."""
    from medad.ct.io import source_digest as compute
    from medad.ct.io import source_files

    try:
        return ArtefactStore().digests.get(path, compute, source_files(path))
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from error


def label_inputs(case: Case, data: DatasetSettings) -> dict[str, Any]:
    """What reading a case depends on, in content and not in name."""
    return {
        "scan": source_digest(case.scan),
        "label": None if case.label is None else source_digest(case.label),
        "liver_labels": sorted(case.liver_labels),
        "tumour_label": case.tumour_label,
        "affine_from": data.affine_from,
        "affine_mismatch": data.affine_mismatch,
    }


@dataclass(frozen=True)
class Plant(Job):
    """Lesions of known shape and contrast, in HU, into a healthy scan."""

    case: Case
    data: DatasetSettings
    settings: PlantSettings
    step = Step("plant", 1, ("medad.steps.cases:plant_case",), (*_READING, "scipy"))

    def inputs(self) -> dict[str, Any]:
        return label_inputs(self.case, self.data) | {"plant": json_values(self.settings)}

    def run(self, out: Path, *, key: str) -> None:
        from medad.steps.cases import plant_case

        plant_case(self.case, self.settings, self.data, out)

    def planted(self, ref: Ref) -> Case:
        """The case whose scan and label are the planted ones."""
        from medad.cohort.datasets import planted_case

        return planted_case(self.case, ref.folder())


@dataclass(frozen=True)
class Prepare(Job):
    """Scan and liver label -> equalised slices."""

    case: Case
    data: DatasetSettings
    settings: PreprocessSettings
    training: bool
    before_devices = True
    step = Step(
        "prepare", 2, ("medad.steps.cases:prepare_case",), (*_READING, "safetensors", "scikit-image", "scipy", "torch")
    )

    def inputs(self) -> dict[str, Any]:
        return label_inputs(self.case, self.data) | {
            "preprocess": json_values(self.settings),
            "training": self.training,
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.steps.cases import prepare_case

        prepare_case(self.case, self.data, self.settings, out, training=self.training)


Training = Literal["restoration", "segmentation", "joint"]


def _training_settings(settings: LiverSettings, training: Training) -> LiverSettings:
    """The settings of one training; everything that it must not depend on at a neutral value."""
    neutral = DatasetSettings(root="-", layout="btcv")
    plain = LiverSettings(name="model", train_data=neutral, test_data=neutral)
    given = settings.train
    phase = "segmentation" if training == "segmentation" else "restoration"
    train: dict[str, Any] = {
        phase: getattr(given, phase),
        "mixed_precision": given.mixed_precision,
        "checkpoint_minutes": given.checkpoint_minutes,
        "variation": given.variation,
        "mirror": given.mirror,
    }
    kept: dict[str, Any] = {
        "seed": settings.seed,
        "synthesis": used_synthesis(settings.synthesis),
        "restoration": settings.restoration,
    }
    if training != "segmentation":
        train["restoration_loss"] = given.restoration_loss
    if training != "restoration":
        kept["segmentation"] = settings.segmentation
        train["focal"] = given.focal
    if training == "segmentation":
        train["snapshot_epochs"] = given.snapshot_epochs
    return plain.model_copy(update=kept | {"train": plain.train.model_copy(update=train)})


def used_synthesis(settings: SynthesisSettings) -> SynthesisSettings:
    """What the chosen kind of pseudo anomaly does not look at, at its default."""
    if settings.kind == "perlin_texture":
        return SynthesisSettings(kind=settings.kind, texture=settings.texture)
    if settings.kind == "lesions":
        return SynthesisSettings(kind=settings.kind, lesions=settings.lesions)
    return settings.model_copy(update={"texture": TextureSettings(), "lesions": LesionSettings()})


def _training_inputs(prepared: tuple[Ref, ...], settings: LiverSettings) -> dict[str, Any]:
    values = json_values(settings, "name", *MACHINE_FIELDS, "train_data", "test_data", "preprocess")
    del values["train"]["checkpoint_minutes"]
    values["synthesis"], textures = synthesis_inputs(settings.synthesis)
    return {"prepared": [ref.digest for ref in prepared], "settings": values} | textures


def synthesis_inputs(settings: SynthesisSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the synthesis that is used, without folders; and its textures by content, where a folder is given."""
    values = json_values(used_synthesis(settings))
    folder = values["texture"].pop("folder")
    return values, {} if folder is None else {"textures": _textures_inputs(Path(folder).expanduser())}


def _textures_inputs(folder: Path) -> dict[str, Any]:
    """A folder of textures by content. Raises InputError."""
    from medad.base.textures import texture_files, textures_digest

    files = texture_files(folder)
    try:
        digest = ArtefactStore().digests.get(folder, textures_digest, files)
    except OSError as error:
        raise InputError(folder, f"cannot be read ({error.strerror})") from error
    return {"digest": digest, "libraries": library_versions(_TEXTURES)}


class _Trains(DeviceJob):
    """What the trainings have in common. The prepared cases are put in the order of their digests: a renamed case
    changes no weight."""

    prepared: tuple[Ref, ...]
    settings: LiverSettings
    training: ClassVar[Training]
    kind = "training"

    def __post_init__(self) -> None:
        object.__setattr__(self, "prepared", tuple(sorted(self.prepared, key=lambda ref: ref.digest)))
        object.__setattr__(self, "settings", _training_settings(self.settings, self.training))

    @property
    def batch_size(self) -> int:
        train = self.settings.train
        return (train.segmentation if self.training == "segmentation" else train.restoration).batch_size

    def inputs(self) -> dict[str, Any]:
        return _training_inputs(self.prepared, self.settings)

    def watch(self) -> AbstractContextManager[Callable[..., None]]:
        from flows.devices.progress import follow

        return follow(self.training)

    @abc.abstractmethod
    def train(self) -> Callable[..., None]:
        """The domain call, but for the cases, the settings and what `run_on` knows."""

    def run_on(self, out: Path, place: Place) -> None:
        with checkpoint_file(self.step, place.key) as checkpoint:
            self.train()(
                [ref.folder() for ref in self.prepared],
                settings=self.settings,
                out=out,
                device=place.device,
                largest_batch=place.batch_size,
                checkpoint=checkpoint,
                on_progress=place.report,
            )


@dataclass(frozen=True)
class TrainRestoration(_Trains):
    """Phase one."""

    prepared: tuple[Ref, ...]
    settings: LiverSettings
    machine: MachineSettings = ANY_MACHINE
    training = "restoration"
    step = Step(
        "restoration", 1, ("medad.networks.train:train_restoration",), _NETS, volatile=frozenset({"curve.json"})
    )

    def train(self) -> Callable[..., None]:
        from medad.networks.train import train_restoration

        return train_restoration


@dataclass(frozen=True)
class TrainSegmentation(_Trains):
    """Phase two, with phase one's network frozen."""

    prepared: tuple[Ref, ...]
    restoration: Ref
    settings: LiverSettings
    machine: MachineSettings = ANY_MACHINE
    training = "segmentation"
    step = Step(
        "segmentation", 1, ("medad.networks.train:train_segmentation",), _NETS, volatile=frozenset({"curve.json"})
    )

    def inputs(self) -> dict[str, Any]:
        return super().inputs() | {"restoration": self.restoration.digest}

    def train(self) -> Callable[..., None]:
        from medad.networks.train import train_segmentation

        return functools.partial(train_segmentation, restoration=self.restoration.folder())


@dataclass(frozen=True)
class TrainJoint(_Trains):
    """Both networks at once; `JointNetwork` makes an artefact of each."""

    prepared: tuple[Ref, ...]
    settings: LiverSettings
    machine: MachineSettings = ANY_MACHINE
    training = "joint"
    step = Step(
        "joint",
        1,
        ("medad.networks.train:train_joint",),
        _NETS,
        volatile=frozenset({"restoration/curve.json", "segmentation/curve.json"}),
    )

    def train(self) -> Callable[..., None]:
        from medad.networks.train import train_joint

        return train_joint


class checkpoint_file:  # noqa: N801 - used as a context manager
    """A file below the cache that survives kills, so that the same training goes on; gone once it has ended."""

    def __init__(self, step: Step, key: str) -> None:
        self.path = ArtefactStore().root / "checkpoints" / f"{step.name}-{key}.pt"

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Segment(DeviceJob):
    """Slices -> probability and mask on the scan's own grid, and the lesion table."""

    prepared: Ref
    restoration: Ref
    segmentation: Ref
    inference: InferenceSettings
    postprocess: PostprocessSettings
    machine: MachineSettings = ANY_MACHINE
    snapshot: str = ""
    """A file of phase two's folder to segment with. Empty: the network that phase two ended with."""
    kind = "inference"
    step = Step(
        "segment",
        2,
        ("medad.steps.cases:segment_case",),
        (*_NETS, "nibabel", "scikit-image", "scipy"),
        volatile=frozenset({"case.json"}),
    )

    def inputs(self) -> dict[str, Any]:
        return {
            "prepared": self.prepared.digest,
            "restoration": self.restoration.digest,
            "segmentation": self.segmentation.digest,
            "inference": json_values(self.inference, "batch_size"),
            "postprocess": json_values(self.postprocess),
        } | ({"snapshot": self.snapshot} if self.snapshot else {})

    @property
    def batch_size(self) -> int:
        return self.inference.batch_size

    def run_on(self, out: Path, place: Place) -> None:
        self.segment_folder(self.prepared.folder(), out, place)

    def segment_folder(self, prepared: Path, out: Path, place: Place) -> None:
        """Segment any prepared case as this one is."""
        from medad.steps.cases import segment_case

        segment_case(
            prepared,
            self.restoration.folder(),
            self.segmentation.folder() / self.snapshot,
            self.inference.model_copy(update={"batch_size": place.batch_size}),
            self.postprocess,
            place.device,
            out,
        )


@dataclass(frozen=True)
class Evaluate(Job):
    """Mask and probability against the case's label."""

    case: Case
    data: DatasetSettings
    prepared: Ref
    segmented: Ref
    settings: EvaluationSettings
    step = Step("evaluate", 1, ("medad.steps.cases:evaluate_case",), (*_READING, "safetensors", "scipy"))

    def inputs(self) -> dict[str, Any]:
        return label_inputs(self.case, self.data) | {
            "prepared": self.prepared.digest,
            "segmented": self.segmented.digest,
            "evaluation": json_values(self.settings),
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.steps.cases import evaluate_case

        # the figures carry an id, the artefact must not: one scan under two names is evaluated once
        case = replace(self.case, id="case")
        evaluate_case(case, self.data, self.prepared.folder(), self.segmented.folder(), self.settings, out)


@dataclass(frozen=True)
class ExportSlices(Job):
    """Prepared slices as pictures, with masks of the tumours; without a case they are a healthy one's."""

    prepared: Ref
    case: Case | None
    data: DatasetSettings
    step = Step("slice-images", 1, ("medad.steps.export_slices:export_case",), (*_READING, "pillow", "safetensors"))

    def inputs(self) -> dict[str, Any]:
        label = {} if self.case is None else label_inputs(self.case, self.data)
        return label | {"prepared": self.prepared.digest, "training": self.case is None}

    def run(self, out: Path, *, key: str) -> None:
        from medad.steps.export_slices import export_case

        export_case(self.case, self.data, self.prepared.folder(), out)


@dataclass(frozen=True)
class AdoptModel(Job):
    """A trained network out of a run folder into the cache, so that the run folder may go."""

    folder: Path
    step = Step("model", 1, (), (), volatile=frozenset({"curve.json"}))

    def inputs(self) -> dict[str, Any]:
        return {"weights": source_digest(self.folder / "model.safetensors")}

    def run(self, out: Path, *, key: str) -> None:
        for name in ("model.safetensors", "curve.json"):
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, out / name)


@dataclass(frozen=True)
class JointNetwork(Job):
    """One of the two networks that a joint training wrote, as an artefact of its own."""

    joint: Ref
    net: Literal["restoration", "segmentation"]
    step = AdoptModel.step

    def _adopted(self) -> AdoptModel:
        return AdoptModel(self.joint.folder() / self.net)

    def inputs(self) -> dict[str, Any]:
        return self._adopted().inputs()

    def run(self, out: Path, *, key: str) -> None:
        self._adopted().run(out, key=key)


HandStepName = Literal["window", "roi", "equalise", "slice"]


@functools.cache
def hand_step_of(name: HandStepName) -> Step:
    """The step of one of the four by hand."""
    libraries = (*_READING, "safetensors", *_IMAGES[1:])
    return Step(f"step-{name}", 1, (f"medad.steps.by_hand:step_{name}",), libraries)


@dataclass(frozen=True)
class HandStep(Job):
    """One preprocessing step by itself, on a file."""

    name: HandStepName
    source: Path
    liver: Path | None
    liver_labels: tuple[int, ...]
    settings: PreprocessSettings

    @property
    def step(self) -> Step:  # type: ignore[override]
        return hand_step_of(self.name)

    def inputs(self) -> dict[str, Any]:
        return {
            "source": source_digest(self.source),
            "liver": None if self.liver is None else source_digest(self.liver),
            "liver_labels": sorted(self.liver_labels),
            "preprocess": json_values(self.settings),
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.steps import by_hand as steps

        call = getattr(steps, f"step_{self.name}")
        call(self.source, self.liver, self.liver_labels, self.settings, out)
