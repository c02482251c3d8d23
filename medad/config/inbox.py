"""Settings of `adflows liver inbox`: a folder of scans, and the model that segments them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medad.base.private import DataRoot, PrivatePattern
from medad.base.settings import RunName, Settings, load_settings
from medad.config.liver import DatasetSettings, LiverChanges, by_key


class InboxSettings(Settings):
    """A folder into which scans are dropped, and where each goes once it is segmented.

    `scans` and `livers` are patterns below `inbox` as in `DatasetSettings`' layout folder: one `*` each, which stands
    for the case.
    """

    name: RunName
    """Name of the inbox."""
    inbox: DataRoot
    """Folder in which scans arrive. It is never written to."""
    out: DataRoot
    """Folder of results: one folder per case, `failed/`, and the overview."""
    model: DataRoot
    """Folder of a run with trained networks."""
    scans: PrivatePattern
    """Pattern of the scans below `inbox`, with one `*` for the case. A folder is read as a DICOM series."""
    livers: PrivatePattern
    """Pattern of the liver masks below `inbox`, with one `*` for the case."""
    liver_labels: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    """Values of liver in the masks."""
    unchanged_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Seconds without a change of its files after which a scan is read. Until then it may still be arriving."""
    affine_mismatch: Literal["error", "warn"] = "error"
    """Reaction to a mask of the scan's shape with another affine."""
    affine_from: Literal["agree", "sform", "qform"] = "agree"
    """NIfTI affine that counts. `agree` refuses a file whose sform and qform differ."""
    settings: LiverChanges = Field(default_factory=dict)
    """Changes of the model run's settings by dotted key, as `postprocess.threshold` or `gpus`."""

    @model_validator(mode="after")
    def _patterns_and_folders(self) -> InboxSettings:
        for name in ("scans", "livers"):
            pattern = getattr(self, name)
            if pattern.count("*") != 1:
                raise ValueError(f"`{name}` must be a pattern with exactly one *, which stands for the case")
            if pattern.startswith("/") or ".." in Path(pattern).parts:
                raise ValueError(f"`{name}` must be a pattern below the inbox")
        if self.scans == self.livers:
            raise ValueError("`scans` and `livers` are the same pattern")
        inbox, out, model = (folder.resolve() for folder in (self.inbox_folder, self.out_folder, self.model_folder))
        if inbox == out or inbox in out.parents or out in inbox.parents:
            raise ValueError("`inbox` and `out` must be two folders, neither inside the other")
        if model == out:
            raise ValueError("`out` is the model's folder; results need one of their own")
        return self

    @property
    def inbox_folder(self) -> Path:
        return Path(self.inbox).expanduser().absolute()

    @property
    def out_folder(self) -> Path:
        return Path(self.out).expanduser().absolute()

    @property
    def model_folder(self) -> Path:
        return Path(self.model).expanduser().absolute()

    @property
    def settings_by_key(self) -> dict[str, Any]:
        """`settings` by dotted key, however deep they were nested."""
        return dict(by_key(self.settings))

    def data(self, root: str) -> DatasetSettings:
        """The inbox as a data set, at `root`; file names name no case."""
        return DatasetSettings(
            root=root,
            layout="folder",
            images=self.scans,
            labels=self.livers,
            liver_labels=self.liver_labels,
            affine_mismatch=self.affine_mismatch,
            affine_from=self.affine_from,
            pseudonyms=True,
        )


def load_inbox(path: Path, overrides: Mapping[str, Any] | None = None) -> InboxSettings:
    """Read a YAML configuration, with values by dotted key put over the file's. Raises ConfigError."""
    return load_settings(InboxSettings, path, overrides)
