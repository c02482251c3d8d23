"""Searches files for secrets, however they are written: an oracle that shares no code with the filter it judges."""

from __future__ import annotations

import base64
import binascii
import contextlib
import html
import json
import re
import sqlite3
import unicodedata
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

DEEPEST = 4
"""Layers of packing that are undone: base64 of gzip in JSON is two."""
_PACKED = re.compile(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}")
_HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){12,}")


@cache
def written_forms(secret: str) -> frozenset[bytes]:
    """The ways to write a secret, in lower case as far as ASCII goes.

    Case does not count, so each letter of a run of base64 is one of about 32: five letters turn up by chance in the
    pictures of a session's database, seven do not.
    """
    assert len(secret) >= 7, f"{secret} would be found by chance"
    found: set[bytes] = set()
    for cased in {secret, secret.upper(), secret.lower(), secret.title()}:
        for form in ("NFC", "NFD"):
            text = unicodedata.normalize(form, cased)
            found |= {text.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be")}
            with contextlib.suppress(UnicodeEncodeError):
                found.add(text.encode("latin-1"))
            escaped = json.dumps(text)[1:-1]
            found |= {escaped.encode(), escaped.replace("\\", "\\\\").encode()}
            found |= {urllib.parse.quote(text).encode(), urllib.parse.quote_plus(text).encode()}
            found |= {html.escape(text).encode(), text.encode("ascii", "xmlcharrefreplace")}
            found.add(repr(text.encode())[2:-1].encode())
    return frozenset(needle.lower() for needle in found)


_CLEAN: dict[frozenset[str], set[int]] = {}
"""Packed runs in which such secrets were looked for in vain, by hash: a session's database holds each several times and
is searched again and again while it grows."""


def unpacked_views(data: bytes, depth: int = 0, seen: set[int] | None = None) -> Iterator[bytes]:
    """The bytes, and whatever is packed in them; each packed run once, but for those that were `seen` before."""
    seen = set() if seen is None else seen
    yield data
    if depth == DEEPEST:
        return
    for found in _PACKED.finditer(data):
        try:
            # also of a stream that is cut short
            inflated = zlib.decompressobj(47).decompress(data[found.start() :], 1 << 27)
        except zlib.error:
            continue
        if len(inflated) > 3:
            yield from unpacked_views(inflated, depth + 1, seen)
    for found in _BASE64.finditer(data):
        if depth == 0:  # deeper down, less of it would have been unpacked
            if hash(found.group()) in seen:
                continue
            seen.add(hash(found.group()))
        run = found.group().rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        for start in range(4):  # what stands before it may be of the same letters
            part = run[start:]
            try:
                yield from unpacked_views(base64.b64decode(part[: len(part) // 4 * 4] + _tail(part)), depth + 2, seen)
            except binascii.Error:
                continue
    for found in _HEX.finditer(data):
        yield from unpacked_views(bytes.fromhex(found.group().decode()), depth + 2, seen)


def _tail(run: bytes) -> bytes:
    rest = run[len(run) // 4 * 4 :]
    return rest + b"=" * (4 - len(rest)) if len(rest) > 1 else b""


def find_secrets(data: bytes, secrets: Iterable[str]) -> set[str]:
    """Which secrets these bytes hold."""
    wanted = {secret: written_forms(secret) for secret in secrets}
    found: set[str] = set()
    clean = _CLEAN.setdefault(frozenset(wanted), set())
    seen = set(clean)
    for view in unpacked_views(data, seen=seen):
        lowered = view.lower()
        found |= {secret for secret, forms in wanted.items() if any(form in lowered for form in forms)}
    if not found:
        clean |= seen
    return found


def find_leaks(folder: Path, secrets: Iterable[str]) -> dict[str, set[str]]:
    """Files below a folder that hold a secret, in name or content."""
    secrets = list(secrets)
    found = {}
    for path in folder.rglob("*"):
        here = find_secrets(str(path.relative_to(folder)).encode(errors="surrogateescape"), secrets)
        if path.is_file() and not path.is_symlink():
            here |= find_secrets(path.read_bytes(), secrets)
        if here:
            found[str(path)] = here
    return found


def database_bytes(path: Path) -> bytes:
    """All that is in an SQLite database: its tables, and its files as they are, pages that are free by now included."""
    with sqlite3.connect(path) as connection:
        tables = "\n".join(connection.iterdump()).encode()
    files = [path.with_name(path.name + ending) for ending in ("", "-wal", "-journal")]
    return b"\n".join([tables, *(file.read_bytes() for file in files if file.exists())])
