"""The type checker of the import hook in `conftest`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beartype

_CHECKED: dict[tuple[object, ...], Callable[..., Any]] = {}


def check_signature(signature: Callable[..., Any]) -> Callable[..., Any]:
    """Add beartype's checks to a function. Functions inside another function are compiled only once."""
    if "<locals>" not in signature.__qualname__:
        return beartype.beartype(signature)
    annotations = tuple((name, repr(kind)) for name, kind in signature.__annotations__.items())
    key = (signature.__module__, signature.__qualname__, signature.__code__.co_varnames, annotations)
    if key not in _CHECKED:
        _CHECKED[key] = beartype.beartype(signature)
    return _CHECKED[key]
