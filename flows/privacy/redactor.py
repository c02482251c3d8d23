"""Replacing known secrets in a text, in any spelling. The time hardly grows with the number of secrets.

Texts and secrets are compared in one normalised form: case folded, without accents, and without the escapes of JSON,
Python, URLs and HTML. So `Müller` is found as M\\u00fcller, M%C3%BCller, MÜLLER, in both Unicode forms, and as Mueller.
"""

from __future__ import annotations

import html
import re
import sys
import threading
import unicodedata
from dataclasses import dataclass

SHORTEST = 4
"""Minimum length of a secret: shorter ones would garble ordinary words. Also the length of the grams of the index."""

_FREE_LENGTH = 8
"""Length from which a secret is also found inside a longer word."""

_ESCAPES = re.compile(
    r"(?:%[0-9A-Fa-f]{2})+"
    r"|(?:\\+x[0-9A-Fa-f]{2})+"
    r"|(?:\\+u[0-9A-Fa-f]{4}|\\+U[0-9A-Fa-f]{8})+"
    r"|\\+[\"'/]|\\\\"
    r"|&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z]{2,12});"
)
_MAY_HOLD_ESCAPES = re.compile(r"[%\\&]")
_SPELT_OUT = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ø": "oe", "å": "aa"})
_REST_OF_PATH = re.compile(r"/[^\s'\"<>|:;,()\[\]{}]*")


@dataclass(frozen=True)
class _Secret:
    text: str  # in the normalised form
    label: str | None  # replacement; None if it is never hidden and contains no secret
    free: bool = False  # also found inside words
    path: bool = False  # the rest of a path below it is replaced too
    exact: str = ""  # if set, only this spelling is replaced


@dataclass(frozen=True)
class _Folded:
    """A text in the normalised form; `starts[i]` and `ends[i]` are the position of character i in the original."""

    text: str
    starts: list[int] | range
    ends: list[int] | range


def _plain(text: str) -> str:
    """Return `text` case folded, with compatibility forms resolved and without accents."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def _unescape(run: str) -> str:
    """Return the text that a sequence of escapes encodes."""
    if run[0] == "&":
        return html.unescape(run)
    if run[0] == "%" or ("x" in run[:8].lower() and not re.match(r"\\+[uU]", run)):
        pairs = re.findall(r"[0-9A-Fa-f]{2}", run.replace("\\", "").replace("x", "") if run[0] == "\\" else run)
        content = bytes(int(pair, 16) for pair in pairs)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content.decode("latin-1")
    if re.match(r"\\+[uU]", run):
        codes = [int(code, 16) for code in re.findall(r"[uU]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{4})", run)]
        units = "".join(chr(code) for code in codes if code < 0x110000)
        try:
            return units.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:  # half a surrogate pair: a name on disk that is not valid text
            return units
    return run[-1]


def fold(text: str) -> _Folded:
    """Return a text in the normalised form, with the original position of each character."""
    if text.isascii() and not _MAY_HOLD_ESCAPES.search(text):
        return _Folded(text.lower(), range(len(text)), range(1, len(text) + 1))
    letters: list[str] = []
    starts: list[int] = []
    ends: list[int] = []

    def take(piece: str, start: int, end: int) -> None:
        letters.append(piece)
        starts.extend([start] * len(piece))
        ends.extend([end] * len(piece))
        if not piece and ends:  # an accent belongs to the letter before it
            ends[-1] = end

    def take_plain(start: int, end: int) -> None:
        piece = text[start:end]
        if piece.isascii():
            letters.append(piece.lower())
            starts.extend(range(start, end))
            ends.extend(range(start + 1, end + 1))
        else:
            for place, letter in enumerate(piece, start):
                take(_plain(letter), place, place + 1)

    position = 0
    for escape in _ESCAPES.finditer(text):
        take_plain(position, escape.start())
        take(_plain(_unescape(escape.group())), escape.start(), escape.end())
        position = escape.end()
    take_plain(position, len(text))
    return _Folded("".join(letters), starts, ends)


class Redactor:
    """Secrets and their labels. Safe for threads.

    Each secret is indexed by one gram, a sequence of four of its characters: the one with the fewest other secrets. A
    search looks up each gram of the text.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Secret] = {}
        self._grams: dict[str, dict[str, int]] = {}  # gram -> secrets indexed by it, each with the gram's position
        self._lock = threading.Lock()

    def hide(self, text: str, label: str, *, path: bool = False, ambiguous: str = "<file>") -> None:
        """Replace `text`, in any spelling, by `label`, or by `ambiguous` if it has several labels.

        For a `path`, the rest of the path below it is replaced too.
        """
        if text.isascii() and not _MAY_HOLD_ESCAPES.search(text):
            forms = {text.lower()}
        else:
            forms = {fold(text).text, _plain(text), _plain(unicodedata.normalize("NFC", text).translate(_SPELT_OUT))}
        for form in forms:
            free = path or len(form) >= _FREE_LENGTH
            self._file(_Secret(form, label, free=free, path=path), ambiguous)

    def hide_word(self, word: str, label: str, *, ambiguous: str = "<file>") -> None:
        """Replace `word` only as a separate word in exactly this spelling, since it may also be an ordinary word."""
        self._file(_Secret(_plain(word), label, exact=word), ambiguous)

    def show(self, text: str, *, path: bool = False) -> None:
        """Never replace a part of `text`, such as a label that contains a folder's name.

        For a `path`, the rest of the path below it is also left unchanged. A longer secret that begins with `text` is
        still replaced.
        """
        form = _plain(text)
        if len(form) >= SHORTEST:
            with self._lock:
                self._put(_Secret(form, None, free=True, path=path))

    def _file(self, secret: _Secret, ambiguous: str) -> None:
        if len(secret.text) < SHORTEST:
            return
        with self._lock:
            known = self._known.get(secret.text)
            if known is not None:
                if known.label is None:
                    return
                label = known.label if known.label in {secret.label, ambiguous} else ambiguous
                exact = known.exact if known.exact == secret.exact else ""
                secret = _Secret(secret.text, label, known.free or secret.free, known.path or secret.path, exact)
                if secret == known:
                    return
            self._put(secret)

    def _put(self, secret: _Secret) -> None:
        if secret.text not in self._known:
            text, place, fewest = secret.text, 0, sys.maxsize
            for at in range(len(text) - SHORTEST, -1, -1):  # the ends of names differ more than their beginnings
                filed = len(self._grams.get(text[at : at + SHORTEST], ()))
                if filed < fewest:
                    place, fewest = at, filed
                if not filed:
                    break
            self._grams.setdefault(text[place : place + SHORTEST], {})[text] = place
        self._known[secret.text] = secret

    def scrub(self, text: str) -> str:
        """Return `text` with its secrets replaced. Of overlapping secrets, the first and longest is replaced."""
        if len(text) < SHORTEST or not self._known:
            return text
        folded = fold(text)
        with self._lock:
            found = self._find(folded.text)
        if not found:
            return text
        result, done = [], 0
        for start, end, secret in found:
            # two secrets may share a sequence of escapes, which is replaced as a whole
            first, last = max(folded.starts[start], done), folded.ends[end - 1]
            if last <= done or (secret.exact and text[folded.starts[start] : last] != secret.exact):
                continue
            if secret.path and (rest := _REST_OF_PATH.match(text, last)):
                last = rest.end()
            result += [text[done:last]] if secret.label is None else [text[done:first], secret.label]
            done = last
        return "".join(result) + text[done:]

    def _find(self, text: str) -> list[tuple[int, int, _Secret]]:
        """Return the positions of secrets in a folded text, in order and without overlaps."""
        hits: list[tuple[int, int, _Secret]] = []
        get = self._grams.get
        for at in range(len(text) - SHORTEST + 1):
            filed = get(text[at : at + SHORTEST])
            if filed is None:
                continue
            for form, place in filed.items():
                start = at - place
                if start >= 0 and text.startswith(form, start):
                    secret = self._known[form]
                    if _stands_alone(text, start, start + len(form), secret):
                        hits.append((start, start + len(form), secret))
        hits.sort(key=lambda hit: (hit[0], -hit[1]))
        separate: list[tuple[int, int, _Secret]] = []
        for hit in hits:
            if not separate or hit[0] >= separate[-1][1]:
                separate.append(hit)
        return separate


def _stands_alone(text: str, start: int, end: int, secret: _Secret) -> bool:
    """Return whether a hit is a separate word, if it must be one. A number never matches inside a longer number."""
    before, after = text[start - 1 : start], text[end : end + 1]
    if secret.free:
        digits = len(secret.text) - len(secret.text.rstrip("0123456789"))
        return not (0 < digits < SHORTEST and after.isdigit())
    return not (before.isalnum() or after.isalnum())
