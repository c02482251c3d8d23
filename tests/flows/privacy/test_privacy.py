"""No patient's name, id, date or free text leaves the input files: tests mark the inputs and search all outputs."""

from __future__ import annotations

import base64
import gzip
import html
import json
import logging
import os
import re
import subprocess
import sys
import time
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.privacy.log_filter import PathFilter, path_filter
from flows.runs.outcome import Outcome
from flows.runs.runner import new_runner
from flows.store.step import Step
from medad.base.settings import ANY_MACHINE
from medad.base.text import PLACEHOLDER
from medad.config.liver import DatasetSettings, LiverSettings
from tests.flows import canaries, leaks
from tests.flows.live_server import free_port
from zsad.config.settings import ZsadSettings

SECRETS = ("MUSTERMANN", "Erikadorothea", "PID4711", "19640229", "Glasgow Str")


def holds(data: bytes, secrets: Iterable[str] = SECRETS) -> set[str]:
    return leaks.find_secrets(data, secrets)


def search(folder: Path, secrets: Iterable[str] = SECRETS) -> dict[str, set[str]]:
    return leaks.find_leaks(folder, secrets)


def database() -> Path:
    from prefect.settings import get_current_settings

    url = get_current_settings().server.database.connection_url
    assert url is not None
    return Path(url.get_secret_value().partition("///")[2])


dump = leaks.database_bytes


def wait_for(*texts: str) -> bytes:
    """Return the database once it contains these texts: the server stores task runs and logs with a delay."""
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=10)
    deadline = time.monotonic() + 60
    while True:
        content = dump(database())
        missing = [text for text in texts if text.encode() not in content]
        if not missing:
            return content
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """Clear the filter: it must not know paths of other tests."""
    path_filter.clear()


@pytest.fixture
def patient(new_world: Callable[..., Any], tmp_path: Path) -> Any:
    """Create data whose test scans have a patient in header and path; one of them is broken."""
    import nibabel

    world = new_world(tmp_path / "world", train=1, test=2)
    named = world.root / "MUSTERMANN_Erikadorothea_19640229"
    world.lits.rename(named)
    for path in [*named.iterdir(), *(world.btcv / "img").iterdir()]:
        image: Any = nibabel.load(path)
        image.header["descrip"] = b"MUSTERMANN Erikadorothea PID4711"
        image.header["db_name"] = b"PID4711"
        image.header["aux_file"] = b"Glasgow Str"
        nibabel.save(nibabel.Nifti1Image(image.dataobj, image.affine, image.header), path)
    broken = named / "volume-1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-200])
    return world, named


def test_secrets_would_be_found(patient: Any) -> None:
    """The search itself works: the inputs contain every secret except the date, which is in the folder's name."""
    _, named = patient
    found = set().union(*search(named.parent).values())
    assert found == set(SECRETS)


@pytest.mark.slow
def test_nothing_of_a_patient_is_stored(
    patient: Any,
    prefect_cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from prefect.logging.handlers import APILogWorker

    world, named = patient
    monkeypatch.setenv("ADFLOWS_CACHE", str(world.cache))
    caplog.set_level(logging.DEBUG, "prefect")
    ran = prefect_cli("liver", "run", world.config, "--test", named, "--out", tmp_path / "runs", "--json")
    assert ran.code == 2
    assert str(named / "volume-1.nii.gz") in ran.err, "the user's own terminal names the file"
    model = Path(ran.answer["run_folder"])
    scan, label = named / "volume-0.nii.gz", named / "segmentation-0.nii.gz"
    broken = named / "volume-1.nii.gz"
    ran = prefect_cli(
        "liver", "segment", scan, broken, "--liver", label, "--liver", named / "segmentation-1.nii.gz",
        "--liver-label", 1, "--liver-label", 2, "--model", model, "--out", tmp_path / "segmented", "--json",
    )  # fmt: skip
    assert ran.code == 2
    ran = prefect_cli("liver", "step", "window", scan, "--out", tmp_path / "grey.nii.gz")
    assert ran.code == 0
    ran = prefect_cli("liver", "export-slices", world.config, "--test", named, "--out", tmp_path / "slices", "--json")
    assert ran.code == 2
    APILogWorker.drain_all(timeout=10)
    # the server stores task runs and logs with a delay; the search is valid only after that
    expected = (b"prepare lits-0", b"lits-1: ", b"Finished in state")
    deadline = time.monotonic() + 30
    while not all(text in dump(database()) for text in expected):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    assert search(world.cache) == {}
    for written in (tmp_path / "runs", tmp_path / "segmented"):
        assert any(written.rglob("report.html"))
        assert search(written) == {}
    assert holds((tmp_path / "grey.nii.gz").read_bytes()) == set()
    assert any((tmp_path / "slices").rglob("*.png"))
    assert search(tmp_path / "slices") == {}
    assert holds(dump(database())) == set()
    assert holds(caplog.text.encode()) == set()


def test_nothing_of_a_persons_images_is_stored(
    new_images: Callable[..., Any],
    prefect_cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Create folders and files named after a person, one of them broken. Weights and model are in such a folder too."""
    from prefect.logging.handlers import APILogWorker

    root = tmp_path / "MUSTERMANN_Erikadorothea_19640229"
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
    options = ("--set", "data.pseudonyms=true", "--set", f"method.adapt.textures={textures}", "--set", "seeds=[0]")
    ran = prefect_cli("zsad", "run", world.config, *options, "--out", tmp_path / "runs", "--name", "hidden", "--json")
    assert ran.code == 2
    assert f"{broken}: " in ran.err, "the user's own terminal names the file"
    APILogWorker.drain_all(timeout=10)
    expected = (b"zsad hidden", b"zsad-encode cloth", b"zsad-system screw", b"zsad-categories")
    deadline = time.monotonic() + 30
    while not all(text in dump(database()) for text in expected):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert search(tmp_path / "cache") == {}
    assert any((tmp_path / "runs").rglob("report.html"))
    assert search(tmp_path / "runs") == {}
    assert holds(dump(database())) == set()
    assert holds(caplog.text.encode()) == set()


def write_with_texts(path: Path, pixels: Any) -> None:
    """Write an image with free text in every field that its format has for text."""
    from PIL import Image, PngImagePlugin

    image = Image.fromarray(pixels)
    exif = Image.Exif()
    for tag in (0x010E, 0x013B, 0x8298, 0x9C9B, 0x9286):  # description, artist, copyright, title, comment
        exif[tag] = "MUSTERMANN Erikadorothea PID4711"
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", "MUSTERMANN Erikadorothea")
        info.add_text("Patient", "PID4711", zip=True)
        info.add_itxt("Title", "Glasgow Str", zip=True)
        image.save(path, pnginfo=info, exif=exif, icc_profile=b"icc 19640229 profile")
    elif path.suffix == ".jpg":
        image.save(
            path,
            exif=exif,
            comment=b"MUSTERMANN Erikadorothea",
            icc_profile=b"icc 19640229 profile",
            xmp=b"Glasgow Str",
        )
    else:
        image.save(path, exif=exif, icc_profile=b"icc 19640229 profile")


def test_texts_in_images_reach_nothing_and_names_only_the_users_own_table(
    new_images: Callable[..., Any],
    prefect_cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`score` uses the file names of images in scores.csv, the report and the maps, but not in Prefect."""
    import numpy as np

    world = new_images(tmp_path / "world")
    folder = tmp_path / "Sanderling Horst"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("Umlaufer_1.png", "Umlaufer_2.jpg", "Umlaufer_3.tif"):
        write_with_texts(folder / name, rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    assert set().union(*search(folder).values()) == set(SECRETS), "the inputs contain the texts"
    (folder / "Umlaufer_4.png").write_bytes(b"no image")
    names = ("Sanderling", "Umlaufer")
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG, "prefect")
    out = tmp_path / "scored"
    ran = prefect_cli("zsad", "score", folder, "--out", out, "--config", world.config, "--category", "cloth", "--json")
    assert ran.code == 2
    assert f"{folder / 'Umlaufer_4.png'}: " in ran.err
    stored = wait_for("zsad-maps images", "zsad-score-images", "failed 1")
    assert holds(stored, (*SECRETS, *names)) == set()
    assert holds(caplog.text.encode(), (*SECRETS, *names)) == set()
    assert search(out) == {}
    assert search(tmp_path / "cache") == {}
    assert "Umlaufer" in (out / "scores.csv").read_text(encoding="utf-8")


# --- every input marked, every output searched


@pytest.fixture(scope="module")
def marked(new_world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Create scans with a patient in headers, tags, comments and names, and a configuration that also has one."""
    folder = tmp_path_factory.mktemp("marked")
    world = new_world(folder / "world", train=1, test=2)
    marked = canaries.write_marked(folder / "archiv", world)
    values = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    values["test_data"] = {
        "root": str(marked.dicom),
        "layout": "folder",
        "images": "*/CT",
        "labels": "*/leber.nii.gz",
        "liver_labels": [1, 2],
        "tumour_label": 2,
    }
    world.config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return world, marked


def test_every_canary_is_found_where_it_was_put(marked: Any) -> None:
    """The search finds every secret in the inputs. So finding none elsewhere is a result."""
    _, found = marked
    assert set(found.where) == set(canaries.SECRETS)
    for secret, place in found.where.items():
        assert search(place, [secret]), secret


@pytest.mark.parametrize("secret", ["Müstermännle", "Glasgower Straße 17", "19640229", "1.2.276.0.7230010.3.1.2.4711"])
@pytest.mark.parametrize(
    "write",
    [
        lambda text: text.encode(),
        lambda text: text.encode("latin-1"),
        lambda text: text.encode("utf-16"),
        lambda text: text.upper().encode(),
        lambda text: unicodedata.normalize("NFD", text).encode(),
        lambda text: json.dumps({"message": f"x{text}y"}).encode(),
        lambda text: json.dumps(json.dumps({"message": text})).encode(),
        lambda text: urllib.parse.quote(text).encode(),
        lambda text: urllib.parse.quote_plus(text).encode(),
        lambda text: html.escape(text).encode("ascii", "xmlcharrefreplace"),
        lambda text: repr(text.encode()).encode(),
        lambda text: gzip.compress(f"before {text} after".encode()),
        lambda text: b"head" + zlib.compress(f"before {text} after".encode()) + b"tail",
        lambda text: gzip.compress(f"before {text} after".encode() * 50)[:-8],
        lambda text: b"data:x;base64," + base64.b64encode(f"ab {text} cd".encode()),
        lambda text: b"data:x;base64," + base64.b64encode(gzip.compress(f"ab {text} cd".encode())),
        lambda text: f"INSERT INTO x VALUES(X'{text.encode().hex()}{'00' * 8}');".encode(),
    ],
)
def test_the_search_sees_through_every_way_of_writing(secret: str, write: Callable[[str], bytes]) -> None:
    assert holds(write(secret), [secret, "absentee"]) == {secret}


def test_nothing_marked_reaches_prefect_the_cache_or_the_outputs(
    marked: Any,
    prefect_cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    world, found = marked
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG, "prefect")
    said = []

    def run(*arguments: object, code: int) -> Any:
        ran = prefect_cli(*arguments)
        assert ran.code == code, ran.err
        said.append(ran.out)
        return ran

    prepared = run("liver", "prepare", world.config, code=2)
    ran = run("liver", "run", world.config, "--out", tmp_path / "runs", "--json", code=2)
    ids = dict(re.findall(r"^(ct-[0-9a-f]{12}) is (.*)$", prepared.err, re.MULTILINE))
    assert {Path(path) for path in ids.values()} == {found.good, found.broken}, "the user's own terminal names the file"
    [good] = [case_id for case_id, path in ids.items() if Path(path) == found.good]
    [bad] = set(ids) - {good}
    model = Path(ran.answer["run_folder"])
    assert (model / "masks" / f"{good}.nii.gz").is_file()
    loose = canaries.mark_itk(
        tmp_path / "einzeln", world.lits / "volume-0.nii.gz", world.lits / "segmentation-0.nii.gz"
    )
    scans = [loose["mhd"][0], loose["nrrd"][0], found.good, found.broken]
    masks = [loose["mhd"][1], loose["nrrd"][1], found.good_mask, found.good_mask]
    pairs = [option for mask in masks for option in ("--liver", mask)]
    ran = run(
        "liver", "segment", *scans, *pairs, "--liver-label", 1, "--liver-label", 2, "--model", model,
        "--out", tmp_path / "segmented", code=2,
    )  # fmt: skip
    assert f"{good} is {found.good}" in ran.err, "the same series has the same id in every flow"
    run("liver", "step", "window", found.good, "--out", tmp_path / "dicom.nii.gz", code=0)
    run("liver", "step", "window", loose["nrrd"][0], "--out", tmp_path / "nrrd.nii.gz", code=0)
    grey, mask = tmp_path / "nrrd.nii.gz", loose["nrrd"][1]
    labels = ("--liver-label", 1, "--liver-label", 2)
    run("liver", "step", "roi", grey, "--liver", mask, *labels, "--out", tmp_path / "r.nii.gz", code=0)
    run("liver", "run", world.config, "--out", tmp_path / "runs", "--dry-run", "--json", code=0)
    run("ids", "ls", code=0)
    run("ids", "ls", "--json", code=0)

    stored = wait_for(f"prepare {good}", f"{bad}: ", "Finished in state")
    assert holds(stored, canaries.SECRETS) == set()
    for place in (tmp_path / "cache", tmp_path / "runs", tmp_path / "segmented"):
        assert search(place, canaries.SECRETS) == {}
        assert any(place.rglob("*.nii.gz"))
    for name in ("dicom.nii.gz", "nrrd.nii.gz", "r.nii.gz"):
        assert holds((tmp_path / name).read_bytes(), canaries.SECRETS) == set()
    prefect_home = Path(os.environ["PREFECT_HOME"])
    register = [str(path) for path in (prefect_home / "private").iterdir()]
    assert {Path(path).name for path in search(prefect_home, canaries.SECRETS)} == {"case-ids.json"}, register
    assert holds("\n".join(said).encode(), canaries.SECRETS) == set(), "users may store or mail the output of --json"
    assert holds(caplog.text.encode(), canaries.SECRETS) == set()
    written = capfd.readouterr()  # the output of C libraries, which bypasses Python
    assert holds((written.out + written.err).encode(), canaries.SECRETS) == set()


# --- libraries, crashes, warnings


def misbehave(scan: Path, ends: str, out: Path) -> None:
    """Act like a library that logs, prints and raises private text in every possible way."""
    del out
    tags = canaries.DICOM_TEXTS
    quoted = f"{scan}: {tags['PatientName']}, {tags['PatientID']}, {tags['StudyInstanceUID']}"
    logging.getLogger("noisy.library").warning("cannot decode %s", quoted)
    logging.getLogger("noisy.library").warning("does not fit %d", quoted)
    logging.getLogger("noisy.library").warning(json.dumps({"file": str(scan), "who": tags["PatientName"]}))
    logging.getLogger("noisy.library").warning("GET /?file=%s", urllib.parse.quote(str(scan)))
    print(f"reading {quoted}")  # noqa: T201
    warnings.warn(f"odd header in {quoted}", UserWarning, stacklevel=1)
    if ends == "bug":
        raise RuntimeError(f"ITK ERROR: {quoted}; {scan.parent.name} {tags['StudyDescription']}")
    if ends == "panic":
        raise Panic(f"called unwrap on {quoted}")


MISBEHAVING_STEP = Step(
    "misbehaving", 1, "tests.flows.privacy.test_privacy:misbehave", ("pydantic",), not_in_key=frozenset({"scan"})
)


class Panic(BaseException):
    """An error like a panic in Rust, which is a BaseException but not an Exception in Python."""


@pytest.fixture
def extra_logger(prefect_server: str, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Act like PREFECT_LOGGING_EXTRA_LOGGERS=noisy.library,py.warnings, which Prefect reads when it is imported."""
    import prefect.main  # noqa: F401 - sets logging up

    caplog.set_level(logging.INFO, "prefect")
    handlers = logging.getLogger("prefect.extra").handlers
    assert handlers
    names = ("noisy.library", "py.warnings")
    logging.captureWarnings(True)
    for name in names:
        for handler in handlers:
            logging.getLogger(name).addHandler(handler)
    yield
    logging.captureWarnings(False)
    for name in names:
        for handler in handlers:
            logging.getLogger(name).removeHandler(handler)


@pytest.mark.filterwarnings("always:odd header")
@pytest.mark.usefixtures("extra_logger", "cache")
@pytest.mark.parametrize("ends", ["bug", "panic", "crash", "early crash", "well"])
def test_nothing_a_library_says_reaches_prefect(marked: Any, prefect_server: str, ends: str) -> None:
    """Test in a task, in a flow that crashes outside its tasks, and before the flow has learned any path."""
    from flows.runs.prefect_flow import prefect_flow

    del prefect_server
    _, found = marked
    marker = f"marked {ends}"

    def body() -> Outcome:
        if ends == "early crash":
            raise RuntimeError(f"cannot list '{found.good}' nor {found.loose}/x: {canaries.STUDY_UID}, {NAME_TAG}")
        runner = new_runner(ANY_MACHINE, refresh=False)
        ref = runner.run("ct-4711", MISBEHAVING_STEP(scan=found.good, ends=ends))
        assert (ref is None) == (ends == "bug")
        if ends == "crash":
            raise RuntimeError(f"flow cannot continue with {found.good}, {found.good.parent.name}, {NAME_TAG}")
        return Outcome(0, 0)  # for a failed task, the test reads only the logs

    state: Any = prefect_flow(body, marker, marker)(return_state=True)
    names = {"bug": "Completed", "well": "Completed", "panic": "Crashed"}
    assert state.name == names.get(ends, "Failed"), state
    if ends not in ("well", "bug"):
        assert isinstance(state.data if isinstance(state.data, BaseException) else state.data.result, BaseException)
    expected = {
        "bug": ("cannot decode &lt;ct-4711>", "RuntimeError: ITK ERROR: <ct-4711>"),
        "early crash": ("internal error (RuntimeError)",),
        "crash": ("internal error (RuntimeError)",),
        "panic": ("internal error (Panic)",),
        "well": ("reading <ct-4711>", "cannot decode <ct-4711>", "odd header in <ct-4711>", "its arguments do not fit"),
    }[ends]
    stored = wait_for(marker, *(text.replace("&lt;", "<") for text in expected))
    assert holds(stored, canaries.SECRETS) == set()


NAME_TAG = canaries.DICOM_TEXTS["PatientName"]


def test_a_worker_elsewhere_learns_from_the_call_alone(marked: Any, tmp_path: Path) -> None:
    """Test in a separate process, as with Dask and Ray: there the filter is not installed and has learned nothing."""
    _, found = marked
    program = f"""
import logging, warnings
from pathlib import Path
from flows.liver.steps import prepare
from flows.privacy.log_filter import learn_call
from medad.config.liver import DatasetSettings, PreprocessSettings
from medad.cohort.datasets import Case, LabelledScan
root = Path({str(found.dicom)!r})
scan, label = root / {canaries.FOLDER!r} / "CT", root / {canaries.FOLDER!r} / "leber.nii.gz"
data = DatasetSettings(root=str(root), layout="folder", images="*/CT", labels="*/x", liver_labels=(1,))
case = LabelledScan.of(Case("ct-77", scan, label, (1,), None, True), data)
learn_call("ct-77", prepare(case, PreprocessSettings(), training=False))
logging.basicConfig(level=0)
log = logging.getLogger("distributed.worker")
log.error("lost %s", scan / "Dateinamski 0001.dcm")
log.error("lost %s", label.relative_to(root))
log.error("lost {{'file': %r}}", str(scan).upper())
log.error("tags %s %s", {canaries.DICOM_TEXTS["PatientName"]!r}, {canaries.DICOM_TEXTS["StudyDescription"]!r})
log.error("header %s %s", {canaries.NIFTI_SECRETS[0]!r}, {canaries.NIFTI_SECRETS[3]!r})
warnings.warn(f"slow share {{root}}")
try:
    raise OSError(5, "Input/output error", str(scan))
except OSError:
    log.exception("worker failed")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"ADFLOWS_CACHE": str(tmp_path), "PYTHONIOENCODING": "utf-8"},
    )
    text = done.stderr.decode()
    assert text.count("lost ") == 3
    assert "OSError: [Errno 5] Input/output error: '<ct-77>'" in text
    assert "slow share <" in text
    assert holds(done.stderr + done.stdout, canaries.SECRETS) == set(), text


MISBEHAVING = """
import functools, logging, sys, warnings
import flows.devices.child
import medad.steps.cases
flows.devices.child.reads_apart = False  # a process of its own would read with the true function
mode, *arguments = sys.argv[1:]
inner = medad.steps.cases.prepare_case
@functools.wraps(inner)
def prepare_case(case, *rest, **more):
    # what a library can quote is of the file that it reads
    quoted = f"{case.scan} of {TAGS if case.scan.is_dir() else TEXTS}"
    logging.getLogger("noisy.library").warning("library: %s", quoted)
    warnings.warn("warned of " + quoted)
    print("printed", quoted)
    if mode == "bug":
        raise RuntimeError("library cannot read " + quoted)
    return inner(case, *rest, **more)
medad.steps.cases.prepare_case = prepare_case
logging.captureWarnings(mode != "worker")  # to the log, or as Python prints them
# a device step's process imports this program too, under another name
if __name__ == "__main__" and mode == "worker":
    # as a worker runs it: no terminal, only logs
    from pathlib import Path
    from flows.cli.liver_options import load_settings
    from flows.liver.flow import prepare
    from flows.machine.own_server import prepare_prefect
    settings = load_settings(Path(arguments[0]), {})
    print(prepare.prefect(settings=settings, refresh=True, return_state=True).name)
elif __name__ == "__main__":
    if mode == "crash":
        from flows.liver.stages import Stages
        def finish(self, *rest, **more):
            raise RuntimeError(f"flow crashed over {TAGS} in {self.settings.test_data.root}")
        Stages.finish = finish
    from flows.__main__ import main
    sys.argv = ["adflows", *arguments]
    main()
"""


@pytest.fixture
def real_server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Run `prefect server start` with a new home, and yield the environment for its clients."""
    port = free_port()
    home = tmp_path / "prefect"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "ADFLOWS_"))}
    environment |= {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONIOENCODING": "utf-8",
        "ADFLOWS_CACHE": str(tmp_path / "cache"),
        "ADFLOWS_SLOTS": str(tmp_path / "slots"),
        "ADFLOWS_PRIVATE": str(tmp_path / "private"),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, env=environment | {"PREFECT_SERVER_LOGGING_LEVEL": "DEBUG"}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                        break
                except OSError:
                    assert server.poll() is None, (tmp_path / "server.log").read_text(encoding="utf-8")
                    assert time.monotonic() < deadline
                    time.sleep(0.3)
            yield environment | {
                "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
                "PREFECT_LOGGING_EXTRA_LOGGERS": "noisy.library,py.warnings",
            }
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_marked_is_in_a_real_servers_database_or_any_log(
    marked: Any, real_server: dict[str, str], tmp_path: Path
) -> None:
    """Test with the command line and as a worker, with a library that misbehaves and a flow that crashes."""
    world, found = marked
    tags = " ".join(
        canaries.DICOM_TEXTS[name] for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID")
    )
    program = tmp_path / "misbehaving.py"
    texts = f"{canaries.NIFTI_SECRETS[0]} {canaries.NAME}, {canaries.NIFTI_SECRETS[3]}"
    program.write_text(f"TAGS, TEXTS = {tags!r}, {texts!r}\n{MISBEHAVING}", encoding="utf-8")
    root = Path(__file__).parents[3]

    def run(mode: str, *arguments: object, code: int) -> subprocess.CompletedProcess[bytes]:
        ran = subprocess.run(
            [sys.executable, str(program), mode, *map(str, arguments)],
            env=real_server | {"PYTHONPATH": str(root)}, cwd=tmp_path, capture_output=True, timeout=300, check=False,
        )  # fmt: skip
        assert ran.returncode == code, ran.stderr.decode()
        outputs.append(ran.stdout)
        return ran

    outputs: list[bytes] = []
    runs = tmp_path / "runs"
    run("quote", "liver", "run", world.config, "--out", runs, "--json", code=2)
    model = runs / "liver" / "tiny"
    ran = run(
        "quote", "liver", "segment", found.good, found.broken, "--liver", found.good_mask, "--liver", found.good_mask,
        "--liver-label", 1, "--liver-label", 2, "--model", model, "--out", tmp_path / "segmented", "--json", code=2,
    )  # fmt: skip
    assert str(found.broken) in ran.stderr.decode(), "the user's own terminal names the file"
    run("quote", "liver", "step", "window", found.good, "--out", tmp_path / "grey.nii.gz", code=0)
    run("bug", "liver", "prepare", world.config, "--refresh", code=1)
    run("crash", "liver", "run", world.config, "--out", runs, "--json", code=1)
    worker = run("worker", world.config, code=0)
    logs = worker.stdout + worker.stderr
    assert b"library: <ct-" in logs, "the worker's log has the library's lines, without the private text"
    assert b"printed <ct-" in logs
    assert b"warned of <ct-" in logs
    assert holds(logs, canaries.SECRETS) == set(), logs.decode()

    database = tmp_path / "prefect" / "prefect.db"
    expected = (
        b"Finished in state", b"library: <ct-", b"warned of <ct-", b"printed <ct-", b"library cannot read <ct-",
        b"internal error (RuntimeError)", b"prefect.flow-run.Failed", b"prefect.task-run.Failed", b"liver-cases",
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while missing := [text for text in expected if text not in dump(database)]:
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    assert holds(dump(database), canaries.SECRETS) == set()
    assert holds(b"\n".join(outputs), canaries.SECRETS) == set()
    for place in ("prefect", "cache", "slots", "runs", "segmented"):
        assert search(tmp_path / place, canaries.SECRETS) == {}, place
    for name in ("server.log", "grey.nii.gz"):
        assert holds((tmp_path / name).read_bytes(), canaries.SECRETS) == set(), name
    assert {Path(path).name for path in search(tmp_path / "private", canaries.SECRETS)} == {"case-ids.json"}


# --- the parts


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
    settings = LiverSettings(
        name="x",
        train_data=DatasetSettings(root="/share/MUSTERMANN", layout="btcv"),
        test_data=DatasetSettings(root="samples:dicom", layout="lits"),
    )
    assert settings.train_data.root == "/share/MUSTERMANN"
    assert settings.model_dump()["train_data"]["root"] == "/share/MUSTERMANN"
    values = json.loads(settings.model_dump_json())
    assert values["train_data"]["root"] == PLACEHOLDER
    assert values["test_data"]["root"] == "samples:dicom"


@pytest.mark.parametrize(
    ("patients", "shown"),
    [
        (r"^lits-(\d+)", r"^lits-(\d+)"),
        (r"patient_(\w+)_scan", r"patient_(\w+)_scan"),
        ("^(Mustermann|Musterfrau)-", PLACEHOLDER),
        (r"^(4711\d)-", PLACEHOLDER),
    ],
)
def test_settings_as_json_withhold_names_in_the_expression_of_patients(patients: str, shown: str) -> None:
    data = DatasetSettings(root="-", layout="lits", patients=patients)
    settings = LiverSettings(name="x", train_data=data, test_data=data)
    text = settings.model_dump_json()
    assert json.loads(text)["test_data"]["patients"] == shown
    assert LiverSettings.model_validate_json(text), "the settings of a run folder can be read back"


def test_zsad_settings_as_json_withhold_folders_and_keep_what_says_which_model() -> None:
    def shown(**values: Any) -> dict[str, Any]:
        settings = ZsadSettings.model_validate(
            {"name": "x", "data": {"root": "/share/MUSTERMANN"}, "method": {"system": "dual"}} | values
        )
        assert ZsadSettings.model_validate(settings.model_dump()) == settings
        found: dict[str, Any] = json.loads(settings.model_dump_json())
        assert "MUSTERMANN" not in json.dumps(found)
        return found

    tag = {"model": "ViT-B-16-plus-240", "tag": "laion400m_e32"}
    assert shown(encoder=tag)["data"]["root"] == PLACEHOLDER
    assert shown(encoder=tag)["encoders"]["main"]["model"] == "ViT-B-16-plus-240"
    assert shown(encoder=tag, data={"root": "samples:materials"})["data"]["root"] == "samples:materials"
    assert shown(encoder={"model": "local-dir:/MUSTERMANN"})["encoders"]["main"]["model"] == f"local-dir:{PLACEHOLDER}"
    weights = {"model": "ViT-B-16-plus-240", "weights": "/home/MUSTERMANN/clip.pt"}
    assert shown(encoder=weights)["encoders"]["main"]["weights"] == f"{PLACEHOLDER}/clip.pt"
    method = {"system": "dual", "adapt": {"textures": "/MUSTERMANN"}}
    assert shown(encoder=tag, method=method)["systems"][0]["adapt"]["textures"] == PLACEHOLDER
    masks = {"root": "/x", "layout": "folder", "masks": "/share/MUSTERMANN"}
    assert shown(encoder=tag, data=masks)["data"]["masks"] == PLACEHOLDER
