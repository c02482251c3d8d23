"""What of a training survives a kill: its state, and the snapshots it has taken so far."""

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
    """`snapshot-0005.safetensors`: the network after so many whole epochs."""
    return f"snapshot-{epoch:04d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A file, and beside it one more for each snapshot taken.

    Attributes
    ----------
    path
        Of the state; need not exist.
    fingerprint
        Digest of all that decides the weights: the state of anything else is not resumed.
    """

    path: Path
    fingerprint: str

    def snapshot_path(self, epoch: int) -> Path:
        """Where a snapshot waits for the training's end; its name ends like the state's, so both are pruned alike."""
        return self.path.with_name(f"{self.path.stem}.snapshot-{epoch:04d}{self.path.suffix}")

    def save(self, net: nn.Module, optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
        """Write the state after as many steps as there are losses. Raises DiskFullError."""
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
        """The state, or None when there is none, it is damaged, or it belongs to another training."""
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
        """Whether all of these snapshots are here."""
        return all(self.snapshot_path(epoch).is_file() for epoch in epochs)

    def finish(self, epochs: Sequence[int], out: Path) -> None:
        """Hand the snapshots over to `out`, and forget the state."""
        for epoch in epochs:
            shutil.move(self.snapshot_path(epoch), out / snapshot_name(epoch))
        self.path.unlink(missing_ok=True)
