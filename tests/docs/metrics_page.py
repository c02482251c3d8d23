"""The page of all metrics, docs/reference/metrics.md, made from the definitions that reports print.

python -m tests.docs.metrics_page > docs/reference/metrics.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from medad.config.liver import EvaluationSettings as LiverEvaluation
from medad.config.sensitivity import SensitivitySettings
from medad.evaluation.metric_rows import definitions as liver_definitions
from medad.reports.sensitivity.document import definitions as sensitivity_definitions
from zsad.config.run import EvaluationSettings as ImageEvaluation
from zsad.reports.run.document import definitions_shown as image_definitions

HEAD = """# Metrics

Every figure of a report, with its definition and the rule for empty masks. Each report prints these definitions with
its own settings; this page shows them with the defaults. An undefined figure is `null` in JSON, empty in CSV and
"undefined" on the terminal. It is left out of means.

<!-- python -m tests.docs.metrics_page > docs/reference/metrics.md -->
"""
LIVER = """## Liver runs

Keys of `summary` in `report.json` of `adflows liver run` and `adflows liver evaluate`, and columns of
`adflows liver ablate`. Dice and AUROC are fractions: 1 is best. For AUROC 0.5 is chance.
"""
SENSITIVITY = """## Inserted lesions

Columns of the report of `adflows liver sensitivity`.
"""
IMAGES = """## Images

Columns of `adflows zsad run`, `compare` and `evaluate`. Keys in files begin with `image_` or `pixel_`, as in
`image_auroc`. `f1max` is at the oracle threshold.
"""
TESTS = """## Statistical tests

| term | definition |
|---|---|
| mean ± sd | Mean over seeds of each seed's figure. The sample standard deviation (ddof = 1) needs two seeds. |
| paired t-test | Student's test between two rows of an ablation, two-sided. By seed: would other trainings show the \
difference? By case, each case's mean over the seeds: would other patients? Undefined below two pairs. |
| DeLong's test | Test of the difference of two systems' image AUROC on the images that both scored. |
| Wilcoxon's test | Signed-rank test of two systems' figures by category; it needs six categories. |
| Holm's correction | p-values are multiplied so that the chance of any false finding in a table stays at the level. |
"""


def metrics_page() -> str:
    """Return the page as Markdown."""
    # the data set of the sensitivity study has no part in the definitions
    study = SensitivitySettings.model_validate({"healthy": {"root": "-", "layout": "btcv"}})
    tables = (
        (LIVER, "key", {f"`{key}`": text for key, text in liver_definitions(LiverEvaluation()).items()}),
        (SENSITIVITY, "column", sensitivity_definitions(study)),
        (IMAGES, "figure", image_definitions(ImageEvaluation())),
    )
    parts = [HEAD]
    for text, column, rows in tables:
        parts += [text, "\n".join(_table(column, rows)) + "\n"]
    return "\n".join([*parts, TESTS])


def _table(column: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield f"| {column} | definition |\n|---|---|"
    yield from (f"| {key} | {text.replace('|', chr(92) + '|')} |" for key, text in rows.items())


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
