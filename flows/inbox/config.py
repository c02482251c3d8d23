"""The inbox of a pass: its configuration, its model, and the results so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from flows.inbox.arrivals import Arrival, Content, list_arrivals, recall_content
from flows.inbox.results import OutFolder, Row
from flows.liver import run_folder as liver_folder
from flows.liver.mask_steps import LIVER_MASK, finder_content
from flows.liver.steps import PREPARE, REPORT, SEGMENT
from flows.machine.environment import find_config
from flows.store.digests import path_digest
from flows.store.step import content_key, keyed
from medad.base.errors import ConfigError
from medad.config.inbox import InboxSettings, load_inbox
from medad.config.liver import LiverSettings
from medad.steps.trained import TrainedModel

ALL_FAILED = "failed"
"""Value in `retry` that means every failed case."""


class InboxRequest(BaseModel):
    """The inbox to process. Prefect stores this in plain text, so it must not name a scan or a patient."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str = Field(description="Name of a configuration in configs/inbox, or a YAML file.")
    retry: tuple[str, ...] = Field(
        default=(), description=f"Ids of cases to try again; '{ALL_FAILED}' means all failed cases."
    )
    overrides: SkipJsonSchema[dict[str, Any]] = Field(default_factory=dict, exclude=True, repr=False)
    """Values from the command line that override the file, by dotted key. Not stored, because they may be paths."""

    @property
    def label(self) -> str:
        """The configuration's name, without a folder."""
        return Path(self.config).stem


@dataclass(frozen=True)
class Inbox:
    """An inbox with its settings, model settings and result folder."""

    settings: InboxSettings
    liver: LiverSettings
    """Settings of the model's run, with the inbox as test data."""
    folder: OutFolder

    @classmethod
    def open(cls, request: InboxRequest) -> Inbox:
        """Read the configuration and the model's settings.

        Raises
        ------
        ConfigError
            A setting breaks a rule, or the model is not a run folder.
        InputError
            The network that finds the livers does not exist.
        """
        settings = load_inbox(find_config(Path(request.config), "inbox"), request.overrides)
        model, values = settings.model_folder, settings.settings_by_key
        for key in values:
            if key.partition(".")[0] in {"name", "train_data", "test_data"}:
                raise ConfigError(f"{request.config}: settings.{key}: not a setting for the segmentation of an inbox")
        if settings.liver_model_path is not None:
            from medad.steps.liver_mask import choose_finder

            choose_finder(settings.liver_model_path, trust=settings.trust_liver_model)
        of_model = liver_folder.settings_of_run(model)
        liver = liver_folder.settings_with_changes(of_model, values, model=model, source=f"{request.config}: settings")
        # cases are given one by one, so their folder and patterns are not part of a result
        labels = None if settings.livers is None else "*"
        data = settings.data("-").model_copy(update={"images": "*", "labels": labels})
        update = {"name": f"inbox-{settings.name}"[:64], "test_data": data}
        return cls(settings, liver.model_copy(update=update), OutFolder(settings.out_folder))

    @cached_property
    def finder(self) -> dict[str, Any] | None:
        """Content of the method that finds the livers. None: the masks are given."""
        from medad.steps.liver_mask import choose_finder

        settings = self.settings
        if settings.livers is not None:
            return None
        return finder_content(choose_finder(settings.liver_model_path, trust=settings.trust_liver_model))

    @cached_property
    def tried_with(self) -> str:
        """sha256 over everything besides the scan that a failure may depend on: model, method, settings, program."""
        finding = () if self.finder is None else (LIVER_MASK,)
        values = {
            "program": [step.key_parts({}) for step in (*finding, PREPARE, SEGMENT, REPORT)],
            "finder": self.finder,
            "model": [path_digest(path) for path in TrainedModel.of_run(self.settings.model_folder).files],
            "settings": keyed(self.liver, "name", "train_data", "test_data", "train", "synthesis").content,
            "data": self.liver.test_data.public(),
        }
        return content_key(values)

    def should_segment(self, content: Content, rows: Mapping[str, Row], retry: Iterable[str]) -> bool:
        """Return whether to segment this content: it is new, it failed with another `tried_with`, or `retry` has it.

        Raises UserError if the model cannot be read.
        """
        row = rows.get(content.digest)
        if row is None or row.case in retry or (row.status == "failed" and ALL_FAILED in retry):
            return True
        return row.status == "failed" and row.tried_with != self.tried_with

    def check_retry(self, rows: Mapping[str, Row], retry: Iterable[str]) -> None:
        """Raise ConfigError for an unknown case."""
        known = {row.case for row in rows.values()} | {ALL_FAILED}
        for case_id in retry:
            if case_id not in known:
                raise ConfigError(f"{case_id}: no such case in {self.folder.path}")


def new_arrivals(inbox: Inbox) -> set[Arrival]:
    """Return the scans that a pass would read or segment. Runs no step and reads no scan. Raises UserError."""
    rows = inbox.folder.rows()
    found = {
        arrival: recall_content(arrival, inbox.settings.liver_labels)
        for arrival in list_arrivals(inbox.settings).arrivals
    }
    return {arrival for arrival, content in found.items() if content is None or inbox.should_segment(content, rows, ())}


def has_news(request: InboxRequest) -> bool:
    """Return whether a pass would have work to do. Raises UserError."""
    inbox = Inbox.open(request)
    return bool(request.retry) or bool(new_arrivals(inbox))


def list_scans(inbox: Inbox) -> list[dict[str, Any]]:
    """Return each scan in the inbox with its status and its paths, for the user's terminal.

    No scan is read: one that was never read has the status new. Raises UserError.
    """
    rows = inbox.folder.rows()
    found = list_arrivals(inbox.settings)
    listed = []
    for arrival in found.arrivals:
        content = recall_content(arrival, inbox.settings.liver_labels)
        row = None if content is None else rows.get(content.digest)
        entry = (
            {"status": "new", "case": "", "rule": ""}
            if row is None
            else {"status": row.status, "case": row.case, "rule": row.rule}
        )
        listed.append(entry | {"scan": str(arrival.scan), "liver": str(arrival.liver or "")})
    for each in found.waiting:
        listed.append({"status": "waiting", "case": "", "rule": each.rule, "scan": str(each.path), "liver": ""})
    return sorted(listed, key=lambda entry: str(entry["scan"]))
