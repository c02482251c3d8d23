"""The DICOM node against peers in this process: what it takes, what it refuses, and what it writes."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, MRImageStorage
from pynetdicom import AE, evt

from flows.node.receiver import OUT_OF_RESOURCES, receiving
from flows.node.sender import ResultSender
from flows.node.series_folders import INCOMING, SeriesFolders
from medad.base.errors import ConfigError
from medad.config.inbox import InboxSettings
from medad.config.node import ListenSettings, SendSettings
from medad.ct.dicom_write import write_dicom

pytestmark = pytest.mark.filterwarnings(
    # pynetdicom leaves sockets open that could not be bound or connected
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
)
ROOT = Path(__file__).resolve().parents[3]
NAME, PATIENT = "MUSTERMANN^MAX", "PID4711"
PLANES = 6


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ADFLOWS_PRIVATE", str(tmp_path / "private"))
    yield
    gc.collect()  # the sockets named above


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    """Write a series with a patient, and return its slices."""
    folder = tmp_path / "series"
    folder.mkdir()
    write_dicom(folder, np.arange(8 * 10 * PLANES, dtype=np.float32).reshape(8, 10, PLANES), np.diag([1, 1, 2, 1.0]))
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.PatientName, data.PatientID = NAME, PATIENT
        data.save_as(file)
    return sorted(folder.iterdir())


@contextmanager
def node(inbox: Path, said: list[str], **settings: Any) -> Iterator[tuple[int, SeriesFolders]]:
    """Run a node on any free port. Yield the port and its folders."""
    values = {"callers": ("PEER",), "complete_s": 1, "port": free_port()} | settings
    listen = ListenSettings(**values)
    folders = SeriesFolders(inbox, complete_s=0.0, max_bytes=1e9 * listen.max_waiting_gb)
    with folders.opened(), receiving(listen, folders, said.append) as port:
        yield port, folders


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def associate(port: int, *, own: str = "PEER", called: str = "ADFLOWS", sop_class: str = CTImageStorage) -> Any:
    entity = AE(ae_title=own)
    entity.add_requested_context(sop_class)
    return entity.associate("127.0.0.1", port, ae_title=called)


def send(port: int, files: list[Path]) -> list[int]:
    association = associate(port)
    statuses = [association.send_c_store(file).get("Status") for file in files]
    association.release()
    return statuses


def wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def pixels(files: list[Path]) -> dict[str, str]:
    """Return a digest of each slice's pixels by its UID."""
    read = [pydicom.dcmread(file) for file in files]
    return {str(each.SOPInstanceUID): hashlib.sha256(each.PixelData).hexdigest() for each in read}


def test_a_series_becomes_one_scan_of_the_inbox(series: list[Path], tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    said: list[str] = []
    with node(inbox, said) as (port, folders):
        association = associate(port)
        for file in series:
            assert association.send_c_store(file).Status == 0
        assert folders.deliver() == [], "the caller may send more"
        association.release()
        [(name, count)] = wait_for(folders.deliver)
    assert count == PLANES
    [folder] = [path for path in inbox.iterdir() if not path.name.startswith(".")]
    assert folder.name == name
    assert pixels(list(folder.iterdir())) == pixels(series)
    assert all(pydicom.dcmread(file).PatientName == NAME for file in folder.iterdir())
    names = " ".join(str(path.relative_to(inbox)) for path in inbox.rglob("*"))
    source = pydicom.dcmread(series[0])
    for secret in (NAME, PATIENT, str(source.SOPInstanceUID), str(source.SeriesInstanceUID)):
        assert secret not in names + " ".join(said)


def test_a_series_that_is_sent_again_is_not_doubled(series: list[Path], tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    with node(inbox, []) as (port, folders):
        assert send(port, series[:4]) == [0] * 4
        [(name, _)] = wait_for(folders.deliver)
        before = {file.name: file.stat().st_mtime_ns for file in (inbox / name).iterdir()}
        assert send(port, [*series, *series]) == [0] * 2 * PLANES
        assert wait_for(folders.deliver) == [(name, 2)], "two slices are new"
    after = {file.name: file.stat().st_mtime_ns for file in (inbox / name).iterdir()}
    assert pixels(list((inbox / name).iterdir())) == pixels(series)
    assert before.items() <= after.items(), "the others were not touched"
    assert [path.name for path in (inbox / INCOMING).iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("own", "called"), [("STRANGER", "ADFLOWS"), ("PEER", "OTHER")])
def test_an_unknown_title_is_refused(own: str, called: str, tmp_path: Path) -> None:
    said: list[str] = []
    with node(tmp_path / "inbox", said) as (port, _):
        assert associate(port, own=own, called=called).is_rejected
        assert wait_for(lambda: said) == ["127.0.0.1: refused by its AE title, or too many"]


def test_another_address_is_disconnected(tmp_path: Path) -> None:
    said: list[str] = []
    with node(tmp_path / "inbox", said, addresses=("10.1.2.0/24",)) as (port, _):
        assert not associate(port).is_established
    assert said == ["127.0.0.1: refused, because this address is not in `addresses`"]


def test_only_ct_is_taken(series: list[Path], tmp_path: Path) -> None:
    with node(tmp_path / "inbox", []) as (port, _):
        assert not associate(port, sop_class=MRImageStorage).is_established


def test_too_many_callers_are_refused(tmp_path: Path) -> None:
    with node(tmp_path / "inbox", [], max_associations=1) as (port, _):
        first = associate(port)
        assert first.is_established
        assert not associate(port).is_established
        first.release()


def test_a_slice_without_space_is_refused_and_taken_later(series: list[Path], tmp_path: Path) -> None:
    size = series[0].stat().st_size
    said: list[str] = []
    with node(tmp_path / "inbox", said, max_waiting_gb=2.5 * size / 1e9) as (port, folders):
        assert send(port, series[:3]) == [0, 0, OUT_OF_RESOURCES]
        assert said == ["127.0.0.1: a slice was refused for lack of space"]
        wait_for(folders.deliver)
        assert send(port, series[2:3]) == [0]


def test_a_file_that_is_too_large_ends_its_connection(tmp_path: Path, series: list[Path]) -> None:
    said: list[str] = []
    data = pydicom.dcmread(series[0])
    data.PixelData = bytes(3_000_000)
    with node(tmp_path / "inbox", said, max_file_mb=1) as (port, folders):
        association = associate(port)
        status = association.send_c_store(data)
        assert "Status" not in status
        assert said[0] == "127.0.0.1: disconnected, because a file has more than 1 MB"
        assert send(port, series[:1]) == [0], "others go on"
        wait_for(folders.deliver)
    assert len(list((tmp_path / "inbox").rglob("*.dcm"))) == 1


def test_a_silent_caller_is_disconnected(tmp_path: Path) -> None:
    with node(tmp_path / "inbox", [], idle_s=1) as (port, _), socket.create_connection(("127.0.0.1", port)) as silent:
        silent.settimeout(30)
        assert silent.recv(100) == b"", "before it has asked for an association"
        association = associate(port)
        wait_for(lambda: not association.is_established)


@pytest.mark.parametrize("length", [0xFFFFFFF0, 1000], ids=["a PDU of 4 GB", "a PDU that does not come"])
def test_a_caller_that_stalls_or_lies_is_disconnected(length: int, tmp_path: Path, series: list[Path]) -> None:
    with node(tmp_path / "inbox", [], idle_s=1) as (port, _), socket.create_connection(("127.0.0.1", port)) as bad:
        bad.settimeout(30)
        bad.sendall(bytes([1, 0]) + length.to_bytes(4, "big") + b"x" * 10)
        assert send(port, series[:1]) == [0], "others are served meanwhile"
        assert bad.recv(100)[:1] in (b"", b"\x07"), "closed, or aborted"


def test_slices_without_uids_are_refused(series: list[Path], tmp_path: Path) -> None:
    data = pydicom.dcmread(series[0])
    del data.SeriesInstanceUID
    said: list[str] = []
    with node(tmp_path / "inbox", said) as (port, folders):
        association = associate(port)
        assert association.send_c_store(data).Status == 0xC000
        association.release()
        assert folders.deliver() == []
    assert said == ["127.0.0.1: a slice without the UIDs of study, series and instance was refused"]


def test_two_nodes_cannot_fill_one_inbox(tmp_path: Path) -> None:
    folders = SeriesFolders(tmp_path / "inbox", complete_s=1, max_bytes=1e9)
    with node(tmp_path / "inbox", []), pytest.raises(ConfigError, match="another `adflows liver listen`"):
        folders.opened().__enter__()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with node(tmp_path / "a", []) as (port, _), pytest.raises(ConfigError, match=f"127.0.0.1:{port}: cannot listen"):
        node(tmp_path / "b", [], port=port).__enter__()


CONFIG = """
name: node
inbox: {inbox}
out: {out}
scans: "*"
listen: {{port: {port}, callers: [PEER], complete_s: 1}}
"""


def start_node(config: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows", "liver", "listen", str(config)]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=stream)
    wait_for(lambda: b"listens on" in log.read_bytes() or process.poll() is not None)
    return process


def test_a_node_that_is_killed_loses_and_doubles_nothing(series: list[Path], tmp_path: Path) -> None:
    config, inbox, port = tmp_path / "node.yaml", tmp_path / "inbox", free_port()
    config.write_text(CONFIG.format(inbox=inbox, out=tmp_path / "out", port=port), encoding="utf-8")
    first = start_node(config, tmp_path / "first.log")
    association = associate(port)
    for file in series[:3]:
        assert association.send_c_store(file).Status == 0
    first.send_signal(signal.SIGKILL)
    first.wait()
    association.abort()
    [arriving] = [path for path in (inbox / INCOMING).iterdir() if path.is_dir()]
    assert pixels(list(arriving.iterdir())) == pixels(series[:3]), "each confirmed slice is on the disk"
    (arriving / ".tmp-1-x.dcm").write_bytes(b"half")
    second = start_node(config, tmp_path / "second.log")
    assert send(port, series) == [0] * PLANES, "the archive sends the whole series again"
    [folder] = wait_for(lambda: [path for path in inbox.iterdir() if not path.name.startswith(".")])
    assert pixels(list(folder.iterdir())) == pixels(series)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 128 + signal.SIGTERM
    said = (tmp_path / "second.log").read_text(encoding="utf-8").splitlines()
    assert said == [
        f"ADFLOWS listens on 127.0.0.1:{port}; Ctrl-C ends it",
        f"{folder.name}: {PLANES} slices received",
        "adflows: stopped by the user",
    ]


# results


@contextmanager
def archive(statuses: list[int] | None = None) -> Iterator[tuple[int, list[str]]]:
    """Run an archive that takes DICOM results. Yield its port and the UIDs that it took."""
    taken: list[str] = []

    def store(event: Any) -> int:
        status = statuses.pop(0) if statuses else 0
        if status == 0:
            taken.append(str(event.request.AffectedSOPInstanceUID))
        return status

    entity = AE(ae_title="ARCHIVE")
    for uid in ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.104.1"):
        entity.add_supported_context(uid)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    assert server is not None
    try:
        yield server.server_address[1], taken
    finally:
        server.shutdown()


def write_results(out: Path, case: str, number: int = 0) -> list[str]:
    """Write three small DICOM results of a case and return their UIDs."""
    folder, uids = out / case / "dicom", []
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"seg": "66.4", "sr": "88.34", "report": "104.1"}
    for name, kind in kinds.items():
        data = pydicom.Dataset()
        data.SOPClassUID = f"1.2.840.10008.5.1.4.1.1.{kind}"
        data.SOPInstanceUID = f"2.25.{int.from_bytes(f'{case}{name}{number}'.encode(), 'big') % 10**30}"
        data.PatientName = NAME
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        buffer = io.BytesIO()
        data.save_as(buffer, enforce_file_format=True)
        (folder / f"{name}.dcm").write_bytes(buffer.getvalue())
        uids.append(str(data.SOPInstanceUID))
    return uids


def sender(out: Path, port: int, said: list[str], clock: Callable[[], float] = time.monotonic) -> ResultSender:
    settings = SendSettings(address="127.0.0.1", port=port, ae_title="ARCHIVE")
    return ResultSender(out, settings, said.append, clock)


def test_results_are_sent_once_and_again_if_they_change(tmp_path: Path) -> None:
    said: list[str] = []
    with archive() as (port, taken):
        one = sender(tmp_path, port, said)
        wanted = write_results(tmp_path, "ct-1") + write_results(tmp_path, "ct-2")
        one.send_due()
        assert sorted(taken) == sorted(wanted)
        one.send_due()
        sender(tmp_path, port, said).send_due()  # another process
        assert len(taken) == 6
        changed = write_results(tmp_path, "ct-1", number=1)
        sender(tmp_path, port, said).send_due()
        assert sorted(taken[6:]) == sorted(changed)
    assert said[0] == f"ct-1: 3 DICOM results sent to ARCHIVE at 127.0.0.1:{port}"
    assert NAME not in " ".join(said)


def test_an_archive_that_is_away_gets_them_later(tmp_path: Path) -> None:
    said: list[str] = []
    now, port = [0.0], free_port()
    write_results(tmp_path, "ct-1")
    away = sender(tmp_path, port, said, lambda: now[0])
    away.send_due()
    assert said == [f"ct-1: its DICOM results are not sent yet: ARCHIVE at 127.0.0.1:{port} does not answer"]
    now[0] = 11.0
    away.send_due()
    assert len(said) == 1, "the same problem is said once"
    with archive() as (port, taken):
        back = sender(tmp_path, port, said, lambda: now[0])
        back._attempts = away._attempts
        now[0] = 12.0
        back.send_due()
        assert taken == [], "the second wait is longer"
        now[0] = 31.0
        back.send_due()
        assert len(taken) == 3


def test_a_refused_file_is_named_and_stops_no_other_case(tmp_path: Path) -> None:
    said: list[str] = []
    write_results(tmp_path, "ct-1")
    second = write_results(tmp_path, "ct-2")
    with archive([0xA700]) as (port, taken):
        assert not sender(tmp_path, port, said).send(sender(tmp_path, port, said).unsent())
    assert sorted(taken) == sorted(second)
    where = f"ARCHIVE at 127.0.0.1:{port}"
    assert said == [
        f"ct-2: 3 DICOM results sent to {where}",
        f"ct-1: its DICOM results are not sent yet: {where} refused report.dcm with status 0xA700",
    ]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"listen": {"callers": ["A"]}, "scans": "*/scan"}, "so `scans` must be"),
        ({"send": {"address": "pacs", "port": 104, "ae_title": "PACS"}}, "set `dicom: true`"),
        ({"listen": {"callers": []}}, "at least 1 item"),
        ({"listen": {"callers": ["A"], "addresses": ["pacs"]}}, "does not appear to be an IPv4 or IPv6 network"),
        ({"listen": {"callers": ["A" * 17]}}, "should match pattern"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], rule: str, tmp_path: Path) -> None:
    common = {"name": "x", "inbox": str(tmp_path / "in"), "out": str(tmp_path / "out"), "scans": "*"}
    with pytest.raises(ValueError, match=rule):
        InboxSettings(**(common | values))
