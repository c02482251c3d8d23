"""Settings of the liver flow's trainings: both phases, the members of a model and the voxel classifier."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medad.base.settings import Settings
from medad.config.anomalies import AugmentationSettings


class PhaseSettings(Settings):
    """One training phase with Adam."""

    epochs: Annotated[int, Field(ge=1)]
    """Number of epochs."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Number of steps. The training then has as many epochs as these steps need, for any number of slices. None:
    `epochs` decides."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Number of slices per batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of Adam."""
    rate: Literal["constant", "one_cycle"] = "constant"
    """Schedule of the learning rate. `one_cycle`: it rises from 1/25 of `learning_rate` to `learning_rate` over the
    first 30 % of the steps, then falls to zero, both along a cosine. A short training then converges (Smith and Topin,
    2019)."""


class FocalSettings(Settings):
    """Parameters of the focal loss."""

    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Factor alpha of the focal loss."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """Exponent gamma of the focal loss."""


class TrainSettings(Settings):
    """Training of both networks."""

    restoration: PhaseSettings = PhaseSettings(epochs=200)
    """Training of the restoration network."""
    segmentation: PhaseSettings = PhaseSettings(epochs=1)
    """Training of the segmentation network."""
    focal: FocalSettings = FocalSettings()
    """Focal loss of the segmentation network."""
    members: Annotated[int, Field(ge=1, le=10)] = 1
    """Number of members of the model. Each member is trained without one part of the patients, and the members' maps
    are averaged. The parts that are left out calibrate the threshold. 1: one member, trained on all patients."""
    final_factor: Annotated[int, Field(ge=0, le=20)] = 0
    """Factor of the steps of a final member, which is trained on all patients after the calibration. The model then
    consists of this member alone; the others only calibrate its threshold. 0: the members are averaged."""
    schedule: Literal["two_phase", "joint"] = "two_phase"
    """Order of the trainings. `two_phase`: the restoration network first, then the segmentation network while the
    restoration network is frozen (the thesis). `joint`: both at once on the sum of their losses (DRAEM), with epochs,
    batch size and learning rate of `restoration`."""
    restoration_loss: Literal["l1", "l2_ssim"] = "l1"
    """Loss of the restoration network. `l1`: mean absolute error (eq. 3.2). `l2_ssim`: DRAEM's loss, squared error +
    1 - SSIM with a window of 11 px."""
    snapshot_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of epochs between snapshots of the segmentation network. 0: only the final network is stored."""
    augmentation: AugmentationSettings | None = None
    """Augmentation of healthy slices. None: slices are not augmented (the thesis)."""
    flip: bool = False
    """Random flips of slices, left-right and front-back."""
    mixed_precision: bool = True
    """Mixed precision (bfloat16 autocast) on a GPU. A CPU never uses it."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """Minutes between checkpoints. An interrupted training continues from its last checkpoint."""

    @model_validator(mode="after")
    def _snapshots_are_phase_twos(self) -> TrainSettings:
        if self.snapshot_epochs and self.schedule == "joint":
            raise ValueError("snapshot_epochs belongs to schedule two_phase: joint training has no phase two")
        if self.snapshot_epochs and self.segmentation.rate != "constant":
            raise ValueError(
                "snapshot_epochs needs segmentation.rate constant: only then does a snapshot equal a shorter training"
            )
        if self.snapshot_epochs and self.segmentation.steps is not None:
            raise ValueError("snapshot_epochs counts epochs, so segmentation.steps must not be set")
        return self


class ClassifierSettings(Settings):
    """Voxel classifier: boosted trees on features of the HU around a voxel (LightGBM)."""

    trees: Annotated[int, Field(ge=1, le=2000)] = 200
    """Number of trees."""
    leaves: Annotated[int, Field(ge=2, le=256)] = 31
    """Largest number of leaves of a tree."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Factor by which each tree's output is multiplied."""
    voxels: Annotated[int, Field(ge=100)] = 8000
    """Largest number of training voxels from each copy of a scan."""
    vessel_hu: tuple[float, float] = (10.0, 110.0)
    """Range of the contrast of painted vessels to the liver, in HU. Painted vessels count as healthy."""
    vessel_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of copies with painted vessels."""
    fissure_hu: tuple[float, float] = (-220.0, -100.0)
    """Range of the contrast of painted fat to the liver, in HU. Thin sheets and strands of fat, as in fissures and
    ligaments, count as healthy."""
    fissure_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of copies with painted fat."""
    noise_hu: tuple[float, float] = (0.0, 12.0)
    """Range of the standard deviation of the noise that is added to a copy, in HU."""

    @model_validator(mode="after")
    def _ranges(self) -> ClassifierSettings:
        if not 0 < self.vessel_hu[0] <= self.vessel_hu[1]:
            raise ValueError("vessel_hu must be (low, high) with 0 < low <= high")
        if not self.fissure_hu[0] <= self.fissure_hu[1] < 0:
            raise ValueError("fissure_hu must be (low, high) with low <= high < 0")
        if not 0 <= self.noise_hu[0] <= self.noise_hu[1]:
            raise ValueError("noise_hu must be (low, high) with 0 <= low <= high")
        return self
