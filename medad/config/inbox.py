"""Settings of `adflows liver inbox`: a folder of incoming scans, and the model that segments them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from medad.base.private import DataRoot, PrivatePattern
from medad.base.settings import RunName, load_settings
from medad.config.header import HeaderSettings
from medad.config.liver import DatasetSettings, LiverChanges, flatten_keys
from medad.config.node import ListenSettings, SendSettings
from medad.config.packaged import DEFAULT_MODEL, model_folder
from medad.config.series import SeriesSettings


class InboxSettings(HeaderSettings):
    """An inbox: a folder that receives scans, a folder for the results, and the model that segments the scans.

    `scans` and `livers` are glob patterns below `inbox`, as in a data set of layout `folder`. Each has one `*`, which
    matches the name of the case. Without `livers`, the liver of each scan is found automatically.
    """

    name: RunName
    """Name of the inbox."""
    inbox: DataRoot
    """Folder in which scans arrive. Nothing is ever written into it."""
    out: DataRoot
    """Folder of the results: one folder per case, the folder `failed/`, and the overview."""
    model: DataRoot = DEFAULT_MODEL
    """Run folder of the trained model, or `default`: the package's model."""
    scans: PrivatePattern
    """Pattern of the scans below `inbox`, with one `*` for the case. A folder is read as a DICOM series."""
    livers: PrivatePattern | None = None
    """Pattern of the liver masks below `inbox`, with one `*` for the case. A scan waits for its mask. None: the liver
    of each scan is found automatically."""
    liver_labels: tuple[int, ...] = ()
    """Values of the masks of `livers` that are liver. Empty: their only value, which must be 1."""
    liver_model: DataRoot | None = None
    """Network that finds the livers, without `livers` only: a TorchScript file or a MONAI bundle. None:
    TotalSegmentator if it is installed with weights, else the built-in method."""
    trust_liver_model: bool = False
    """Permission to load a TorchScript file as `liver_model`. It is a program, which runs when it is loaded."""
    unchanged_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Number of seconds for which a scan's files must stay unchanged before the scan is read. Until then the scan may
    still be arriving."""
    series: SeriesSettings | None = None
    """Choice between several CT series of a DICOM folder. None: the one on the grid of the mask; else the case
    fails."""
    dicom: bool = False
    """Writing of DICOM results (SEG, SR, PDF) into `dicom/` of each case. They have the patient's identifiers."""
    listen: ListenSettings | None = None
    """Storage node that receives scans into the inbox: `adflows liver listen`. None: there is none."""
    send: SendSettings | None = None
    """Node that gets the DICOM results, from `adflows liver listen`. None: they stay in the result folder."""
    settings: LiverChanges = Field(default_factory=dict)
    """Changes of the model's settings by dotted key, such as `postprocess.threshold` or `gpus`."""

    @model_validator(mode="after")
    def _patterns_and_folders(self) -> InboxSettings:
        patterns = {"scans": self.scans} | ({} if self.livers is None else {"livers": self.livers})
        for name, pattern in patterns.items():
            if pattern.count("*") != 1:
                raise ValueError(f"`{name}` must be a pattern with exactly one *, which matches the name of the case")
            if pattern.startswith("/") or ".." in Path(pattern).parts:
                raise ValueError(f"`{name}` must be a pattern below the inbox")
        if self.scans == self.livers:
            raise ValueError("`scans` and `livers` are the same pattern")
        if self.livers is None and self.liver_labels not in ((), (1,)):
            raise ValueError("`liver_labels` are values of the masks of `livers`, which is missing")
        if self.livers is not None and self.liver_model is not None:
            raise ValueError("`liver_model` finds livers only without `livers`; remove one of them")
        if self.listen is not None and self.scans != "*":
            raise ValueError("`listen` writes each series into a folder of its own, so `scans` must be '*'")
        if self.send is not None and not self.dicom:
            raise ValueError("`send` sends DICOM results; set `dicom: true`")
        inbox, out, model = (folder.resolve() for folder in (self.inbox_folder, self.out_folder, self.model_folder))
        if inbox == out or inbox in out.parents or out in inbox.parents:
            raise ValueError("`inbox` and `out` must be two folders, neither inside the other")
        if model == out:
            raise ValueError("`out` must not be the model's folder")
        return self

    @property
    def inbox_folder(self) -> Path:
        return Path(self.inbox).expanduser().absolute()

    @property
    def out_folder(self) -> Path:
        return Path(self.out).expanduser().absolute()

    @property
    def model_folder(self) -> Path:
        """Return the model's folder. Raises ConfigError if it is `default` and the package has no such model."""
        return model_folder(self.model).absolute()

    @property
    def liver_model_path(self) -> Path | None:
        return None if self.liver_model is None else Path(self.liver_model).expanduser().absolute()

    @property
    def settings_by_key(self) -> dict[str, Any]:
        """Return `settings` as a flat mapping of dotted keys."""
        return dict(flatten_keys(self.settings))

    def data(self, root: str) -> DatasetSettings:
        """Return the inbox as a data set at `root`. Its case ids are pseudonyms."""
        return DatasetSettings(
            root=root,
            layout="folder",
            images=self.scans,
            labels=self.livers,
            liver_labels=self.liver_labels,
            affine_mismatch=self.affine_mismatch,
            affine_from=self.affine_from,
            spacing_mm=self.spacing_mm,
            series=self.series,
            fill_cavities=True,
            pseudonyms=True,
        )


def load_inbox(path: Path, overrides: Mapping[str, Any] | None = None) -> InboxSettings:
    """Read a YAML configuration and apply overrides by dotted key. Raises ConfigError."""
    return load_settings(InboxSettings, path, overrides)
