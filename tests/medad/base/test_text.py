"""Check that messages show names of servers but no paths."""

from __future__ import annotations

import pytest

from medad.base.text import hide_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HEAD https://hub.example/owner/model/a.bin failed", "HEAD https://hub.example/(private path) failed"),
        ("http://hub.example:8080/doe_jane", "http://hub.example:8080/(private path)"),
        ("see /home/doe/jane.nii", "see (private path)"),
        ("error:/home/doe/jane.nii", "error:(private path)"),
        ("file:///home/doe/jane", "file:(private path)"),
        ("owner/model has no such file", "owner/model has no such file"),
    ],
)
def test_addresses_keep_their_server_and_paths_are_hidden(text: str, shown: str) -> None:
    assert hide_paths(text) == shown
