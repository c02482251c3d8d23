"""`adflows open`: one browser sees the files of one folder, and nobody sees anything else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from flows.server.open_run import make_app, open_folder
from medad.base.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "token"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "demo"
    (folder / "cases").mkdir(parents=True)
    (folder / "report.html").write_text("the report", encoding="utf-8")
    (folder / "cases" / "ct 1.html").write_text("a case", encoding="utf-8")
    (folder / ".hidden").write_text("hidden", encoding="utf-8")
    (tmp_path / "runs" / "secret.txt").write_text("secret", encoding="utf-8")
    (folder / "link.txt").symlink_to(tmp_path / "runs" / "secret.txt")
    return folder


def client(folder: Path) -> TestClient:
    return TestClient(make_app(folder, TOKEN), base_url="http://127.0.0.1:8123")


def test_the_token_works_once_and_the_cookie_after_it(run: Path) -> None:
    first = client(run)
    opened = first.get("/", params={"token": TOKEN})
    assert (opened.text, str(opened.url)) == ("the report", "http://127.0.0.1:8123/report.html")
    assert "Cache-Control" in opened.headers
    assert first.get("/cases/ct%201.html").text == "a case"
    assert first.get("/").text == "the report"
    second = TestClient(first.app, base_url="http://127.0.0.1:8123")
    for path in (f"/?token={TOKEN}", "/?token=", "/", "/report.html", "/nothing"):
        assert second.get(path).status_code == 403


OUTSIDE = ("/../secret.txt", "/%2e%2e/secret.txt", "/cases/../../secret.txt", "//etc/passwd", "/link.txt", "/.hidden")


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_of_the_folder_is_served(run: Path, path: str) -> None:
    browser = client(run)
    browser.get("/", params={"token": TOKEN})
    answer = browser.get(path)
    assert answer.status_code == 404
    assert "secret" not in answer.text.replace("no such file", "")


def test_another_sites_name_gets_no_answer(run: Path) -> None:
    browser = TestClient(make_app(run, TOKEN), base_url="http://evil.example")
    assert browser.get("/", params={"token": TOKEN}).status_code == 400


def test_a_folder_without_a_page_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a report \(report.html\) nor a page of runs"):
        make_app(tmp_path, TOKEN)


def test_a_port_in_use_is_one_line(run: Path) -> None:
    _, taken, address = open_folder(run, 0)
    port = int(address.split(":")[2].partition("/")[0])
    with taken, pytest.raises(ConfigError, match=f"port {port}: cannot listen"):
        open_folder(run, port)


def test_the_command_serves_until_it_is_stopped(run: Path) -> None:
    command = [sys.executable, "-m", "flows", "open", str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, encoding="utf-8") as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", address)
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert browser.open(address, timeout=30).read() == b"the report"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address, timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == "adflows: stopped by the user"
