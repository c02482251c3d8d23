"""The filter on all text that leaves a process: log records of every logger, warnings, and messages of states.

It learns the paths of the inputs, the names of their folders and the free text of their headers. It replaces them by
the label of their case, in any spelling. It also hides all other absolute paths outside the program, and all text that
looks like a DICOM identifier or name. So private text that has not been learned yet is hidden too.
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
from flows.machine.stopping import StoppedError
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
"""Names of arguments that are a scan or mask. The free text of its header is learned."""
_MOST_NAMES = 200

P = ParamSpec("P")
R = TypeVar("R")


class PathFilter(logging.Filter):
    """A filter that replaces learned paths, names and free text in log records by the label of their case."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything learned."""
        self._redactor = Redactor()
        self._roots: dict[Path, None] = {}
        self._seen: set[Path] = set()
        self._headers: set[tuple[Path, str]] = set()
        self._shown: tuple[Path, ...] = ()

    def _show(self, label: str) -> None:
        """Never hide this label, or the program's own paths in tracebacks, even if a data folder has the same name."""
        self._redactor.show(label)
        if self._shown is not (folders := _public_folders()):
            self._shown = folders
            for folder in folders:
                self._redactor.show(str(folder), path=True)

    def learn(self, path: Path, label: str, *, again: bool = True) -> None:
        """Replace this path, its file name and the names of its folders by `label`.

        Below a known root, only the folders below the root are hidden. For other paths all folders are hidden, except
        those that also contain the program, the cache, the user's home or temporary files. With `again` False, a path
        that is already known is skipped.
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
        """Replace a data set's folder, and all paths below it that have no label of a case, by `label`."""
        root = root.expanduser().absolute()
        if any(public.is_relative_to(root) for public in _public_folders()):
            return  # hiding it would hide the program's own paths in tracebacks
        with self._lock:
            self._roots[root] = None
            self._seen.add(root)
        self._show(label)
        for whole in {str(root), str(_resolved(root))}:
            self._redactor.hide(whole, f"<{label}>", path=True)
        self._hide_name(root.name, label)

    def learn_header(self, path: Path, label: str) -> None:
        """Hide the texts in the header of a scan or mask, and the file names of a series."""
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
            # a name in the folders of two cases becomes `<file>`, since it does not identify the case
            self._redactor.hide(each, f"<{label}>")
        for word in _WORD.findall(stem):
            if word.lower() not in ORDINARY and word != word.lower():
                self._redactor.hide_word(word, f"<{label}>")

    def scrub(self, text: str) -> str:
        """Return `text` without private text, learned or recognised by its form."""
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
        except Exception as misfit:  # otherwise logging itself would print the arguments
            message = f"{record.msg} (its arguments do not fit: {type(misfit).__name__})"
        record.msg, record.args = self.scrub(message), ()
        if record.exc_info:
            kind, error, trace = record.exc_info
            # without an exception, Prefect would log "NoneType: None" below a failed state
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
    """Return the folders that need not be hidden: those of the program, its libraries and the cache."""
    return _public_folders_of(cache_root(), os.environ.get("HOME", "/"))


def _public(path: str) -> bool:
    if path.startswith("/api/"):  # Prefect's routes
        return True
    return any(path.startswith(f"{folder}/") or path == str(folder) for folder in _public_folders())


def _private_parts(path: Path, roots: list[Path]) -> tuple[str, ...]:
    """Return the parts of a path that may contain a patient's name."""
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
    """Install the filter in this process, for all loggers and for warnings."""
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
    """Install the filter in this process, and let it learn all private text that libraries may log during a call."""
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
    """Let the filter learn the folder of textures, if the settings have one."""
    if settings.synthesis.texture.folder is not None:
        path_filter.learn_root(Path(settings.synthesis.texture.folder), label)


def learn_data(data: DatasetSettings | ImagesSettings, label: str) -> None:
    """Let the filter learn a data set's folder."""
    if not data.root.startswith("samples:") and data.root not in ("", "-", "."):
        path_filter.learn_root(Path(data.root), label)


def _names_within(folder: Path) -> set[str]:
    """Return the parts of the file names of a series besides their numbers; empty if `folder` is not a folder."""
    found: set[str] = set()
    with suppress(OSError), os.scandir(folder) as entries:  # the step that reads the folder reports the error
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
        # data sets and roots first, so that the roots are known when paths below them are learned
        for field, each in sorted(below, key=lambda item: isinstance(item[1], Path) + (item[0] != "root")):
            yield from _walk(each, str(field))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _walk(each, name)


def without_private_text(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap the body of a flow or task so that the text of its exceptions does not reach Prefect.

    Prefect would write that text into the state's message. With this wrapper, the message contains only the type of the
    exception, or the rule of a UserError. The traceback goes to the log, through the filter. The caller still gets the
    exception itself, as the state's data.
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
            raise  # Prefect handles these itself
        except BaseException as error:
            return cast("R", _final_state(error))

    # Prefect would look up annotations in this module, so they are resolved here in the function's module
    with suppress(NameError):  # fails for a nested function
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
    if isinstance(error, StoppedError):
        return Crashed(message="stopped", data=error)
    with suppress(MissingContextError):  # a dry run
        get_run_logger().error("internal error", exc_info=(type(error), error, error.__traceback__))
    state = Failed if isinstance(error, Exception) else Crashed
    return state(message=f"internal error ({type(error).__name__})", data=error)
