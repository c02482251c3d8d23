"""The data that pages name, small and generated: `data`, `models`, `runs/liver/demo`, `scan.nii.gz` and so on."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from PIL import Image

from medad.cohort.phantom import write_btcv_phantoms, write_lits_phantoms
from medad.cohort.samples import generate_samples
from medad.ct.dicom_write import write_dicom
from medad.ct.io import read_labels, read_scan, write_mask
from tests.zsad.tiny_clip import tiny_clip, tiny_config, write_folder
from zsad.embedded.samples import ensure_samples

SIZE: dict[str, Any] = {"shape": (48, 40, 10), "spacing_mm": (7.0, 7.0, 12.0)}
CATEGORIES = ("bottle", "metal_nut")
SIDE_PX = 48


def make_world(root: Path) -> Path:
    """Write all data that pages name into a folder, and return it."""
    data = root / "data"
    write_btcv_phantoms(data / "btcv", 2, seed=1, **SIZE)
    write_lits_phantoms(data / "lits", 2, seed=2, **SIZE)
    write_btcv_phantoms(data / "healthy", 1, seed=9, **SIZE)
    _own_cases(data / "own", data)
    _inbox(data / "inbox", data / "lits")
    shutil.copy(data / "lits" / "volume-0.nii.gz", root / "scan.nii.gz")
    labels = read_labels(data / "lits" / "segmentation-0.nii.gz")
    write_mask(root / "liver.nii.gz", labels.values > 0, labels.geometry)
    _exports(root)
    _folders(root, data / "lits")
    rng = np.random.default_rng(0)
    for set_name in ("mvtec", "visa"):
        for category in CATEGORIES:
            _category(data / set_name / category, rng)
    _flat_images(root, rng)
    _models(root / "models")
    return root


def make_demo_run(root: Path) -> None:
    """Copy `runs/liver/hu_small` to `runs/liver/demo`, and add a scan and its label as the demo's inserted lesions."""
    folder = root / "runs" / "liver" / "demo"
    shutil.copytree(root / "runs" / "liver" / "hu_small", folder)
    case = folder / "inserted" / "0001"
    case.mkdir(parents=True)
    shutil.copy(root / "data" / "lits" / "volume-0.nii.gz", case / "scan.nii.gz")
    shutil.copy(root / "data" / "lits" / "segmentation-0.nii.gz", case / "label.nii.gz")


def make_samples(cache: Path) -> None:
    """Write the sample data into a cache folder: photographs, and phantoms that pass for fetched CTs."""
    generate_samples(cache / "samples", say=lambda line: None)
    manifest = cache / "samples" / "samples.json"
    # otherwise `adflows samples` asks the package index for the real ones
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace('"generated": true', '"generated": false'), encoding="utf-8"
    )
    materials = ensure_samples(cache / "samples", lambda line: None)
    for category in ("coins", "grass", "gravel"):  # one is enough to run, and takes seconds
        shutil.rmtree(materials / category)


def _own_cases(root: Path, data: Path) -> None:
    """Write cases of a hospital's own layout: a folder per case."""
    for part, scans, labels in (
        ("healthy", "btcv/img/img000{}.nii.gz", "btcv/label/label000{}.nii.gz"),
        ("tumour", "lits/volume-{}.nii.gz", "lits/segmentation-{}.nii.gz"),
    ):
        for number, name in enumerate(("p01-a", "p02-a")):
            folder = root / part / name
            folder.mkdir(parents=True)
            which = number + (part == "healthy")
            shutil.copy(data / scans.format(which), folder / "scan.nii.gz")
            shutil.copy(data / labels.format(which), folder / "labels.nii.gz")


def _inbox(root: Path, lits: Path) -> None:
    for number, name in enumerate(("case-1", "case-2")):
        folder = root / name
        folder.mkdir(parents=True)
        shutil.copy(lits / f"volume-{number}.nii.gz", folder / "scan.nii.gz")
        shutil.copy(lits / f"segmentation-{number}.nii.gz", folder / "liver.nii.gz")


def _folders(root: Path, lits: Path) -> None:
    """Write a folder of scans and a folder of their liver masks."""
    for number in range(2):
        for name in ("scans", "masks"):
            (root / name).mkdir(exist_ok=True)
        shutil.copy(lits / f"volume-{number}.nii.gz", root / "scans" / f"p{number}_0000.nii.gz")
        labels = read_labels(lits / f"segmentation-{number}.nii.gz")
        write_mask(root / "masks" / f"p{number}_liver.nii.gz", labels.values > 0, labels.geometry)


def _exports(root: Path) -> None:
    """Write a CD with two CT series, and a zip with one. Both have other files beside the slices."""
    volume = read_scan(root / "scan.nii.gz")
    pixels, affine = volume.geometry.to_source(volume.hu), volume.geometry.affine
    for number, phase in ((3, "arterial"), (4, "portal")):
        folder = root / "cd" / "DICOM" / phase
        folder.mkdir(parents=True)
        write_dicom(folder, pixels + number, affine)
        for file in sorted(folder.iterdir()):
            data = pydicom.dcmread(file)
            data.SeriesNumber, data.ConvolutionKernel = number, "B30f"
            data.SeriesDescription = f"Abdomen {phase}"
            data.save_as(file)
    (root / "data" / "exports").mkdir()
    scout = pydicom.dcmread(next((root / "cd" / "DICOM" / "portal").iterdir()))
    scout.ImageType, scout.SeriesInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], "2.25.1"
    scout.save_as(root / "cd" / "DICOM" / "scout")
    scout.SOPClassUID, scout.Modality = "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"
    del scout.PixelData
    scout.save_as(root / "cd" / "DICOM" / "structures")
    (root / "cd" / "key.jpg").write_bytes(b"a picture")
    with zipfile.ZipFile(root / "export.zip", "w") as archive:
        for file in sorted((root / "cd").rglob("*")):
            if file.is_file() and "arterial" not in file.parts:
                archive.write(file, file.relative_to(root))


def _category(root: Path, rng: np.random.Generator) -> None:
    """Write a category in MVTec AD's layout: noise, with a bright square as the defect."""
    for name in ("train/good/000", "train/good/001", "test/good/000", "test/good/001"):
        _save(root / f"{name}.png", rng.integers(0, 120, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8))
    for number in range(2):
        pixels = rng.integers(0, 120, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        pixels[8:20, 8:20] += 120
        mask[8:20, 8:20] = 255
        _save(root / "test" / "scratch" / f"{number:03d}.png", pixels)
        _save(root / "ground_truth" / "scratch" / f"{number:03d}_mask.png", mask)


def _flat_images(root: Path, rng: np.random.Generator) -> None:
    """Write folders of images without labels, and another tool's maps with their masks."""
    for name in ("metal_nut/000", "metal_nut/001", "metal_nut/002", "good/000", "good/001", "good/002"):
        _save(root / f"{name}.png", rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8))
    for number in range(3):
        mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        mask[8:20, 8:20] = 255 * (number > 0)
        _save(root / "masks" / f"{number:03d}.png", mask)
        path = root / "maps" / f"{number:03d}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, (mask / 255 + rng.random(mask.shape)).astype(np.float32))


def _models(root: Path) -> None:
    config = tiny_config()
    model = tiny_clip(config)
    write_folder(root / "my-clip", model, config)
    torch.save(model.state_dict(), root / "vit_b_16_plus_240.pt")


def _save(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
