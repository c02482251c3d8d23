"""No patient's name, id, date or free text leaves the input files: planted in headers and paths, then searched for."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.privacy import PLACEHOLDER, PathFilter, PrivateLiver, PrivateZsad
from medad.config import DatasetSettings

SECRETS = ("MUSTERMANN", "Erika", "PID4711", "19640229", "Glasgow Str")


def holds(data: bytes) -> set[str]:
    """Secrets in these bytes, also inside gzip and in 16-bit text."""
    texts = [data]
    if data[:2] == b"\x1f\x8b":
        texts.append(zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data))  # also of a truncated stream
    return {
        secret for secret in SECRETS for text in texts if secret.encode() in text or secret.encode("utf-16-le") in text
    }


def search(folder: Path) -> dict[str, set[str]]:
    """Files below a folder that hold a secret, in name or content."""
    found = {}
    for path in folder.rglob("*"):
        secrets = {secret for secret in SECRETS if secret in path.name}
        if path.is_file():
            secrets |= holds(path.read_bytes())
        if secrets:
            found[str(path)] = secrets
    return found


def database() -> Path:
    from prefect.settings import get_current_settings

    url = get_current_settings().server.database.connection_url
    assert url is not None
    return Path(url.get_secret_value().partition("///")[2])


def dump(path: Path) -> bytes:
    """All that is in the database, write-ahead log included."""
    with sqlite3.connect(path) as connection:
        return "\n".join(connection.iterdump()).encode()


@pytest.fixture
def patient(new_world: Callable[..., Any], tmp_path: Path) -> Any:
    """A world whose test scans carry a patient in header and path, one of them broken."""
    import nibabel

    world = new_world(tmp_path / "world", train=1, test=2)
    named = world.root / "MUSTERMANN_Erika_19640229"
    world.lits.rename(named)
    for path in [*named.iterdir(), *(world.btcv / "img").iterdir()]:
        image: Any = nibabel.load(path)
        image.header["descrip"] = b"MUSTERMANN Erika PID4711"
        image.header["db_name"] = b"PID4711"
        image.header["aux_file"] = b"Glasgow Str"
        nibabel.save(nibabel.Nifti1Image(image.dataobj, image.affine, image.header), path)
    broken = named / "volume-1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-200])
    return world, named


def test_secrets_would_be_found(patient: Any) -> None:
    """The search itself works: the inputs hold every secret but the date, which is in the folder's name."""
    _, named = patient
    found = set().union(*search(named.parent).values())
    assert found == set(SECRETS)


def test_nothing_of_a_patient_is_stored(
    patient: Any,
    cli: Callable[..., Any],
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from prefect.logging.handlers import APILogWorker

    world, named = patient
    monkeypatch.setenv("ADFLOWS_CACHE", str(world.cache))
    caplog.set_level(logging.DEBUG, "prefect")
    ran = cli("liver", "run", world.config, "--test", named, "--out", tmp_path / "runs", "--json")
    assert ran.code == 2
    assert str(named / "volume-1.nii.gz") in ran.err, "the user's own terminal does say which file"
    model = Path(ran.answer["run_folder"])
    scan, label = named / "volume-0.nii.gz", named / "segmentation-0.nii.gz"
    broken = named / "volume-1.nii.gz"
    ran = cli(
        "liver", "segment", scan, broken, "--liver", label, "--liver", named / "segmentation-1.nii.gz",
        "--liver-label", 1, "--liver-label", 2, "--model", model, "--out", tmp_path / "segmented", "--json",
    )  # fmt: skip
    assert ran.code == 2
    ran = cli("liver", "step", "window", scan, "--out", tmp_path / "grey.nii.gz")
    assert ran.code == 0
    APILogWorker.drain_all(timeout=10)
    # the server stores task runs and logs in its own time; the search means something once they are there
    expected = (b"prepare lits-0", b"window input", b"lits-1: ", b"Finished in state")
    deadline = time.monotonic() + 30
    while not all(text in dump(database()) for text in expected):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    assert search(world.cache) == {}
    for written in (tmp_path / "runs", tmp_path / "segmented"):
        assert any(written.rglob("report.html"))
        assert search(written) == {}
    assert holds((tmp_path / "grey.nii.gz").read_bytes()) == set()
    assert holds(dump(database())) == set()
    assert holds(caplog.text.encode()) == set()


def test_nothing_of_a_persons_images_is_stored(
    new_images: Callable[..., Any],
    cli: Callable[..., Any],
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Folders and files named after a person, one of them broken; weights and model below such a folder too."""
    from prefect.logging.handlers import APILogWorker

    del prefect_server
    root = tmp_path / "MUSTERMANN_Erika_19640229"
    world = new_images(root)
    for path in (world.data / "cloth" / "test" / "good").iterdir():
        path.rename(path.with_name(f"PID4711-{path.name}"))
    broken = world.data / "cloth" / "test" / "good" / "PID4711-broken.png"
    broken.write_bytes(b"no image")
    textures = root / "textures"
    textures.mkdir()
    (textures / "texture.png").write_bytes((world.data / "screw" / "test" / "good" / "000.png").read_bytes())
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG, "prefect")
    options = ("--set", "data.opaque_ids=true", "--set", f"adapt.textures={textures}", "--set", "seeds=[0]")
    ran = cli("zsad", "run", world.config, *options, "--out", tmp_path / "runs", "--name", "hidden", "--json")
    assert ran.code == 2
    assert f"{broken}: " in ran.err, "the user's own terminal does say which file"
    APILogWorker.drain_all(timeout=10)
    expected = (b"zsad hidden", b"zsad-encode cloth", b"zsad-score screw", b"zsad-categories")
    deadline = time.monotonic() + 30
    while not all(text in dump(database()) for text in expected):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert search(tmp_path / "cache") == {}
    assert any((tmp_path / "runs").rglob("report.html"))
    assert search(tmp_path / "runs") == {}
    assert holds(dump(database())) == set()
    assert holds(caplog.text.encode()) == set()


def test_a_path_in_a_bugs_traceback_is_hidden(tmp_path: Path) -> None:
    known = PathFilter()
    path = tmp_path / "MUSTERMANN" / "ct.nii.gz"
    known.learn(path, "case-7")
    try:
        raise FileNotFoundError(f"cannot open {path}")
    except FileNotFoundError as error:
        record = logging.LogRecord("x", 40, "", 0, "failed: %s", (path,), (type(error), error, error.__traceback__))
    assert known.filter(record)
    text = logging.Formatter().format(record)
    assert "MUSTERMANN" not in text
    assert "failed: <case-7>" in text
    assert "FileNotFoundError: cannot open <case-7>" in text


def test_short_names_do_not_garble_logs() -> None:
    known = PathFilter()
    known.learn(Path("/a/in"), "case-7")
    assert known.scrub("nothing in it") == "nothing in it"


def test_names_that_layouts_share_do_not_garble_or_misname() -> None:
    known = PathFilter()
    for case_id in ("ct-1", "ct-2"):
        known.learn(Path(f"/data/{case_id}/scan"), case_id)
        known.learn(Path(f"/data/{case_id}/MUSTERMANN.nii.gz"), case_id)
    assert known.scrub("off the scan's grid") == "off the scan's grid"
    assert known.scrub("/data/ct-1/scan is bad") == "<ct-1> is bad"
    assert known.scrub("MUSTERMANN.nii.gz is bad") == "<file> is bad"


def test_settings_as_json_withhold_the_data_folders() -> None:
    settings = PrivateLiver(
        name="x",
        train_data=DatasetSettings(root="/share/MUSTERMANN", layout="btcv"),
        test_data=DatasetSettings(root="samples:dicom", layout="lits"),
    )
    assert settings.train_data.root == "/share/MUSTERMANN"
    assert settings.model_dump()["train_data"]["root"] == "/share/MUSTERMANN"
    values = json.loads(settings.model_dump_json())
    assert values["train_data"]["root"] == PLACEHOLDER
    assert values["test_data"]["root"] == "samples:dicom"


def test_zsad_settings_as_json_withhold_folders_and_keep_what_says_which_model() -> None:
    def shown(**values: Any) -> dict[str, Any]:
        settings = PrivateZsad.model_validate({"name": "x", "data": {"root": "/share/MUSTERMANN"}} | values)
        assert PrivateZsad.model_validate(settings.model_dump()) == settings
        found: dict[str, Any] = json.loads(settings.model_dump_json())
        assert "MUSTERMANN" not in json.dumps(found)
        return found

    tag = {"model": "ViT-B-16-plus-240", "tag": "laion400m_e32"}
    assert shown(encoder=tag)["data"]["root"] == PLACEHOLDER
    assert shown(encoder=tag)["encoder"]["model"] == "ViT-B-16-plus-240"
    assert shown(encoder=tag, data={"root": "samples:materials"})["data"]["root"] == "samples:materials"
    assert shown(encoder={"model": "local-dir:/MUSTERMANN"})["encoder"]["model"] == f"local-dir:{PLACEHOLDER}"
    weights = {"model": "ViT-B-16-plus-240", "weights": "/home/MUSTERMANN/clip.pt"}
    assert shown(encoder=weights)["encoder"]["weights"] == f"{PLACEHOLDER}/clip.pt"
    assert shown(encoder=tag, adapt={"textures": "/MUSTERMANN"})["adapt"]["textures"] == PLACEHOLDER
    masks = {"root": "/x", "layout": "folder", "masks": "/share/MUSTERMANN"}
    assert shown(encoder=tag, data=masks)["data"]["masks"] == PLACEHOLDER
