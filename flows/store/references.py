"""References to artifacts, which steps pass on to each other."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flows.machine.environment import cache_root


class Ref(BaseModel):
    """A reference to an artifact: its place in the cache, and the digest of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    key: str
    digest: str
    """sha256 over names and digests of all files that are not volatile. Later steps depend on it."""
    path: str
    """Folder of the artifact, relative to the cache."""

    @property
    def made(self) -> bool:
        """Whether the artifact exists. False for the placeholder of an artifact in a dry run."""
        return bool(self.key)

    def folder(self) -> Path:
        """Return the artifact's folder in this process's cache."""
        return cache_root() / self.path


def canonical_json(value: Any) -> str:
    """Return the same text for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return installed versions without local parts, so that CPU and CUDA builds of one release share artifacts."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in names}
