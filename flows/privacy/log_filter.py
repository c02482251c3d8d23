"""The filter on what leaves a process as text: log records of every logger, warnings, messages of states.

It knows the inputs' paths, the names on the way to them and the free text of their headers, and replaces them by the
label of their case, however they are written. Any other absolute path that is not the program's own is hidden as well,
and so is what looks like a DICOM identifier or name: what has not been learned yet must not slip by either.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import re
import sys
import sysconfig
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from flows.machine.environment import cache_root
from flows.privacy.redactor import SHORTEST, Redactor
from flows.store.step import Call, Keyed
from medad.base.errors import InputError, UserError
from medad.base.private import ORDINARY
from medad.base.text import PLACEHOLDER
from medad.config.liver import DatasetSettings, LiverSettings
from zsad.config.run import ImagesSettings

UID, NAME = "<uid>", "<name>"

_UID = re.compile(r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d{0,38})){5,}(?![\w.]*\w)")
_CARET_NAME = re.compile(r"[^\W\d_][\w'-]*\^[^\W\d_][\w'-]*(?:\^[\w' -]*\w)*")
_QUOTED_PATH = re.compile(r"(['\"])(/[^'\"\n]+)\1")
_BARE_PATH = re.compile(r"(?<![\w.:/>~)-])(?:/[^\s/'\"<>|:;,()\[\]{}]+){2,}/?|file:/+[^\s'\"<>]+")
_WORD = re.compile(r"[^\W_]{4,}")
_SHORT_NUMBER = re.compile(r"[\d.,+-]{1,5}")
_ENDINGS = re.compile(r"(?i)(\.nii\.gz|\.[a-z][a-z0-9]{0,4})$")
_SOURCES = frozenset({"scan", "label", "source", "liver"})
"""Fields of jobs that hold a scan or mask, whose header is read for its free text."""
_MOST_NAMES = 200

P = ParamSpec("P")
R = TypeVar("R")


class PathFilter(logging.Filter):
    """Replaces known paths, names and free text in log records by the label of their case."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Know nothing any more."""
        self._redactor = Redactor()
        self._roots: dict[Path, None] = {}
        self._seen: set[Path] = set()
        self._headers: set[tuple[Path, str]] = set()
        self._shown: tuple[Path, ...] = ()

    def _show(self, label: str) -> None:
        """Labels stay whole, and paths of the program's own in tracebacks, whatever folders of data are called."""
        self._redactor.show(label)
        if self._shown is not (folders := _public_folders()):
            self._shown = folders
            for folder in folders:
                self._redactor.show(str(folder), path=True)

    def learn(self, path: Path, label: str, *, again: bool = True) -> None:
        """Hide this path, its file's name and those of the folders on the way to it behind `label`.

        Of a path below a known root the folders below that; of another one all that do not hold the program, the
        cache, the user's home, or temporary files as well. `again` False leaves a path alone that is known.
        """
        absolute = path.absolute()
        with self._lock:
            if absolute in self._seen and not again:
                return
            self._seen.add(absolute)
            roots = list(self._roots)
        self._show(label)
        shown = f"<{label}>"
        for whole in {str(absolute), str(path), str(_resolved(absolute.parent) / absolute.name)}:
            if "/" in whole.strip("/"):
                self._redactor.hide(whole, shown, path=True)
        for name in _private_parts(absolute, roots):
            self._hide_name(name, label)

    def learn_root(self, root: Path, label: str) -> None:
        """Hide a data set's folder, and whatever below it is not known better, behind `label`."""
        root = root.expanduser().absolute()
        if any(public.is_relative_to(root) for public in _public_folders()):
            return  # the program's own tracebacks lie below it
        with self._lock:
            self._roots[root] = None
            self._seen.add(root)
        self._show(label)
        for whole in {str(root), str(_resolved(root))}:
            self._redactor.hide(whole, f"<{label}>", path=True)
        self._hide_name(root.name, label)

    def learn_header(self, path: Path, label: str) -> None:
        """Hide what the header of a scan or mask says, and what the files of a series are called."""
        with self._lock:
            if (path, label) in self._headers:
                return
            self._headers.add((path, label))
        from medad.ct.headers import header_texts

        for text in (*header_texts(path), *_names_within(path)):
            if not _SHORT_NUMBER.fullmatch(text):
                self._hide_name(text, label)

    def _hide_name(self, name: str, label: str) -> None:
        stem = _ENDINGS.sub("", name)
        if stem.lower() in ORDINARY:
            return
        for each in dict.fromkeys((name, stem)):
            if len(each) < SHORTEST or (each.isdigit() and len(each) < 6):
                continue
            # one name in two cases' folders tells nothing of which is meant
            self._redactor.hide(each, f"<{label}>")
        for word in _WORD.findall(stem):
            if word.lower() not in ORDINARY and word != word.lower():
                self._redactor.hide_word(word, f"<{label}>")

    def scrub(self, text: str) -> str:
        """`text` without anything private that is known or looks like it."""
        text = self._redactor.scrub(text)
        if "/" in text:
            text = _QUOTED_PATH.sub(
                lambda found: found[0] if _public(found[2]) else f"{found[1]}{PLACEHOLDER}{found[1]}", text
            )
            text = _BARE_PATH.sub(lambda found: found[0] if _public(found[0]) else PLACEHOLDER, text)
        if "^" in text:
            text = _CARET_NAME.sub(NAME, text)
        return _UID.sub(UID, text) if "." in text else text

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception as misfit:  # logging itself would print the arguments
            message = f"{record.msg} (its arguments do not fit: {type(misfit).__name__})"
        record.msg, record.args = self.scrub(message), ()
        if record.exc_info:
            kind, error, trace = record.exc_info
            # "NoneType: None" is what Prefect logs below a failed state that no exception caused
            record.exc_text = "".join(traceback.format_exception(kind, error, trace)) if error is not None else None
            record.exc_info = None
        if record.exc_text:
            record.exc_text = self.scrub(record.exc_text)
        if record.stack_info:
            record.stack_info = self.scrub(record.stack_info)
        return True


@functools.lru_cache(maxsize=4096)
def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError):
        return folder


@functools.lru_cache(maxsize=8)
def _public_folders_of(cache: Path, home: str) -> tuple[Path, ...]:
    program = Path(__file__).absolute().parents[2]
    prefect = Path(os.environ.get("PREFECT_HOME") or Path(home) / ".prefect").expanduser()
    installed = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [program / name for name in ("flows", "medad", "zsad", "tests", "benchmarks", ".venv")]
    folders += [
        Path(text) for text in (*installed, sys.prefix, sys.base_prefix, "/usr/lib", "/usr/bin", "/proc", "/dev")
    ]
    return (*folders, Path("/sys"), cache, prefect)


def _public_folders() -> tuple[Path, ...]:
    """What may be told of this machine: where the program, its libraries and the cache are."""
    return _public_folders_of(cache_root(), os.environ.get("HOME", "/"))


def _public(path: str) -> bool:
    if path.startswith("/api/"):  # Prefect's routes
        return True
    return any(path.startswith(f"{folder}/") or path == str(folder) for folder in _public_folders())


def _private_parts(path: Path, roots: list[Path]) -> tuple[str, ...]:
    """The names on a path that may be a patient's."""
    inside = [root for root in roots if path.is_relative_to(root)]
    if inside:
        return path.relative_to(max(inside, key=lambda root: len(root.parts))).parts
    shared = 1
    for folder in (*_public_folders(), Path(os.environ.get("HOME", "/")), Path.cwd(), Path(tempfile.gettempdir())):
        same = 0
        for ours, theirs in zip(path.parts[:-1], folder.parts, strict=False):
            if ours != theirs:
                break
            same += 1
        shared = max(shared, same)
    return path.parts[shared:]


path_filter = PathFilter()


def install() -> None:
    """Put the filter into this process: before every logger, Prefect's and libraries' alike, and before warnings."""
    records = logging.getLogRecordFactory()
    if not getattr(records, "scrubs", False):

        def scrubbed_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = records(*args, **kwargs)
            path_filter.filter(record)
            return record

        scrubbed_record.scrubs = True  # type: ignore[attr-defined]
        logging.setLogRecordFactory(scrubbed_record)
    shown = warnings.formatwarning
    if not getattr(shown, "scrubs", False):

        def scrubbed_warning(*args: Any, **kwargs: Any) -> str:
            return path_filter.scrub(shown(*args, **kwargs))

        scrubbed_warning.scrubs = True  # type: ignore[attr-defined]
        warnings.formatwarning = scrubbed_warning


def learn_call(label: str, call: Call) -> None:
    """Install the filter here and teach it all that a call could make a library say: for whichever process runs it."""
    install()
    for value, name in _walk(call.arguments, ""):
        if isinstance(value, Path) and name == "root":
            path_filter.learn_root(value, label)
        elif isinstance(value, Path):
            path_filter.learn(value, label, again=False)
            if name in _SOURCES:
                path_filter.learn_header(value, label)
        elif isinstance(value, LiverSettings):
            learn_textures(value, label)
        else:
            learn_data(value, label)


def learn_textures(settings: LiverSettings, label: str) -> None:
    """Teach the filter the folder of textures, where there is one."""
    if settings.synthesis.texture.folder is not None:
        path_filter.learn_root(Path(settings.synthesis.texture.folder), label)


def learn_data(data: DatasetSettings | ImagesSettings, label: str) -> None:
    """Teach the filter a data set's folder."""
    if not data.root.startswith("samples:") and data.root not in ("", "-", "."):
        path_filter.learn_root(Path(data.root), label)


def _names_within(folder: Path) -> set[str]:
    """What the names of a series' files have beside their numbers; nothing where this is no folder."""
    found: set[str] = set()
    with suppress(OSError), os.scandir(folder) as entries:  # whoever has to read it will say so
        for entry in entries:
            stem = _ENDINGS.sub("", entry.name)
            found.update(part.strip(" _.^-") for part in re.split(r"\d{1,5}(?!\d)", stem))
            if len(found) > _MOST_NAMES:
                break
    return found


def _walk(value: object, name: str) -> Iterator[tuple[Any, str]]:
    """Yield the paths, data sets and liver settings in a call's arguments, each with the name of its field."""
    if isinstance(value, Path | DatasetSettings | ImagesSettings | LiverSettings):
        yield value, name
    elif isinstance(value, Keyed):
        yield from _walk(value.value, name)
    elif isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type)):
        below = (
            value.items() if isinstance(value, Mapping) else ((f.name, getattr(value, f.name)) for f in fields(value))
        )
        # data sets and roots first: then it is known which folders of a path lie below them
        for field, each in sorted(below, key=lambda item: isinstance(item[1], Path) + (item[0] != "root")):
            yield from _walk(each, str(field))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _walk(each, name)


def without_private_text(function: Callable[P, R]) -> Callable[P, R]:
    """A flow's or task's body, none of whose exceptions reaches Prefect with its text.

    Prefect writes that text into the state's message. Here the state names the kind of error, or the rule of a user's
    error; the traceback goes to the log, through the filter, and the exception itself to whoever called.
    """

    @functools.wraps(function)
    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        from prefect.exceptions import ExternalSignal, PrefectSignal
        from prefect.flow_engine import FlowRunTimeoutError

        install()
        try:
            return function(*args, **kwargs)
        except (
            KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, ExternalSignal, PrefectSignal,
            FlowRunTimeoutError,
        ):  # fmt: skip
            raise  # Prefect has its own words for these
        except BaseException as error:
            return cast("R", _final_state(error))

    # Prefect looks annotations up among this module's names, so they are resolved among the function's own
    with suppress(NameError):  # of a function within a function
        signature = inspect.signature(function, eval_str=True)
        body.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
        body.__signature__ = signature  # type: ignore[attr-defined]
    return body


def rule_of(error: UserError) -> tuple[str, str]:
    """Return the path that an error names, or an empty text, and its rule in one line."""
    if isinstance(error, InputError):
        return str(error.path), error.rule
    text = " ".join(str(error).split())
    head, _, rest = text.partition(": ")
    return (head, rest) if head.startswith("/") and rest else ("", text)


def _final_state(error: BaseException) -> Any:
    from prefect import get_run_logger
    from prefect.exceptions import MissingContextError
    from prefect.states import Crashed, Failed

    if isinstance(error, UserError):
        return Failed(message=path_filter.scrub(rule_of(error)[1]), data=error)
    with suppress(MissingContextError):  # a dry run
        get_run_logger().error("internal error", exc_info=(type(error), error, error.__traceback__))
    state = Failed if isinstance(error, Exception) else Crashed
    return state(message=f"internal error ({type(error).__name__})", data=error)
