"""Failed cases in a report: rows for report.json, and through failures.html for the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from medad.base.errors import GROUPED_FROM, CaseFailure, kind_of_rule
from medad.base.text import escape_bad_bytes, hide_paths, list_names, natural_order

FailureRow = Mapping[str, str]
"""Text of each column by key, in the order of the columns. `failure_rows` defines the keys."""


def failure_rows(
    failures: Iterable[CaseFailure], *, hide_files: bool, group: str = "", images: bool = False
) -> tuple[FailureRow, ...]:
    """Return each failure once, without paths, in natural order of group, category and id.

    Parameters
    ----------
    hide_files
        True: leave out file names, because ids are pseudonyms.
    group
        Key for the group of a failure, `row` or `system`. Empty if the report has no groups.
    images
        True: failures are of images and have the keys `category` and `id` instead of `case_id`. `id` is empty for a
        whole category.
    """
    rows: dict[tuple[str, ...], FailureRow] = {}
    for one in failures:
        row = {group: escape_bad_bytes(one.group)} if group else {}
        if images:
            category = one.category or one.case_id
            image_id = "" if one.case_id == category else one.case_id.removeprefix(f"{category}/")
            row |= {"category": escape_bad_bytes(category), "id": escape_bad_bytes(image_id)}
        else:
            row["case_id"] = escape_bad_bytes(one.case_id)
        row |= {
            "stage": one.stage,
            "file": "" if hide_files or one.pseudonymous else escape_bad_bytes(one.file),
            "rule": hide_paths(one.rule),
        }
        rows[tuple(row.values())] = row
    return tuple(rows[values] for values in sorted(rows, key=lambda values: [natural_order(one) for one in values]))


def group_rows(rows: Iterable[FailureRow]) -> list[FailureRow]:
    """Return rows for the page: equal problems of one category are one row, with a few names and their number."""
    groups: dict[tuple[str, ...], list[FailureRow]] = {}
    for row in rows:
        shared = [value for key, value in row.items() if key not in {"id", "file", "rule"}]
        own = kind_of_rule(row["rule"]) if row.get("id") else "".join(row.values())
        groups.setdefault((*shared, own), []).append(row)
    found: list[FailureRow] = []
    for group in groups.values():
        if len(group) < GROUPED_FROM:
            found += group
        else:
            names = {key: list_names(list(dict.fromkeys(row[key] for row in group))) for key in ("id", "file")}
            found.append({**group[0], **names})
    return found
