"""The kit's page in a browser: sorting, filtering, the policy, and narrow windows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest

from medad.reporting.page import page_environment
from tests.browser import needs_browser, opened

pytestmark = needs_browser
TABLE = """{% extends "base.html" %}
{% block title %}{{ doc.name }}: x{% endblock %}
{% block content %}
<div class="scroll"><table class="sort">
<thead><tr><th scope="col">Case</th><th scope="col">Dice</th></tr></thead><tbody>
<tr class="all"><td>all</td><td>0.5</td></tr>
{% for name, dice in doc.rows %}<tr><td>{{ name }}</td><td>{{ dice }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endblock %}
"""
ROWS = "[...document.querySelectorAll('tbody tr')].filter((row) => !row.hidden).map((row) => row.cells[0].textContent)"
CLICK = "const [name, dice] = document.querySelectorAll('th button');"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    rows = [
        (f"ct-{number}", value) for number, value in ((10, "0.9 ± 0.1"), (2, "undefined"), (1, "−0.3"), (7, "0.75"))
    ]
    return write(tmp_path, rows)


def write(folder: Path, rows: list[tuple[str, str]]) -> Path:
    shared = page_environment("medad.reporting")
    assert shared.loader is not None
    environment = shared.overlay(loader=jinja2.ChoiceLoader([jinja2.DictLoader({"page": TABLE}), shared.loader]))
    doc = SimpleNamespace(name="name", notes=(), definitions={}, versions={}, rows=rows)
    path = folder / "page.html"
    path.write_text(environment.get_template("page").render(doc=doc, settings_yaml=""), encoding="utf-8")
    return path


def test_headings_sort_by_number_or_name_and_keep_the_sum_on_top(page: Path, tmp_path: Path) -> None:
    with opened(page, tmp_path) as browser:
        up, down, names = (browser.ask(f"{CLICK} {each}.click(); return {ROWS};") for each in ("dice", "dice", "name"))
        state = browser.ask("return [...document.querySelectorAll('th')].map((each) => each.ariaSort);")
        assert browser.problems == []
    assert up == ["all", "ct-1", "ct-7", "ct-10", "ct-2"], "what is no number comes last"
    assert down == ["all", "ct-10", "ct-7", "ct-1", "ct-2"]
    assert names == ["all", "ct-1", "ct-2", "ct-7", "ct-10"]
    assert state == ["ascending", None]


def test_a_long_table_has_a_filter(tmp_path: Path) -> None:
    page = write(tmp_path, [(f"ct-{number}", str(number)) for number in range(30)])
    fill = (
        "const field = document.querySelector('input'); field.value = 'ct-2'; field.dispatchEvent(new Event('input'));"
    )
    with opened(page, tmp_path) as browser:
        shown = browser.ask(f"{fill} return [{ROWS}, document.querySelector('[role=status]').textContent];")
    assert shown == [["all", "ct-2", *(f"ct-{number}" for number in range(20, 30))], "11 of 30"]


def test_the_policy_lets_the_kits_script_run_and_no_other(page: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    text = page.read_text(encoding="utf-8")
    other.write_text(text.replace("</body>", "<script>document.title = 'changed'</script></body>"), encoding="utf-8")
    with opened(other, tmp_path) as browser:
        assert browser.ask("return document.title;") == "name: x"
        assert browser.ask("return document.querySelectorAll('th button').length;") == 2
        assert "Content Security Policy" in " ".join(browser.problems)


def test_a_narrow_window_does_not_scroll_sideways(page: Path, tmp_path: Path) -> None:
    with opened(page, tmp_path, width=360) as browser:
        assert browser.ask("return document.documentElement.scrollWidth - innerWidth;") <= 0
