"""Which failures of a task are worth another try: reading and writing where the way to the disk gave out for a moment.

A broken file stays broken, and what went wrong in a night of training would go wrong again: these fail at once.
"""

from __future__ import annotations

import errno

RETRY_DELAYS_S = (5.0, 30.0)
"""Before the second and the third try. A share that is away for longer is for the next run."""

TRANSIENT = frozenset(
    {
        errno.EIO,  # what a soft-mounted share answers when its server does not
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
    """Whether an error, or what caused it, is of a share or disk that may answer the next time."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
