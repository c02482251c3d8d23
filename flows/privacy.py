"""What Prefect stores in clear (parameters, logs, states) and where a patient's name could slip in.

Cases go by their id. Paths travel as `PrivatePath`, which shows as a placeholder wherever it is written down, and a
filter takes known paths out of log lines, tracebacks of bugs included.
"""

from __future__ import annotations

import logging
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, SerializerFunctionWrapHandler, model_serializer
from pydantic_core.core_schema import SerializationInfo

from medad.config import LiverSettings

PLACEHOLDER = "(private path)"

PrivatePath = Annotated[Path, PlainSerializer(lambda _: PLACEHOLDER, return_type=str, when_used="json")]
"""A path whose JSON is a placeholder, as a field of a model. (Prefect encodes parameters by value, not by annotation:
on a bare parameter this does nothing.)"""


class PrivateSettings(LiverSettings):
    """Settings whose JSON withholds the data folders: as a flow's parameter, in the manifest, in the report."""

    @model_serializer(mode="wrap")
    def _withhold(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if info.mode == "json":
            for name in ("train_data", "test_data"):
                if name in values and not values[name]["root"].startswith("samples:"):
                    values[name]["root"] = PLACEHOLDER
        return values

    @classmethod
    def of(cls, settings: LiverSettings) -> PrivateSettings:
        return cls.model_validate(settings.model_dump())


SHORTEST = 4
"""Names shorter than this are not replaced by themselves: they would garble ordinary words."""

ORDINARY = frozenset({"scan", "label", "labels", "image", "images", "liver", "mask", "dicom", "volume", "segmentation"})
"""Folder names that many layouts share and that say nothing of a patient; hiding them would garble sentences."""


class PathFilter(logging.Filter):
    """Replaces known paths and file names in log records by the id of their case."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def learn(self, path: Path, label: str) -> None:
        """Hide this path, and its file name, behind `label`."""
        with self._lock:
            for text in (str(path.absolute()), str(path), path.name):
                if len(text) < SHORTEST or text.lower() in ORDINARY:
                    continue
                # one name in two cases' folders tells nothing of which is meant
                self._known[text] = f"<{label}>" if self._known.get(text, f"<{label}>") == f"<{label}>" else "<file>"

    def scrub(self, text: str) -> str:
        """`text` without known paths; longest first, so that a folder does not cut a file in two."""
        with self._lock:
            known = sorted(self._known.items(), key=lambda item: -len(item[0]))
        for secret, label in known:
            text = text.replace(secret, label)
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self.scrub(record.getMessage()), ()
        if record.exc_info:
            kind, error, trace = record.exc_info
            # "NoneType: None" is what Prefect logs below a failed state that no exception caused
            record.exc_text = (
                self.scrub("".join(traceback.format_exception(kind, error, trace))) if error is not None else None
            )
            record.exc_info = None
        return True


path_filter = PathFilter()


def install() -> None:
    """Put the filter before Prefect's handlers. Loggers' own filters see only their own records, hence each by name."""
    for name in ("prefect.task_runs", "prefect.flow_runs"):
        logger = logging.getLogger(name)
        if path_filter not in logger.filters:
            logger.addFilter(path_filter)
