"""What Prefect stores in clear (parameters, logs, states) and where a patient's name could slip in.

Cases go by their id. Paths travel as `PrivatePath`, which shows as a placeholder wherever it is written down, and a
filter takes known paths out of log lines, tracebacks of bugs included.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, PlainSerializer, SerializerFunctionWrapHandler, model_serializer
from pydantic_core.core_schema import SerializationInfo

from medad.config import LiverSettings
from zsad.config import ZsadSettings

PLACEHOLDER = "(private path)"

PrivatePath = Annotated[Path, PlainSerializer(lambda _: PLACEHOLDER, return_type=str, when_used="json")]
"""A path whose JSON is a placeholder, as a field of a model. (Prefect encodes parameters by value, not by annotation:
on a bare parameter this does nothing.)"""


def _hidden_folder(text: str) -> str:
    return text if text.startswith("samples:") else PLACEHOLDER


def _hidden_model(text: str) -> str:
    return f"local-dir:{PLACEHOLDER}" if text.startswith("local-dir:") else text


def _hidden_file(text: str) -> str:
    return f"{PLACEHOLDER}/{PurePath(text).name}"


class Withholding(BaseModel):
    """Settings whose JSON withholds paths: as a flow's parameter, in the manifest, in the report."""

    withheld: ClassVar[Mapping[str, Callable[[str], str]]]
    """Dotted key -> what is shown of its value."""

    @model_serializer(mode="wrap")
    def _withhold(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if info.mode == "json":
            for key, hide in self.withheld.items():
                group, _, leaf = key.partition(".")
                place = values.get(group, {})  # may be excluded
                if place.get(leaf) is not None:
                    place[leaf] = hide(place[leaf])
        return values

    @classmethod
    def of(cls, settings: BaseModel) -> Self:
        """The same settings, kept private. Raises pydantic's ValidationError for those of another flow."""
        return cls.model_validate(settings.model_dump())


class PrivateLiver(Withholding, LiverSettings):
    """The liver flow's, without the data folders."""

    withheld = {"train_data.root": _hidden_folder, "test_data.root": _hidden_folder}


class PrivateZsad(Withholding, ZsadSettings):
    """The flow zsad's, without folders; of a file of weights the name is left."""

    withheld = {
        "data.root": _hidden_folder,
        "data.masks": _hidden_folder,
        "encoder.model": _hidden_model,
        "encoder.weights": _hidden_file,
        "adapt.textures": _hidden_folder,
    }


SHORTEST = 4
"""Names shorter than this are not replaced by themselves: they would garble ordinary words."""

ORDINARY = frozenset({"scan", "label", "labels", "image", "images", "liver", "mask", "dicom", "volume", "segmentation"})
"""Folder names that many layouts share and that say nothing of a patient; hiding them would garble sentences."""


class PathFilter(logging.Filter):
    """Replaces known paths and file names in log records by the id of their case."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, str] = {}
        self._longest_first: list[str] | None = None
        self._lock = threading.Lock()

    def learn(self, path: Path, label: str) -> None:
        """Hide this path, and its file name, behind `label`."""
        with self._lock:
            self._longest_first = None
            for text in (str(path.absolute()), str(path), path.name):
                if len(text) < SHORTEST or text.lower() in ORDINARY:
                    continue
                # one name in two cases' folders tells nothing of which is meant
                self._known[text] = f"<{label}>" if self._known.get(text, f"<{label}>") == f"<{label}>" else "<file>"

    def scrub(self, text: str) -> str:
        """`text` without known paths; longest first, so that a folder does not cut a file in two."""
        with self._lock:
            if self._longest_first is None:
                self._longest_first = sorted(self._known, key=len, reverse=True)
            secrets, labels = self._longest_first, self._known
        for secret in secrets:
            if secret in text:
                text = text.replace(secret, labels[secret])
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
