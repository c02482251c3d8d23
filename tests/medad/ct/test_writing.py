"""Writing of volumes: exact round trips, nothing carried over, full disks, memory."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medad.base.errors import DiskFullError
from medad.ct import io, nifti
from medad.ct.io import Geometry
from tests.medad.ct_volumes import ORIENTATIONS, SHAPE, linear_index, orientation_affine


@given(data=st.data())
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("round")
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    axes, signs = data.draw(st.sampled_from(ORIENTATIONS))
    affine = orientation_affine(axes, signs, data.draw(st.sampled_from([0.0, 3.0])))
    # float32 as in the header, so that the file has exactly this affine
    geometry = Geometry(shape, affine.astype(np.float32).astype(np.float64))
    size = geometry.canonical_shape
    hu = data.draw(hnp.arrays(np.float32, size, elements=st.floats(-4000, 4000, width=32)))
    probability = data.draw(hnp.arrays(np.float32, size, elements=st.floats(0, 1, width=32)))
    labels = data.draw(hnp.arrays(data.draw(st.sampled_from([np.uint8, np.int32])), size))
    mask = data.draw(hnp.arrays(np.bool_, size))
    layout = data.draw(st.sampled_from([np.ascontiguousarray, np.asfortranarray]))
    io.write_hu(folder / "hu.nii.gz", layout(hu), geometry)
    io.write_probability(folder / "probability.nii.gz", layout(probability), geometry)
    io.write_labels(folder / "labels.nii.gz", layout(labels), geometry)
    io.write_mask(folder / "mask.nii.gz", layout(mask), geometry)
    back = io.read_scan(folder / "hu.nii.gz")
    np.testing.assert_array_equal(back.hu, hu)
    np.testing.assert_array_equal(io.read_scan(folder / "probability.nii.gz").hu, probability)
    np.testing.assert_array_equal(io.read_labels(folder / "labels.nii.gz").values, labels)
    read_mask = io.read_labels(folder / "mask.nii.gz").values
    assert read_mask.dtype == np.uint8
    np.testing.assert_array_equal(read_mask, mask)
    assert back.geometry.affine.tobytes() == geometry.affine.tobytes()
    np.testing.assert_array_equal(geometry.to_canonical(geometry.to_source(hu)), hu)


def test_nothing_of_the_sources_text_is_carried_over(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(linear_index(SHAPE), np.diag([-1.0, -1.0, 1.0, 1.0]))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = b"SECRET"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"SECRET"))
    nibabel.save(image, tmp_path / "scan.nii.gz")
    volume = io.read_scan(tmp_path / "scan.nii.gz")
    io.write_mask(tmp_path / "mask.nii.gz", volume.hu > 3, volume.geometry)
    io.write_hu(tmp_path / "hu.nii.gz", volume.hu, volume.geometry)
    for name in ("mask", "hu"):
        packed = (tmp_path / f"{name}.nii.gz").read_bytes()
        assert b"SECRET" not in gzip.decompress(packed)
        assert len(gzip.decompress(packed)) == 352 + volume.hu.size * (1 if name == "mask" else 4)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    geometry = Geometry(SHAPE, np.diag([-1.0, -1.0, 1.0, 1.0]))
    mask = linear_index(SHAPE) % 2 == 0
    io.write_mask(tmp_path / "one.nii.gz", mask, geometry)
    os.utime(tmp_path / "one.nii.gz", (0, 0))
    io.write_mask(tmp_path / "another.nii.gz", np.asfortranarray(mask), geometry)
    packed = (tmp_path / "one.nii.gz").read_bytes()
    assert packed == (tmp_path / "another.nii.gz").read_bytes()
    # RFC 1952: flags (no name), then the time
    assert packed[3:8] == b"\0\0\0\0\0"


def test_atomic_path_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "out.json"
    final.write_text("old", encoding="utf-8")

    def stop_half_way() -> None:
        with io.atomic_path(final) as temporary:
            temporary.write_text("half", encoding="utf-8")
            assert temporary.suffix == final.suffix
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert final.read_text(encoding="utf-8") == "old"
    with io.atomic_path(final) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert final.read_text(encoding="utf-8") == "old"
    assert final.read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_full_device_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_full_device(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            self.touch()
            return open("/dev/full", mode, *args, **kwargs)  # noqa: PTH123 (Path.open is what is replaced)
        return open(self, mode, *args, **kwargs)  # noqa: PTH123

    geometry = Geometry(SHAPE, np.diag([-1.0, -1.0, 1.0, 1.0]))
    monkeypatch.setattr(Path, "open", to_full_device)
    with pytest.raises(DiskFullError, match=r"mask\.nii\.gz: no room left") as caught:
        io.write_mask(tmp_path / "mask.nii.gz", linear_index(SHAPE) > 3, geometry)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_full_file_system(tmp_path: Path) -> None:
    """Write to a file system of 1 MB, in a namespace that ends with its process."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    script = f"""
import numpy as np, pathlib, sys
from medad.ct import io
from medad.base.errors import DiskFullError
folder = pathlib.Path({str(tmp_path)!r})
geometry = io.Geometry((128, 128, 64), np.diag([-1.0, -1.0, 1.0, 1.0]))
noise = np.random.default_rng(0).random((128, 128, 64), dtype=np.float32)
(folder / "old.nii.gz").write_bytes(b"old")
try:
    io.write_probability(folder / "old.nii.gz", noise, geometry)
except DiskFullError as error:
    print("FULL", [path.name for path in folder.iterdir()], (folder / "old.nii.gz").read_bytes() == b"old")
"""
    command = f'mount -t tmpfs -o size=1m none "{tmp_path}" || exit 77; exec "{sys.executable}" -c "$SCRIPT"'
    environment = os.environ | {"SCRIPT": script, "PYTHONPATH": str(Path(io.__file__).parents[2])}
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", command]
    done = subprocess.run(unshare, env=environment, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount a file system here")
    assert done.stdout.strip() == "FULL ['old.nii.gz'] True", done.stderr


def test_silent_damage_while_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DamagesIt(nifti.GzipWriter):  # type: ignore[misc]
        def finish(self) -> None:
            super().finish()
            self._file.seek(-9, os.SEEK_END)
            self._file.write(b"\xff")

    monkeypatch.setattr(nifti, "GzipWriter", DamagesIt)
    geometry = Geometry(SHAPE, np.diag([-1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(OSError, match="read back"):
        io.write_mask(tmp_path / "mask.nii.gz", linear_index(SHAPE) > 3, geometry)
    assert list(tmp_path.iterdir()) == []


def test_memory_of_reading_and_writing_is_one_volume(tmp_path: Path) -> None:
    """Check that memory is 4 bytes per voxel and a few slabs, so that 512 x 512 x 1000 voxels need less than 1.9 GB."""
    shape = (512, 512, 160)
    deflate = zlib.compressobj(1, zlib.DEFLATED, 31)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    header.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with (tmp_path / "scan.nii.gz").open("wb") as file:
        file.write(deflate.compress(header.binaryblock + b"\0\0\0\0"))
        plane = (np.arange(512 * 512) % 2000 - 1000).astype(np.int16).tobytes()
        for _ in range(shape[2]):
            file.write(deflate.compress(plane))
        file.write(deflate.flush())
    script = """
import pathlib, resource, sys, numpy as np, SimpleITK
from medad.ct import io
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
volume = io.read_scan(pathlib.Path(sys.argv[1]) / "scan.nii.gz")
read = peak() - before
np.clip(volume.hu, 0, 1, out=volume.hu)
io.write_probability(pathlib.Path(sys.argv[1]) / "out.nii.gz", volume.hu, volume.geometry)
print(read / volume.hu.size, (peak() - before) / volume.hu.size)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(io.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    read, written = (float(value) for value in done.stdout.split())
    assert read < 5.5
    assert written < 6.5
