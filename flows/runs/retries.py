"""Retries of failed tasks. Only errors of a disk or network share that may be gone in a moment are retried.

A broken file stays broken, and a failed training would fail again. These fail at once.
"""

from __future__ import annotations

import errno

RETRY_DELAYS_S = (5.0, 30.0)
"""Waiting time before the second and the third try, in seconds. If a share is away for longer, the call fails."""

TRANSIENT = frozenset(
    {
        errno.EIO,  # a soft-mounted share gives this when its server does not answer
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EREMOTEIO,
    }
)


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, comes from a share or disk that may work the next time."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
