"""Copies of the results of `adflows liver export-slices` and `step` out of the cache."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

from medad.base.errors import ConfigError


def copy_pictures(exported: list[dict[str, Any]], target: Path) -> None:
    """Copy the pictures of all cases into one data set; their names begin with the case's id.

    Replaces each case's entry `folder` by the number of its slices.
    """
    work = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        for each in exported:
            folder, each["slices"] = Path(each.pop("folder")), 0
            for picture in sorted(folder.rglob("*.png")):
                below = picture.relative_to(folder)
                copy = work / below.with_name(f"{each['case']}-{below.name}")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, copy)
                each["slices"] += below.parts[0] != "ground_truth"
        work.rename(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def copy_result(folder: Path, out: Path, name: str | None = None) -> Path:
    """Copy a step's file `name`, or its only file, to the path that was given.

    Raise ConfigError if its ending is of another format.
    """
    from medad.ct.io import atomic_path

    names = (path for path in sorted(folder.iterdir()) if path.name != "artifact.json")
    result = next(names) if name is None else folder / name
    ending = ".nii.gz" if result.name.endswith(".nii.gz") else result.suffix
    if out.is_dir() or not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        out = out / result.name
    elif not out.name.endswith(ending):
        raise ConfigError(f"{out}: this step writes a {ending} file")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        shutil.copyfile(result, temporary)
    return out.absolute()
