"""List folders and image files by name, for the readers of layouts. Opens no file and skips hidden files."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from medad.base.errors import InputError
from medad.base.manifest import is_run_folder
from medad.base.storage import reading
from medad.base.text import natural_order
from zsad.data.images import IMAGE_SUFFIXES

_JUNK_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r"})
_JUNK_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"})
_LONGEST_ENDING = 8
_SHOWN_ENDINGS = 8
_HEIC = frozenset({".heic", ".heif", ".hif"})
_HEIC_ADVICE = "HEIC is read after: pip install 'adflows[heic]'"
_SPECIAL = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))
UNLABELLED = "unlabelled"
"""Kind of `LeftOut.add` for images in a folder whose name says that the label is unknown."""
BESIDE = "mask beside an image"
"""Kind of `LeftOut.add` for masks in the folders of their images."""
_RESULTS = "folder of results"
_ENDING, _SPECIAL_FILE, _FOLDER = "ending", "special file", "folder"


@dataclass(frozen=True)
class FoundImage:
    """Image that has no id yet. With a `rule` that it breaks, it is reported as a problem."""

    key: str
    """Relative path with its suffix. Empty if the rule concerns the whole category."""
    path: Path
    defect: str
    """Kind of defect, `good` or a similar name for a normal image, or empty without a label."""
    anomalous: bool | None
    """Label. None: unknown."""
    mask: Path | None = None
    """Mask file, or a folder of masks whose union is the mask."""
    rule: str | None = None
    """Rule that the image breaks. None: the image is usable."""


@dataclass
class LeftOut:
    """Record of what a listing left out or assumed. A path is counted once, even if it is listed several times."""

    _paths: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the label folders of each category that has no folder with normal images. Empty if hidden."""
    guessed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of sub-folders that look like labels, by category. Its images have no labels. Empty if hidden."""

    def add(self, kind: str, what: str, path: Path | str) -> None:
        """Count a path under a kind, such as `ending`, and a name, such as `.heic`."""
        self._paths.setdefault((kind, what), set()).add(str(path))

    def add_folder(self, folder: Path, images: int) -> None:
        """Count a folder of masks or training images that is not scored, with its number of images."""
        for number in range(images):
            self.add(_FOLDER, folder.name, f"{folder}#{number}")

    def add_file(self, path: Path) -> None:
        """Count a file that is not an image by its ending. Known junk is not counted."""
        if not _is_junk(path.name):
            self.add(_ENDING, _ending(path.name), path)

    def counts(self, kind: str) -> dict[str, int]:
        """Return the number of paths of a kind by name, the largest first."""
        found = {what: len(paths) for (each, what), paths in self._paths.items() if each == kind}
        return dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))

    def hide_names(self) -> None:
        """Forget the names of label folders, which pseudonyms hide."""
        self.labels = dict.fromkeys(self.labels, ())
        self.guessed = dict.fromkeys(self.guessed, ())

    @property
    def endings(self) -> dict[str, int]:
        """Number of skipped files by ending in lower case. `no ending` counts those without one."""
        return self.counts(_ENDING)

    @property
    def folders(self) -> dict[str, int]:
        """Number of images in skipped folders by the folder's name, such as `ground_truth`."""
        return self.counts(_FOLDER)

    @property
    def sentence(self) -> str:
        """Everything that was left out, in one line without paths. Empty if there is nothing to say."""
        endings = list(self.endings.items())
        parts = [f"{count} x {ending}" for ending, count in endings[:_SHOWN_ENDINGS]]
        if rest := sum(count for _, count in endings[_SHOWN_ENDINGS:]):
            parts.append(f"{rest} x other endings")
        parts += [_counted(count, f"image in {name}/", f"images in {name}/") for name, count in self.folders.items()]
        if beside := sum(self.counts(BESIDE).values()):
            parts.append(_counted(beside, "mask beside its image", "masks beside their images"))
        parts += [_counted(count, what, _plural(what)) for what, count in self.counts(_SPECIAL_FILE).items()]
        text = f"Left out: {', '.join(parts)}." if parts else ""
        if not _HEIC.isdisjoint(self.endings):
            text += f" {_HEIC_ADVICE}."
        for name, count in self.counts(UNLABELLED).items():
            text += f" {_counted(count, 'image', 'images')} in {name}/ without a label."
        if followed := sum(self.counts("followed").values()):
            text += f" Followed {_counted(followed, 'linked folder', 'linked folders')}."
        return text.strip()


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _plural(what: str) -> str:
    return "folders of results" if what == _RESULTS else f"{what}s"


def _ending(name: str) -> str:
    ending = readable_name(Path(name).suffix.lower())
    if not ending:
        return "no ending"
    return ending if len(ending) <= _LONGEST_ENDING and ending[1:].isalnum() else "other endings"


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK_FILES


def readable_name(name: str) -> str:
    """Return a file's name as valid text. Bytes that are not UTF-8 are read as Windows-1252, as old archives have."""
    return (
        "".join(
            bytes([ord(each) - 0xDC00]).decode("cp1252", "replace") if "\udc80" <= each <= "\udcff" else each
            for each in name
        )
        .encode("utf-8", "replace")
        .decode()
    )


def files_below(folder: Path, suffixes: tuple[str, ...], left_out: LeftOut | None = None) -> list[Path]:
    """Return the sorted relative paths of all visible files with these suffixes at any depth.

    A linked folder is followed once, after all real folders, so that loops end and real names win. A link to a folder
    above is not followed. Pipes, sockets, devices, broken links and the results of runs are passed over.

    Parameters
    ----------
    left_out
        Record to which everything that is passed over is added.

    Raises
    ------
    InputError
        The folder cannot be read. A folder below it that cannot be read is only recorded.
    """
    record = LeftOut() if left_out is None else left_out
    found = []
    for path in _files(folder, record):
        if is_visible(path.name, suffixes):
            found.append(path.relative_to(folder))
        else:
            record.add_file(path)
    return sorted(found)


def _files(top: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield all regular files at any depth, also of linked folders, under their names below `top`."""
    with reading(top):
        known = {_identity(top)}
        above = {_identity(folder) for folder in top.resolve().parents}
        waiting, links = deque([top]), deque[Path]()
        while waiting or links:
            here = waiting.popleft() if waiting else links.popleft()
            if here.is_symlink() and here != top:
                if _identity(here) in above | known:
                    left_out.add(_SPECIAL_FILE, "repeated folder link", here)
                    continue
                left_out.add("followed", "linked folder", here)
            known.add(_identity(here))
            try:
                entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            except OSError:
                if here == top:
                    raise
                left_out.add(_SPECIAL_FILE, "unreadable folder", here)
                continue
            for entry in entries:
                path = here / entry.name
                if entry.is_dir():
                    if _is_hidden_folder(entry.name) or _is_result(path, left_out):
                        continue
                    if entry.is_symlink():
                        links.append(path)
                    elif _identity(path) not in known:
                        waiting.append(path)
                elif is_regular(path, left_out):
                    yield path


def is_regular(path: Path, left_out: LeftOut | None = None) -> bool:
    """Return whether a path is a file with content, or a link to one. Records pipes, sockets and broken links."""
    try:
        mode = path.stat().st_mode
    except OSError:
        if left_out is not None and not _is_junk(path.name):
            left_out.add(_SPECIAL_FILE, "broken link", path)
        return False
    if stat.S_ISREG(mode):
        return True
    if left_out is not None:
        left_out.add(_SPECIAL_FILE, special_kind(mode), path)
    return False


def special_kind(mode: int) -> str:
    """Return the name of a special file's kind by its mode: `pipe`, `socket` or `device`."""
    return next((what for test, what in _SPECIAL if test(mode)), "special file")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_hidden_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK_FOLDERS


def _is_result(folder: Path, left_out: LeftOut | None) -> bool:
    """Return whether a folder holds the results of a run. Its maps and overlays must not be scored, so record it."""
    if not is_run_folder(folder):
        return False
    if left_out is not None:
        left_out.add(_SPECIAL_FILE, _RESULTS, folder)
    return True


def images_below(folder: Path, left_out: LeftOut | None = None) -> list[Path]:
    """Return the sorted relative paths of all images at any depth. Raises InputError if the folder cannot be read."""
    return files_below(folder, IMAGE_SUFFIXES, left_out)


def folders_in(folder: Path, left_out: LeftOut | None = None) -> list[Path]:
    """Return the visible folders in a folder, in natural order. Raises InputError if it cannot be read.

    A link to the folder itself or to a folder above it is left out, because it forms a loop. A folder with the results
    of a run is left out and recorded.
    """
    with reading(folder):
        found = [path for path in folder.iterdir() if not _is_hidden_folder(path.name) and path.is_dir()]
        found = [path for path in found if not (path.is_symlink() and folder.resolve().is_relative_to(path.resolve()))]
    found = [path for path in found if not _is_result(path, left_out)]
    return sorted(found, key=lambda path: natural_order(path.name))


def files_in(folder: Path, suffixes: tuple[str, ...], left_out: LeftOut | None = None) -> list[Path]:
    """Return the visible files with these suffixes in a folder, sorted. Raises InputError if it cannot be read."""
    with reading(folder):
        files = [path for path in folder.iterdir() if not path.is_dir() and is_regular(path, left_out)]
    if left_out is not None:
        for path in files:
            if not is_visible(path.name, suffixes):
                left_out.add_file(path)
    return sorted(path for path in files if is_visible(path.name, suffixes))


def is_visible(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file name is not hidden and has one of these suffixes, in upper or lower case."""
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes


def require_file(path: Path) -> None:
    """Raise InputError if a path given by name is not a file with content, such as a pipe."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(path, "no such file or folder") from error
    if not stat.S_ISREG(mode):
        raise InputError(path, f"is a {special_kind(mode)}, not an image file")
