"""Lines of Prefect's log that would mislead a reader.

A task's line "Finished in state ..." does not name its task, so in the log of a run it reads as the run's end. A user's
error in a deployed flow would be a long traceback.
"""

from __future__ import annotations

import logging
import sys

from flows.privacy.log_filter import path_filter, rule_of
from medad.base.errors import UserError

ENDED = "Finished in state"


def name_task(record: logging.LogRecord) -> bool:
    """Put the name of the task into the line of its end."""
    text, name = record.getMessage(), getattr(record, "task_run_name", None)
    if name and text.startswith(ENDED):
        record.msg, record.args = f"Task '{name}' finished in state{text.removeprefix(ENDED)}", ()
    return True


def shorten_user_error(record: logging.LogRecord) -> bool:
    """Replace the traceback of a user's error by its rule."""
    error = sys.exception()  # the filter of private text has made the record's own one a text
    if isinstance(error, UserError) and (record.exc_info or record.exc_text):
        record.msg, record.args = f"{record.getMessage()}: {path_filter.scrub(rule_of(error)[1])}", ()
        record.exc_info = record.exc_text = None
    return True


def mend_prefect_log() -> None:
    """Install both in this process. A second call changes nothing."""
    logging.getLogger("prefect.task_runs").addFilter(name_task)
    logging.getLogger("prefect.engine").addFilter(shorten_user_error)
