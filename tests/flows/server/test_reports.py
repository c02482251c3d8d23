"""The runs' reports beside Prefect's UI: only with the secret, only files of runs, and artifacts link to them."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from flows.runs.ui_artifacts import create_run_artifacts, report_address
from flows.server.reports import with_reports
from flows.server.serve import ServerOptions, server_environment

SECRET = "adflows:right"


def authorization(secret: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "liver" / "demo 1"
    (run / "cases").mkdir(parents=True)
    (run / "report.html").write_text("the report", encoding="utf-8")
    (run / "cases" / "ct-1.html").write_text("a case", encoding="utf-8")
    (run / ".hidden").write_text("hidden", encoding="utf-8")
    (tmp_path / "runs" / "index.html").write_text("all runs", encoding="utf-8")
    (tmp_path / "outside.txt").write_text("outside", encoding="utf-8")
    (run / "link.txt").symlink_to(tmp_path / "outside.txt")
    return tmp_path / "runs"


def client(root: Path, secret: str | None = SECRET, given: str | None = SECRET) -> TestClient:
    app = with_reports(PlainTextResponse("Prefect"), root, secret)
    headers = {} if given is None else authorization(given)
    return TestClient(app, base_url="http://127.0.0.1:4200", headers=headers)


def test_with_the_secret_reports_are_shown_in_an_origin_of_their_own(root: Path) -> None:
    browser = client(root)
    for path, text in (
        ("/reports", "all runs"),
        ("/reports/", "all runs"),
        ("/reports/liver/demo%201/report.html", "the report"),
        ("/reports/liver/demo%201/cases/ct-1.html", "a case"),
    ):
        answer = browser.get(path)
        assert (answer.status_code, answer.text) == (200, text)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("sandbox allow-scripts")
        assert "allow-same-origin" not in policy, "the UI keeps the secret in the browser"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert browser.get("/api/flows").text == browser.get("/reportsx").text == "Prefect"
    assert browser.post("/reports/").status_code == 405


@pytest.mark.parametrize("given", [None, "adflows:wrong", "adflows:", ""])
def test_without_the_secret_nothing_is_shown(root: Path, given: str | None) -> None:
    browser = client(root, given=given)
    for path in ("/reports", "/reports/", "/reports/liver/demo%201/report.html", "/reports/nothing"):
        answer = browser.get(path)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic")
        assert "report" not in answer.text
    assert client(root, secret=None, given=given).get("/reports/").status_code == 401
    assert client(root, secret="", given=given).get("/reports/").status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/reports/../outside.txt",
        "/reports/%2e%2e/outside.txt",
        "/reports//etc/passwd",
        "/reports/liver/demo%201/link.txt",
        "/reports/liver/demo%201/.hidden",
        "/reports/liver",
        f"/reports/{'x' * 5000}",
        "/reports/a%00b",
    ],
)
def test_nothing_outside_the_runs_is_shown(root: Path, path: str) -> None:
    answer = client(root).get(path)
    assert answer.status_code == 404 or answer.text == "Prefect"
    assert "outside" not in answer.text


def test_before_the_first_run_it_says_so(tmp_path: Path) -> None:
    assert client(tmp_path).get("/reports/").text == "index.html: no run has ended yet"


def test_a_run_of_this_machines_server_is_linked_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = root / "liver" / "demo 1"
    monkeypatch.setenv("ADFLOWS_RUNS", str(root))
    monkeypatch.delenv("PREFECT_UI_URL", raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert report_address(run) == "http://127.0.0.1:4200/reports/liver/demo%201/report.html"
    assert report_address(root.parent / "elsewhere") is None
    monkeypatch.setenv("PREFECT_UI_URL", "https://adflows.example.org")
    assert report_address(run) == "https://adflows.example.org/reports/liver/demo%201/report.html"
    monkeypatch.setenv("PREFECT_API_URL", "https://other.example.org/api")
    assert report_address(run) is None, "its folder is not on that machine"
    monkeypatch.setattr("flows.runs.temporary_server._url", "http://127.0.0.1:5000/api")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:5000/api")
    assert report_address(run) is None, "that server ends with its command"


@pytest.mark.parametrize("private", [False, True])
def test_the_artifact_has_the_link_unless_the_folder_is_private(
    root: Path, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setenv("ADFLOWS_RUNS", str(root))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    for kind in ("markdown", "table", "image"):
        monkeypatch.setattr(
            f"prefect.artifacts.create_{kind}_artifact", lambda kind=kind, **values: made.update({kind: values})
        )
    layout: Any = SimpleNamespace(
        flow="liver", table="cases", first_column="case", rows=lambda report: [], show_ids=True, picture_caption=""
    )
    runner: Any = SimpleNamespace(failures=[], computed=1, cached=0)
    create_run_artifacts(layout, root / "liver" / "demo 1", runner, private=private)
    markdown = made["markdown"]["markdown"]
    assert ("/reports/liver/demo%201/report.html" in markdown) != private
    assert ("demo" in markdown) != private


def test_the_server_shows_the_folder_that_deployed_flows_write_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ADFLOWS_RUNS", raising=False)
    monkeypatch.setattr("flows.server.serve.working_folder", lambda: tmp_path)
    assert server_environment(ServerOptions(4200))["ADFLOWS_RUNS"] == str(tmp_path / "runs")
    monkeypatch.setenv("ADFLOWS_RUNS", str(tmp_path / "own"))
    assert server_environment(ServerOptions(4200))["ADFLOWS_RUNS"] == str(tmp_path / "own")
