"""Fuzz of the readers of scans and masks: damaged files are read or refused with one line, and nothing else happens.

python benchmarks/fuzz_readers.py --door dicom --minutes 10
python benchmarks/fuzz_readers.py --door nifti --minutes 10

A child process reads one damaged file after another. Findings are errors other than InputError, messages of several
lines, hangs, and files that were written. The exit code is 1 if there are any. The seed of each finding is printed, and
`--seed N --count 1` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import multiprocessing
import os
import sys
import tempfile
import time
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from medad.base.errors import InputError
from medad.ct import io
from medad.ct.dicom_write import write_dicom
from medad.ct.geometry import Geometry

LIMIT_S = 20.0
SHAPE = (16, 12, 6)
AFFINE = np.array([[-1.5, 0, 0, 10], [0, -1.5, 0, 20], [0, 0, 3, -50], [0, 0, 0, 1.0]])
INTERESTING = (
    *(b"\x00", b"\xff", b"\x7f", b"\x80", b"\x00\x00\x00\x80", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"),
    *(b"NaN ", b"-1"),
)


def write_seeds(folder: Path) -> dict[str, list[Path]]:
    """Write undamaged files: for DICOM a folder and a zip, else a file of each format."""
    rng = np.random.default_rng(0)
    hu = rng.normal(0, 200, SHAPE).astype(np.float32)
    labels = (hu > 0).astype(np.uint8)
    geometry = Geometry(SHAPE, AFFINE)
    series = folder / "series"
    series.mkdir()
    write_dicom(series, hu, AFFINE)
    with zipfile.ZipFile(folder / "series.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(series.iterdir()):
            archive.write(file, f"DICOM/{file.name}")
    canonical = geometry.to_canonical(hu)
    io.write_hu(folder / "scan.nii.gz", canonical, geometry)
    io.write_labels(folder / "label.nii.gz", geometry.to_canonical(labels), geometry)
    (folder / "scan.nii").write_bytes(gzip.decompress((folder / "scan.nii.gz").read_bytes()))
    import SimpleITK as sitk  # noqa: N813

    image = sitk.ReadImage(str(folder / "scan.nii.gz"))
    for name in ("scan.mha", "scan.nrrd"):
        sitk.WriteImage(image, str(folder / name))
    sitk.WriteImage(image, str(folder / "packed.nrrd"), True)
    files = ("scan.nii.gz", "scan.nii", "label.nii.gz", "scan.mha", "scan.nrrd", "packed.nrrd")
    return {"dicom": [series, folder / "series.zip"], "nifti": [folder / name for name in files]}


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Return the content with a few bytes changed, inserted, removed or repeated, mostly in the header."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        if not data:
            break
        header = min(len(data), 2000) if rng.random() < 0.8 else len(data)
        at = int(rng.integers(0, header))
        kind = rng.integers(0, 5)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            piece = INTERESTING[int(rng.integers(0, len(INTERESTING)))]
            data[at : at + len(piece)] = piece
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            data[at:at] = data[max(0, at - 16) : at]
        else:
            del data[at if rng.random() < 0.3 else len(data) - int(rng.integers(0, len(data))) :]
    return bytes(data)


def make(seed: int, seeds: list[Path], folder: Path) -> Path:
    """Write the damaged file or folder of a seed, and return its path."""
    rng = np.random.default_rng(seed)
    source = seeds[int(rng.integers(0, len(seeds)))]
    if source.is_dir():
        target = folder / "series"
        target.mkdir()
        files = sorted(source.iterdir())
        hit = set(rng.choice(len(files), int(rng.integers(1, 3)), replace=False).tolist())
        for index, file in enumerate(files):
            content = file.read_bytes()
            (target / file.name).write_bytes(damage(content, rng) if index in hit else content)
        return target
    target = folder / source.name
    content = source.read_bytes()
    if source.name.endswith(".nii.gz") and rng.random() < 0.7:  # else damage would only break the checksum
        content = gzip.compress(damage(gzip.decompress(content), rng), 1)
    else:
        content = damage(content, rng)
    target.write_bytes(content)
    return target


def read_all(connection: Connection, door: str, seeds: list[Path]) -> None:
    """Read the damaged file of each seed that comes, and answer what happened."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)  # native code comments on each file
    while (seed := connection.recv()) is not None:
        with tempfile.TemporaryDirectory(prefix="adflows-fuzz-") as place:
            path = make(seed, seeds, Path(place))
            before = {file: file.stat().st_size for file in Path(place).rglob("*")}
            try:
                io.source_digest(path)
                io.read_scan(path)
                answer = "read"
                if door == "nifti":
                    io.read_labels(path)
            except InputError as error:
                answer = "refused" if "\n" not in str(error) else f"FINDING several lines: {error}"
            except Exception as error:
                answer = f"FINDING {type(error).__name__}: {error}"
            if before != {file: file.stat().st_size for file in Path(place).rglob("*")}:
                answer = "FINDING files were written"
        connection.send(answer)


def main() -> int:
    """Run the fuzz, and print the counts and the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--door", choices=("dicom", "nifti"), required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=sys.maxsize)
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        seeds = write_seeds(Path(place))[options.door]
        end, process, connection = time.monotonic() + 60 * options.minutes, None, None
        for seed in range(options.seed, options.seed + options.count):
            if time.monotonic() > end:
                break
            if process is None:
                connection, other = context.Pipe()
                process = context.Process(target=read_all, args=(other, options.door, seeds), daemon=True)
                process.start()
                other.close()
                connection.send(options.seed)  # imports take seconds, which do not count
                connection.poll(120)
                connection.recv()
            assert connection is not None
            connection.send(seed)
            try:
                answer = connection.recv() if connection.poll(LIMIT_S) else f"FINDING no answer in {LIMIT_S:g} s"
            except EOFError:
                process.join()
                answer = f"CONTAINED crash with exit code {process.exitcode}"
            if answer.startswith(("FINDING no", "CONTAINED")):
                process.kill()
                process = None
            counts[answer.split(" ", maxsplit=1)[0]] += 1
            if answer not in ("read", "refused"):
                print(f"seed {seed}: {answer}"[:300], flush=True)
        if process is not None and connection is not None:
            connection.send(None)
    print(dict(counts))
    return int(counts["FINDING"] > 0)


if __name__ == "__main__":
    sys.exit(main())
