"""Checkpoint of a training: its state and the snapshots taken so far, to resume after a crash."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medad.base.storage import atomic_path


def snapshot_name(epoch: int) -> str:
    """Return the file name of the network after `epoch` complete epochs, e.g. `snapshot-0005.safetensors`."""
    return f"snapshot-{epoch:04d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A file with the training state, and next to it one file per snapshot.

    Attributes
    ----------
    path
        File of the state; it need not exist yet.
    fingerprint
        Digest of everything that determines the weights. A state with another fingerprint is not resumed.
    """

    path: Path
    fingerprint: str

    def snapshot_path(self, epoch: int) -> Path:
        """Return where a snapshot is stored until training ends.

        Its name ends like that of the state, so the same pruning removes both.
        """
        return self.path.with_name(f"{self.path.stem}.snapshot-{epoch:04d}{self.path.suffix}")

    def save(self, net: nn.Module, optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
        """Write the training state. There is one loss per finished step. Raises DiskFullError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "fingerprint": self.fingerprint,
            "net": net.state_dict(),
            "optimiser": optimiser.state_dict(),
            "losses": losses,
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Return the state. None: it is missing, damaged, or of another training."""
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError):
            return None
        if not isinstance(state, dict) or state.get("fingerprint") != self.fingerprint:
            return None
        return state

    def has_snapshots(self, epochs: Sequence[int]) -> bool:
        """Check whether the snapshots of all these epochs exist."""
        return all(self.snapshot_path(epoch).is_file() for epoch in epochs)

    def finish(self, epochs: Sequence[int], out: Path) -> None:
        """Move the snapshots to `out` and delete the state."""
        for epoch in epochs:
            shutil.move(self.snapshot_path(epoch), out / snapshot_name(epoch))
        self.path.unlink(missing_ok=True)
