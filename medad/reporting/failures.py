"""What a report says of the cases that failed: rows for report.json and, by failures.html, for its page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from medad.base.errors import CaseFailure
from medad.base.text import escape_bad_bytes, hide_paths, natural_order

ShownFailure = Mapping[str, str]
"""Key of a column -> text, in the order of the columns, with the keys that `shown_failures` names."""


def shown_failures(
    failures: Iterable[CaseFailure], *, hidden: bool, group: str = "", images: bool = False
) -> tuple[ShownFailure, ...]:
    """Return each failure once, without paths, in natural order of group, category and id.

    Parameters
    ----------
    hidden
        Whether names of files are left out, since ids hide them.
    group
        Key that holds a failure's group, `row` or `system`. Empty: the report has no groups.
    images
        Whether failures are of images and have the keys `category` and `id` in place of `case_id`; `id` is empty for
        a whole category.
    """
    rows: dict[tuple[str, ...], ShownFailure] = {}
    for one in failures:
        row = {group: escape_bad_bytes(one.group)} if group else {}
        if images:
            category = one.category or one.case_id
            own = "" if one.case_id == category else one.case_id.removeprefix(f"{category}/")
            row |= {"category": escape_bad_bytes(category), "id": escape_bad_bytes(own)}
        else:
            row["case_id"] = escape_bad_bytes(one.case_id)
        row |= {
            "stage": one.stage,
            "file": "" if hidden or one.pseudonymous else escape_bad_bytes(one.file),
            "rule": hide_paths(one.rule),
        }
        rows[tuple(row.values())] = row
    return tuple(rows[values] for values in sorted(rows, key=lambda values: [natural_order(one) for one in values]))
