"""The filter on logs: the spellings that it finds, the text that it does not change, and its speed."""

from __future__ import annotations

import html
import json
import logging
import time
import unicodedata
import urllib.parse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.privacy.log_filter import NAME, UID, PathFilter, install, without_private_text
from flows.privacy.redactor import Redactor
from medad.base.text import PLACEHOLDER

WAYS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper": str.upper,
    "lower": str.lower,
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "json": lambda text: json.dumps(text)[1:-1],
    "json in json": lambda text: json.dumps(json.dumps(text)[1:-1])[1:-1],
    "url": urllib.parse.quote,
    "all url": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "repr of bytes": lambda text: repr(text.encode())[2:-1],
    "ascii": ascii,
    "html": lambda text: html.escape(text).encode("ascii", "xmlcharrefreplace").decode(),
}


@pytest.mark.parametrize(
    "secret", ["Müller_Jörg", "Özgür Çelik", "Σίσυφος", "Łukasz Żółć", "Straße 17", "plain-name", "王小明先生"]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_name_is_found_however_it_is_written(secret: str, way: str) -> None:
    known = Redactor()
    known.hide(secret, "<x>")
    for place in (secret, unicodedata.normalize("NFD", secret)):
        written = WAYS[way](place)
        assert known.scrub(f"cannot read: {written}; next").replace("'", "") == "cannot read: <x>; next"


def test_transliterated_names_are_found() -> None:
    known = Redactor()
    known.hide("Müller_Jörg", "<x>")
    assert known.scrub("MUELLER_JOERG.dcm, Muller_Jorg.dcm") == "<x>.dcm, <x>.dcm"


@settings(max_examples=300, deadline=None)
@given(
    secrets=st.lists(st.text(min_size=4, max_size=12), min_size=1, max_size=6, unique=True),
    filler=st.text(alphabet=" ,.;=()", max_size=5),
)
def test_no_secret_is_left_in_any_text(secrets: list[str], filler: str) -> None:
    """Secrets of any characters, in any order, as separate words: short secrets are only found as separate words."""
    known = Redactor()
    for secret in secrets:
        known.hide(secret, "·")
    text = f" {filler} ".join(["", *secrets, ""])
    scrubbed = known.scrub(text)
    for secret in secrets:
        stripped = secret.strip(" ,.;=()·")
        if len(stripped) >= 4 and stripped == secret and stripped.isalnum():
            assert secret not in scrubbed


def test_what_stands_around_a_secret_stays() -> None:
    known = Redactor()
    known.hide("Müller", "<x>")
    assert known.scrub("100 % of Müller's käse \\n\u00e9\\u00e9 %C3%A9 &amp; more") == (
        "100 % of <x>'s käse \\n\u00e9\\u00e9 %C3%A9 &amp; more"
    )


def test_short_names_are_words_and_numbers_are_whole() -> None:
    known = Redactor()
    known.hide("Koch", "<a>")
    known.hide("volume-1", "<b>")
    assert known.scrub("Kochsalz, Koch, koch.") == "Kochsalz, <a>, <a>."
    assert known.scrub("volume-1, volume-10") == "<b>, volume-10"


def test_labels_are_not_garbled_by_names_they_hold() -> None:
    known = PathFilter()
    known.learn(Path("/srv/x/portal_btcv5/img0001.nii.gz"), "portal_btcv5-0001")
    known.learn(Path("/srv/x/portal_btcv5/img0002.nii.gz"), "portal_btcv5-0002")
    assert known.scrub("prepare portal_btcv5-0001") == "prepare portal_btcv5-0001"


def test_folders_below_the_root_are_hidden_by_themselves() -> None:
    known = PathFilter()
    known.learn_root(Path("/srv/studies/liver"), "test data")
    known.learn(Path("/srv/studies/liver/Sanderling_Horst/2019-03-17/scan.nii.gz"), "ct-1")
    known.learn(Path("/srv/studies/liver/Umlauf_Rita/2019-03-17/scan.nii.gz"), "ct-2")
    assert known.scrub("/srv/studies/liver/Sanderling_Horst/2019-03-17/scan.nii.gz: bad") == "<ct-1>: bad"
    assert known.scrub("in Sanderling_Horst: scan.nii.gz") == "in <ct-1>: scan.nii.gz"
    assert known.scrub("patient Sanderling of 2019-03-17") == "patient <ct-1> of <file>"
    assert known.scrub("studies of liver") == "studies of liver", "folders above the root do not belong to the patient"
    assert known.scrub("/srv/studies/liver/Unbekannt Otto/x.dcm").startswith("<test data>")


def test_without_a_root_all_names_are_hidden_but_the_machines() -> None:
    known = PathFilter()
    known.learn(Path("/mnt/pacs/Sanderling_Horst/CT/scan.nii.gz"), "ct-1")
    assert known.scrub("Sanderling_Horst") == "<ct-1>"
    here = Path(__file__).parents[3] / "data" / "flows" / "Sanderling2" / "scan.nii.gz"
    known.learn(here, "ct-2")
    assert known.scrub(f'File "{__file__}", line 3') == f'File "{__file__}", line 3'


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("No such file: '/mnt/pacs/Otto Meier/scan.nii'", f"No such file: '{PLACEHOLDER}'"),
        ("cannot open /mnt/pacs/Meier/scan.nii, sorry", f"cannot open {PLACEHOLDER}, sorry"),
        ("see file:///mnt/pacs/Meier.html", f"see {PLACEHOLDER}"),
        (f"in {logging.__file__}", f"in {logging.__file__}"),
        ("POST /api/flow_runs/filter", "POST /api/flow_runs/filter"),
        ("http://127.0.0.1:4200/runs/flow-run/1", "http://127.0.0.1:4200/runs/flow-run/1"),
        ("3/4 and/or n/a", "3/4 and/or n/a"),
        ("UID 1.2.840.113619.2.55.3.4711 in 3.11.7", f"UID {UID} in 3.11.7"),
        ("name Meier^Otto^^Dr. given", f"name {NAME}^^Dr. given"),
        ("    ~~~~^^^^^^", "    ~~~~^^^^^^"),
    ],
)
def test_what_was_never_learned_is_hidden_by_its_looks(said: str, kept: str) -> None:
    assert PathFilter().scrub(said) == kept


def test_every_logger_and_warning_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    install()
    install()
    record = logging.getLogger("anything").makeRecord("anything", 40, "", 0, "at %s", ("/mnt/pacs/Meier/x",), None)
    assert record.getMessage() == f"at {PLACEHOLDER}"
    text = warnings.formatwarning(UserWarning("at /mnt/pacs/Meier/x"), UserWarning, __file__, 3, "")
    assert "Meier" not in text
    assert "UserWarning" in text


def test_a_record_whose_arguments_do_not_fit_is_kept_without_them() -> None:
    record = logging.LogRecord("x", 40, "", 0, "%d slices", ("Meier",), None)
    assert PathFilter().filter(record)
    assert record.getMessage() == "%d slices (its arguments do not fit: TypeError)"


def test_thousands_of_names_cost_a_line_little_more_than_few() -> None:
    """The work of a search depends on the text, since no gram indexes many secrets."""
    known = Redactor()
    for n in range(5000):
        known.hide(f"/mnt/pacs/export/Meier_{n:05d}/scan.nii.gz", f"<{n}>", path=True)
        known.hide(f"Meier_{n:05d}", f"<{n}>")
    assert max(len(filed) for filed in known._grams.values()) <= 25
    began = time.perf_counter()
    assert known.scrub("x Meier_04711 y") == "x <4711> y"
    assert time.perf_counter() - began < 1


def test_a_stopped_step_is_no_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    from flows.machine.stopping import StoppedError

    def body() -> None:
        raise StoppedError

    state: Any = without_private_text(body)()
    assert (state.type, state.message) == ("CRASHED", "stopped by the user")
    assert "StoppedError" not in caplog.text
