"""Taking known secrets out of a text, however they are written there, in a time that hardly grows with their number.

Text and secrets are compared in one form: case folded, accents off, escapes of JSON, Python, URLs and HTML undone. So
`Müller` is found as M\\u00fcller, M%C3%BCller, MÜLLER, in either Unicode form, and as Mueller.
"""

from __future__ import annotations

import html
import re
import sys
import threading
import unicodedata
from dataclasses import dataclass

SHORTEST = 4
"""Shorter names are not replaced by themselves: they would garble ordinary words. Also the length of index grams."""

_FREE_LENGTH = 8
"""A secret this long is found inside a longer word too."""

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
    text: str  # in the form that is compared
    label: str | None  # None: may be shown, and nothing within it is a secret
    free: bool = False  # found inside words too
    path: bool = False  # takes what lies below it along
    exact: str = ""  # only when written just so


@dataclass(frozen=True)
class _Folded:
    """A text in the form that is compared; `starts[i]` and `ends[i]` say where character i lies in the original."""

    text: str
    starts: list[int] | range
    ends: list[int] | range


def _plain(text: str) -> str:
    """Case folded, compatibility forms resolved, accents off."""
    if text.isascii():
        return text.lower()
    apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(letter for letter in apart if not unicodedata.combining(letter))


def _unescape(run: str) -> str:
    """What a run of escapes stands for."""
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
        except UnicodeDecodeError:  # one half alone: a name on disk that is no text
            return units
    return run[-1]


def fold(text: str) -> _Folded:
    """A text as it is compared, and where each character comes from."""
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
    """Secrets, and the labels that stand for them. Safe for threads.

    Each secret is filed under the emptiest of its grams of four characters; a text is looked through gram by gram.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Secret] = {}
        self._grams: dict[str, dict[str, int]] = {}  # gram -> secrets that hold it, each with the gram's place
        self._lock = threading.Lock()

    def hide(self, text: str, label: str, *, path: bool = False, ambiguous: str = "<file>") -> None:
        """Replace `text`, however it is written, by `label`; by `ambiguous` where it stands for several.

        A `path` takes along what lies below it.
        """
        if text.isascii() and not _MAY_HOLD_ESCAPES.search(text):
            forms = {text.lower()}
        else:
            forms = {fold(text).text, _plain(text), _plain(unicodedata.normalize("NFC", text).translate(_SPELT_OUT))}
        for form in forms:
            free = path or len(form) >= _FREE_LENGTH
            self._file(_Secret(form, label, free=free, path=path), ambiguous)

    def hide_word(self, word: str, label: str, *, ambiguous: str = "<file>") -> None:
        """Replace `word` where it stands alone and in its own letters: it may be an ordinary word as well."""
        self._file(_Secret(_plain(word), label, exact=word), ambiguous)

    def show(self, text: str, *, path: bool = False) -> None:
        """Never replace a part of `text`: a label, in which a folder's name may occur; of a path, what lies below it.

        A longer secret that begins where `text` does is replaced all the same.
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
            for at in range(len(text) - SHORTEST, -1, -1):  # ends tell more apart than beginnings
                filed = len(self._grams.get(text[at : at + SHORTEST], ()))
                if filed < fewest:
                    place, fewest = at, filed
                if not filed:
                    break
            self._grams.setdefault(text[place : place + SHORTEST], {})[text] = place
        self._known[secret.text] = secret

    def scrub(self, text: str) -> str:
        """`text` with its secrets replaced: of those that overlap the first, of those the longest."""
        if len(text) < SHORTEST or not self._known:
            return text
        folded = fold(text)
        with self._lock:
            found = self._find(folded.text)
        if not found:
            return text
        result, done = [], 0
        for start, end, secret in found:
            # two may share a run of escapes, which goes as a whole
            first, last = max(folded.starts[start], done), folded.ends[end - 1]
            if last <= done or (secret.exact and text[folded.starts[start] : last] != secret.exact):
                continue
            if secret.path and (rest := _REST_OF_PATH.match(text, last)):
                last = rest.end()
            result += [text[done:last]] if secret.label is None else [text[done:first], secret.label]
            done = last
        return "".join(result) + text[done:]

    def _find(self, text: str) -> list[tuple[int, int, _Secret]]:
        """Where secrets lie in a folded text, without overlaps, in order."""
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
        kept: list[tuple[int, int, _Secret]] = []
        for hit in hits:
            if not kept or hit[0] >= kept[-1][1]:
                kept.append(hit)
        return kept


def _stands_alone(text: str, start: int, end: int, secret: _Secret) -> bool:
    """Whether a hit is a word by itself where it has to be; 1 is not found in 10 whatever the length."""
    before, after = text[start - 1 : start], text[end : end + 1]
    if secret.free:
        digits = len(secret.text) - len(secret.text.rstrip("0123456789"))
        return not (0 < digits < SHORTEST and after.isdigit())
    return not (before.isalnum() or after.isalnum())
