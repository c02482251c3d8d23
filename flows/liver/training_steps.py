"""The steps that make a model of the liver flows, and functions that create their calls.

A training's key must depend only on the settings that the training uses. All other fields get a neutral value first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.store.digests import digest_memory
from flows.store.references import Ref, library_versions
from flows.store.step import Call, Keyed, Step, keyed
from medad.base.errors import InputError
from medad.base.settings import MACHINE_FIELDS
from medad.config.anomalies import LesionSettings, SolidLesionSettings, SynthesisSettings, TextureSettings
from medad.config.liver import DatasetSettings, LiverSettings
from medad.config.training import PhaseSettings
from medad.steps.results import LeftOut
from medad.steps.trained import Part

NET_LIBRARIES = ("monai", "numpy", "safetensors", "torch")
"""Libraries of the networks."""
_CURVE = frozenset({"curve.json"})
_TREE_FIELDS = ("trees", "leaves", "learning_rate")
"""Settings of the classifier that its training voxels do not depend on."""

LESION_COPIES = Step("lesion-copies", 1, "medad.anomalies.copies:write_copies", ("numpy", "safetensors", "scipy"))
VOXEL_SAMPLES = Step("voxel-samples", 1, "medad.classifier.samples:write_samples", ("numpy", "safetensors", "scipy"))
RESTORATION = Step(
    "restoration", 1, "medad.networks.train:train_restoration", NET_LIBRARIES, kind="training", volatile=_CURVE
)
SEGMENTATION = Step(
    "segmentation", 1, "medad.networks.train:train_segmentation", NET_LIBRARIES, kind="training", volatile=_CURVE
)
JOINT = Step(
    "joint",
    1,
    "medad.networks.train:train_joint",
    NET_LIBRARIES,
    kind="training",
    volatile=frozenset({"restoration/curve.json", "segmentation/curve.json"}),
)
CLASSIFIER = Step(
    "classifier",
    1,
    "medad.classifier.training:train_classifier",
    ("lightgbm", "numpy", "safetensors"),
    kind="training",
)
CALIBRATION = Step(
    "calibration",
    1,
    "medad.steps.calibration:calibrate",
    (*NET_LIBRARIES, "lightgbm", "nibabel", "scikit-image", "scipy"),
    kind="inference",
    not_in_key=frozenset({"inference.batch_size"}),
)
MODEL = Step("model", 1, "medad.steps.adopt:copy_part", (), volatile=_CURVE)

Training = Literal["restoration", "segmentation", "joint"]


@dataclass(frozen=True)
class TrainingCase:
    """A prepared healthy case, copies of it with lesions, and sampled voxels of the copies."""

    prepared: Ref
    copies: Ref | None = None
    """Artifact of `LESION_COPIES`. None: the training needs no copies."""
    samples: Ref | None = None
    """Artifact of `VOXEL_SAMPLES`. None: the training needs no samples."""


def in_order(cases: Iterable[TrainingCase]) -> list[TrainingCase]:
    """Return cases sorted by digest, so that a renamed case does not change the training."""
    return sorted(cases, key=lambda case: case.prepared.digest)


def _copies_of(cases: Sequence[TrainingCase]) -> tuple[Ref, ...]:
    return tuple(case.copies for case in cases if case.copies is not None)


def training_data(cases: Iterable[TrainingCase], synthesis: SynthesisSettings) -> dict[str, Any]:
    """Return the arguments `prepared` and `copies` of a network's step. Only kind `solid_lesions` uses copies."""
    ordered = in_order(cases)
    copies = {"copies": _copies_of(ordered)} if synthesis.kind == "solid_lesions" else {}
    return {"prepared": tuple(case.prepared for case in ordered), **copies}


def lesion_copies(prepared: Ref, settings: SolidLesionSettings, seed: int) -> Call:
    """Return the call that paints lesions in three dimensions into copies of a prepared healthy case."""
    return LESION_COPIES(prepared=prepared, settings=settings, seed=seed)


def train(
    training: Training,
    cases: Iterable[TrainingCase],
    settings: LiverSettings,
    restoration: Ref | None = None,
    initial: Ref | None = None,
) -> Call:
    """Return the call that trains one network, or both, on prepared cases.

    Phase two needs a `restoration` network. `initial` is the network that the training starts from. None: the initial
    weights are random.
    """
    neutral = _training_settings(settings, training)
    left_out = {"name", *MACHINE_FIELDS, "train_data", "test_data", "preprocess", "train.checkpoint_minutes"}
    values, textures = _synthesis_content(settings.synthesis)
    content = keyed(neutral, *left_out, "synthesis", **textures, synthesis=values)
    step = {"restoration": RESTORATION, "segmentation": SEGMENTATION, "joint": JOINT}[training]
    phase = settings.train.segmentation if training == "segmentation" else settings.train.restoration
    given = {"restoration": restoration, "initial": initial}
    return step(
        **training_data(cases, settings.synthesis),
        **{name: ref for name, ref in given.items() if ref is not None},
        settings=content,
        machine=settings.machine,
        batch_size=phase.batch_size,
        phase=training,
    )


def voxel_samples(prepared: Ref, copies: Ref, settings: LiverSettings) -> Call:
    """Return the call that samples the training voxels of the voxel classifier from the copies of a case."""
    assert settings.classifier is not None, "the settings have a classifier"
    return VOXEL_SAMPLES(
        prepared=prepared,
        copies=copies,
        settings=keyed(settings.classifier, *_TREE_FIELDS),
        augmentation=settings.train.augmentation,
        seed=settings.seed,
    )


def classifier(cases: Iterable[TrainingCase], settings: LiverSettings, initial: Ref | None = None) -> Call:
    """Return the call that trains the voxel classifier. It runs on the CPU, so it does not wait for a GPU.

    `initial` is the classifier that the training continues. None: it begins without trees.
    """
    assert settings.classifier is not None, "the settings have a classifier"
    given: dict[str, Any] = {} if initial is None else {"initial": initial}
    return CLASSIFIER(
        samples=tuple(case.samples for case in in_order(cases) if case.samples is not None),
        settings=settings.classifier,
        seed=settings.seed,
        **given,
        machine=settings.machine.model_copy(update={"gpus": "cpu"}),
        phase="classifier",
    )


def calibration(left_out: Sequence[LeftOut[Ref]], settings: LiverSettings) -> Call:
    """Return the call that calibrates the threshold on the cases that members were not trained on."""
    # the threshold itself is the result, so a setting of it does not matter
    post = settings.postprocess.model_copy(update={"threshold": "calibrated"})
    return CALIBRATION(
        left_out=tuple(left_out),
        inference=settings.inference,
        post=post,
        machine=settings.machine,
        batch_size=settings.inference.batch_size,
    )


def adopt(part: Part[Path]) -> Call:
    """Return the call that copies a part of a model into the cache, so that its run folder may be deleted."""
    return MODEL(folder=Keyed(part.folder, part.folder / part.file), name=part.file)


def _training_settings(settings: LiverSettings, training: Training) -> LiverSettings:
    """Return the settings of one training, with neutral values in all fields that the training does not use."""
    neutral = DatasetSettings(root="-", layout="btcv")
    plain = LiverSettings(name="model", train_data=neutral, test_data=neutral)
    given = settings.train
    phase: Literal["segmentation", "restoration"] = "segmentation" if training == "segmentation" else "restoration"
    train: dict[str, Any] = {
        phase: _used_phase(getattr(given, phase)),
        "mixed_precision": given.mixed_precision,
        "checkpoint_minutes": given.checkpoint_minutes,
        "augmentation": given.augmentation,
        "flip": given.flip,
    }
    used: dict[str, Any] = {
        "seed": settings.seed,
        "synthesis": used_synthesis(settings.synthesis),
        "restoration": settings.restoration,
    }
    if training != "segmentation":
        train["restoration_loss"] = given.restoration_loss
    if training != "restoration":
        used["segmentation"] = settings.segmentation
        train["focal"] = given.focal
    if training == "segmentation":
        train["snapshot_epochs"] = given.snapshot_epochs
    return plain.model_copy(update=used | {"train": plain.train.model_copy(update=train)})


def _used_phase(phase: PhaseSettings) -> PhaseSettings:
    """Return the settings of a phase with one epoch if its number of steps decides instead."""
    return phase if phase.steps is None else phase.model_copy(update={"epochs": 1})


def used_synthesis(settings: SynthesisSettings) -> SynthesisSettings:
    """Return the synthesis settings with default values in all fields that its kind does not use."""
    if settings.kind == "perlin_texture":
        return SynthesisSettings(kind=settings.kind, texture=settings.texture)
    if settings.kind == "lesions":
        return SynthesisSettings(kind=settings.kind, lesions=settings.lesions)
    if settings.kind == "solid_lesions":
        return SynthesisSettings(kind=settings.kind, solid=settings.solid)
    groups = {"texture": TextureSettings(), "lesions": LesionSettings(), "solid": SolidLesionSettings()}
    return settings.model_copy(update=groups)


def _synthesis_content(settings: SynthesisSettings) -> tuple[Any, dict[str, Any]]:
    """Return the used synthesis settings for a key, without folders, and the content of the textures, if any."""
    used = used_synthesis(settings)
    folder = used.texture.folder
    textures = {} if folder is None else {"textures": _textures_content(Path(folder).expanduser())}
    return keyed(used, "texture.folder").content, textures


def _textures_content(folder: Path) -> dict[str, Any]:
    from medad.base.textures import texture_files, textures_digest

    files = texture_files(folder)
    try:
        digest = digest_memory().get(folder, textures_digest, files)
    except OSError as error:
        raise InputError(folder, f"cannot be read ({error.strerror})") from error
    return {"digest": digest, "libraries": library_versions(("pillow",))}


def keyed_synthesis(settings: SynthesisSettings) -> Keyed:
    """Return the used synthesis settings with their content for a key."""
    values, textures = _synthesis_content(settings)
    return Keyed(used_synthesis(settings), {"values": values} | textures)
