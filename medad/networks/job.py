"""A training job: the part of a training that differs between phases, and the digest of all that decides its result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medad.anomalies.synthesis import Synthesised
from medad.anomalies.textures import Textures
from medad.base.errors import ConfigError
from medad.base.storage import file_digest
from medad.config.liver import LiverSettings, NetSettings
from medad.config.training import PhaseSettings
from medad.networks import nets
from medad.networks.batches import INITIAL, HealthySlices, generator_for


@dataclass(frozen=True)
class Job:
    """The part of a training that differs between phases.

    Attributes
    ----------
    name
        Name in reports and progress.
    net_settings
        Settings of the networks to train. The first role also selects the stream of random numbers.
    phase
        Epochs, batch size and learning rate.
    loss
        Function of the trained networks, the corrupted batch and its clean slices.
    frozen
        Digest of the weights that the loss uses but does not train.
    snapshots
        Epochs after which the network is saved, ascending.
    copies
        Folders of copies with lesions.
    initial
        Folder of the network to start from. None: the initial weights are random.
    """

    name: str
    net_settings: Mapping[nets.Role, NetSettings]
    phase: PhaseSettings
    loss: Callable[[nn.ModuleDict, Synthesised, Tensor], Tensor]
    frozen: str = ""
    snapshots: tuple[int, ...] = ()
    copies: Sequence[Path] = ()
    initial: Path | None = None

    @property
    def random_stream(self) -> nets.Role:
        return next(iter(self.net_settings))

    def initial_net(self, role: nets.Role, shape: NetSettings, seed: int) -> nn.Module:
        """Return a network with its initial weights. Raises ConfigError if those to start from do not fit."""
        if self.initial is None:
            return nets.build(role, shape, generator_for(seed, role, INITIAL, 0, torch.device("cpu")))
        net, found = nets.load(self.initial / nets.MODEL, role)
        if found != shape:
            raise ConfigError(f"{role}: its settings differ from those of the network that the training starts from")
        return net


def fingerprint(job: Job, settings: LiverSettings, data: HealthySlices, textures: Textures | None) -> str:
    """Return a digest of everything that determines the weights.

    A checkpoint with another digest must not be resumed.
    """
    digest = hashlib.sha256(data.pixels.cpu().numpy().tobytes())
    digest.update(np.packbits(data.organ.cpu().numpy()).tobytes())
    parts = (
        job.name,
        *(shape.model_dump_json() for shape in job.net_settings.values()),
        job.phase.model_dump_json(),
        job.frozen,
        *(file_digest(path) for folder in job.copies for path in sorted(folder.glob("*.safetensors"))),
        "" if job.initial is None else file_digest(job.initial / nets.MODEL),
        settings.synthesis.model_dump_json(exclude={"texture": {"folder"}}),
        "" if settings.train.augmentation is None else settings.train.augmentation.model_dump_json(),
        str(settings.train.flip),
        str((data.pixel_mm.tolist(), data.grey_per_hu)),
        "" if textures is None else textures.digest,
        settings.train.focal.model_dump_json(),
        settings.train.restoration_loss,
        str(settings.train.mixed_precision),
        str(settings.seed),
        torch.__version__,
    )
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()
