"""A search of files for secrets in all their written forms. It shares no code with the filter that it tests."""

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
"""Number of layers of packing that are unpacked. Base64 of gzip has two."""
_PACKED = re.compile(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}")
_HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){12,}")


@cache
def written_forms(secret: str) -> frozenset[bytes]:
    """Return all written forms of a secret, with ASCII letters in lower case.

    Case does not count, so each letter of base64 has about 32 values. Five letters appear by chance in the pictures of
    a session's database; seven do not.
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
"""Secrets -> hashes of packed data that does not contain them.

A session's database contains each piece several times, and is searched again and again while it grows.
"""


def unpacked_views(data: bytes, depth: int = 0, seen: set[int] | None = None) -> Iterator[bytes]:
    """Yield the bytes and all data packed in them. Packed data that was `seen` before is left out."""
    seen = set() if seen is None else seen
    yield data
    if depth == DEEPEST:
        return
    for found in _PACKED.finditer(data):
        try:
            # a stream may be cut short
            inflated = zlib.decompressobj(47).decompress(data[found.start() :], 1 << 27)
        except zlib.error:
            continue
        if len(inflated) > 3:
            yield from unpacked_views(inflated, depth + 1, seen)
    for found in _BASE64.finditer(data):
        if depth == 0:  # deeper down, less of it is unpacked
            if hash(found.group()) in seen:
                continue
            seen.add(hash(found.group()))
        run = found.group().rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
        for start in range(4):  # letters before it may look like base64 too
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
    """Return the secrets that these bytes contain."""
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
    """Return the files below a folder that contain a secret in name or content, with these secrets."""
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
    """Return the contents of an SQLite database: its tables, and its raw files with their free pages."""
    with sqlite3.connect(path) as connection:
        tables = "\n".join(connection.iterdump()).encode()
    files = [path.with_name(path.name + ending) for ending in ("", "-wal", "-journal")]
    return b"\n".join([tables, *(file.read_bytes() for file in files if file.exists())])
