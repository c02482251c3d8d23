"""Whether this process may use the cache folder. Another user's cache is an error of the user, not a bug."""

from __future__ import annotations

import os

from flows.machine.environment import cache_root, user_name
from medad.base.errors import ConfigError

ADVICE = "set ADFLOWS_CACHE to a folder of your own"


def require_cache(*, writable: bool = True) -> None:
    """Raise ConfigError unless this process may read the cache, and write to it if `writable`.

    The folders of its steps are checked too: those that another user made in a shared cache may be closed.
    """
    root = cache_root()
    wanted = os.R_OK | os.X_OK | (os.W_OK if writable else 0)
    try:
        if writable:
            root.mkdir(parents=True, exist_ok=True)
        elif not root.exists():
            return
        folders = [root, *(each for each in root.iterdir() if each.is_dir())] if os.access(root, wanted) else [root]
    except OSError as error:
        raise ConfigError(f"{root}: cannot be used as the cache ({error.strerror}); {ADVICE}") from error
    for folder in folders:
        if not os.access(folder, wanted):
            what = "written" if os.access(folder, os.R_OK | os.X_OK) else "read"
            raise ConfigError(
                f"{folder}: this folder of user {user_name(folder.stat().st_uid)} cannot be {what}; {ADVICE}"
            )
