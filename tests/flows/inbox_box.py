"""An inbox in a test's folder, and phantoms to put into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Cli = Callable[..., Any]


@dataclass(frozen=True)
class Box:
    """A folder with a configuration, an inbox and a folder of results."""

    root: Path
    phantoms: Path
    """LiTS phantoms to put into the inbox."""
    model: Path
    cli: Cli | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inbox.mkdir(parents=True, exist_ok=True)
        self.configure()

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def config(self) -> Path:
        return self.root / "box.yaml"

    def configure(self, **changes: Any) -> None:
        """Write the configuration again, with these changes."""
        self.settings.update(changes)
        values = {
            "name": "box",
            "inbox": str(self.inbox),
            "out": str(self.out),
            "model": str(self.model),
            "scans": "*/scan.nii.gz",
            "livers": "*/liver.nii.gz",
            "liver_labels": [1, 2],
            "unchanged_s": 0,
        } | self.settings
        self.config.write_text(yaml.safe_dump(values), encoding="utf-8")

    def drop(self, name: str, phantom: int, *, liver: bool = True) -> Path:
        """Put a scan with its mask into the inbox. Return the scan."""
        folder = self.inbox / name
        folder.mkdir()
        if liver:
            self.drop_liver(name, phantom)
        return Path(shutil.copy(self.phantoms / f"volume-{phantom}.nii.gz", folder / "scan.nii.gz"))

    def drop_liver(self, name: str, phantom: int) -> None:
        shutil.copy(self.phantoms / f"segmentation-{phantom}.nii.gz", self.inbox / name / "liver.nii.gz")

    def drop_broken(self, name: str, phantom: int) -> Path:
        """Put a scan with a truncated gzip stream into the inbox. Return the scan."""
        scan = self.drop(name, phantom)
        scan.write_bytes(scan.read_bytes()[:-300])
        return scan

    def run(self, *options: object) -> Any:
        """Run one pass by the command line."""
        assert self.cli is not None
        return self.cli("liver", "inbox", self.config, "--json", *options)

    def segmented(self, *options: object, code: int = 0) -> list[str]:
        """Run one pass and return the cases that it segmented."""
        ran = self.run(*options)
        assert ran.code == code, ran.err
        found: list[str] = ran.answer["segmented"]
        return found

    def results(self) -> list[str]:
        """Return the ids of the cases that have a result."""
        return sorted(path.parent.name for path in self.out.glob("[!.]*/manifest.json"))

    def failures(self) -> dict[str, dict[str, Any]]:
        """Return the contents of failed/*.json by case."""
        return {path.stem: read(path) for path in sorted((self.out / "failed").glob("*.json"))}

    def overview(self) -> Any:
        return read(self.out / "inbox.json")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
