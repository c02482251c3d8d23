"""A trained model in a run folder of the liver flow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medad.base.errors import ConfigError
from medad.base.manifest import MANIFEST, read_manifest
from medad.config.liver import LiverSettings


@dataclass(frozen=True)
class TrainedModel:
    """Two trained networks and the settings of the run that trained them."""

    settings: LiverSettings
    restoration: Path
    """Folder of the restoration network's `model.safetensors`."""
    segmentation: Path
    """Folder of the segmentation network's `model.safetensors`."""

    @classmethod
    def of_run(cls, run: Path) -> TrainedModel:
        """Find the model of a run folder. Raises ConfigError if it is not a run folder or contains no model."""
        try:
            settings = LiverSettings.model_validate(read_manifest(run)["settings"])
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{run}: not the run folder of a liver run ({MANIFEST} has other settings)") from error
        found = cls(settings, run / "model" / "restoration", run / "model" / "segmentation")
        for network in (found.restoration, found.segmentation):
            if not (network / "model.safetensors").is_file():
                raise ConfigError(f"{run}: this run contains no trained {network.name} network")
        return found
