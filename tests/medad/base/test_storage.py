"""Files on disk: recognition of a full disk, and errors of records that do not fit."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from pydantic import BaseModel

from medad.base.errors import DiskFullError, InputError
from medad.base.storage import disk_full_as_user_error, lines_digest, read_record


class Pair(BaseModel):
    a: int
    b: int


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), RuntimeError("I/O: No space left on device (28)")],
)
def test_a_full_disk_is_told_whichever_library_says_so(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFullError, match="no room left on the disk"), disk_full_as_user_error(tmp_path / "map.npy"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), RuntimeError("a bug"), InputError("x", "broken")])
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_full_as_user_error(tmp_path / "map.npy"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"a": 1', "not a pair: not valid JSON"), ('{"a": 1, "b": "x"}', "not a pair: b: "), ("\xff", "not a pair: ")],
)
def test_a_record_that_does_not_fit_names_its_kind_and_field(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "pair.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=said):
        read_record(Pair, path, "a pair")
    path.write_text('{"a": 1, "b": 2}', encoding="utf-8")
    assert read_record(Pair, path) == Pair(a=1, b=2)


def test_digest_of_lines_by_hand() -> None:
    # printf 'a\nb' | sha256sum
    assert lines_digest(["a", "b"]) == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
