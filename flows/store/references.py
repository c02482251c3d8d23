"""References to artifacts: what one step hands to the next."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flows.machine.environment import cache_root


class Ref(BaseModel):
    """A reference to an artifact: where it lies in the cache, and what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    key: str
    digest: str
    """sha256 over names and digests of the files, without the volatile ones: what later steps depend on."""
    path: str
    """Folder, relative to the cache."""

    @property
    def made(self) -> bool:
        """False of a reference that stands in for what a dry run does not make."""
        return bool(self.key)

    def folder(self) -> Path:
        """The artifact's folder in this process's cache."""
        return cache_root() / self.path


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions without local parts: a CPU and a CUDA build of one release share artifacts."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}
