"""The cost of the liver flow's computations, compared with usual code and with lower bounds.

    python benchmarks/liver.py [--data FOLDER] [--nets small,thesis] [--json FILE]

FOLDER contains volume-17.nii.gz and segmentation-17.nii.gz of LiTS. Without it, a generated scan of the same size is
used.
Every figure is a ratio of two times measured in this run. The weights are random, because no time depends on them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from scipy import ndimage
from torch import nn

from medad.anomalies.synthesis import synthesise
from medad.base import noise
from medad.base.devices import keep_freed_memory
from medad.cohort.datasets import LabelledScan
from medad.cohort.phantom import write_lits_phantoms
from medad.config.anomalies import SynthesisSettings
from medad.config.liver import InferenceSettings, LiverSettings, PostprocessSettings, PreprocessSettings, load
from medad.ct.checks import require_liver
from medad.ct.io import Geometry, read_labels, read_scan, write_hu, write_mask
from medad.networks import nets
from medad.networks.infer import load_networks
from medad.networks.losses import focal_loss, l1_loss
from medad.slices.prepared_file import PREPARED, load_prepared
from medad.slices.preprocess import prepare
from medad.steps.cases import prepare_case
from medad.steps.results import Member, Model
from medad.steps.segment import segment_case

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "liver"
DEVICES = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


@dataclass(frozen=True)
class Row:
    """One claim: a value and its limit. `detail` gives the measured times."""

    part: str
    what: str
    value: float
    unit: str
    limit: str
    kept: bool | None
    detail: str


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device | None = None) -> float:
    """Return the median seconds of `work`, after one warm-up call. With no repeats, return that call's."""
    samples = []
    for _ in range(repeats + 1):
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:] or samples)


@contextmanager
def fresh_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def load_case(folder: Path | None, scratch: Path) -> LabelledScan:
    """Return volume-17, or generate a scan of its size."""
    if folder is not None:
        return LabelledScan(folder / "volume-17.nii.gz", folder / "segmentation-17.nii.gz", (1, 2), 2)
    scan = write_lits_phantoms(scratch, 1, 17, shape=(512, 512, 118), spacing_mm=(0.74, 0.74, 1.6))[0]
    return LabelledScan(scan, scratch / "segmentation-0.nii.gz", (1, 2), 2)


def random_model(settings: LiverSettings, folder: Path) -> Model[Path]:
    """Write both networks with random weights, in the form that training writes."""
    folders = {}
    for role, chosen in zip(nets.PHASES, (settings.restoration, settings.segmentation), strict=True):
        out = folder / role
        out.mkdir(parents=True, exist_ok=True)
        net = nets.build(role, chosen, torch.Generator().manual_seed(0))
        nets.save(out / "model.safetensors", net, role, chosen)
        folders[role] = out
    return Model((Member(folders["restoration"], folders["segmentation"]),))


# (a) segmenting a scan, compared with only the networks


def network_seconds(pixels: ndarray, model: Model[Path], batch: int, device: torch.device) -> float:
    """Return the seconds of both networks for all slices, with data in memory. This is the lower bound."""
    [member] = model.members
    networks = load_networks(member.restoration, member.segmentation, str(device))
    query = (torch.from_numpy(pixels)[:, None].float() / 255).to(device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(count: int) -> None:
        for start in range(0, count, batch):
            part = query[start : start + batch]
            nets.segment_logits(networks.segmentation, nets.restore(networks.restoration, part), part)

    forward(batch)
    return median_seconds(lambda: forward(len(query)), 0, device)


def time_segmentation(case: LabelledScan, name: str, device: torch.device, scratch: Path) -> Row:
    settings = load(CONFIGS / f"{name}.yaml")
    model = random_model(settings, scratch / f"model-{name}")

    def whole() -> dict[str, float]:
        with fresh_folder() as prepared, fresh_folder() as out:
            start = time.perf_counter()
            prepare_case(case, settings.preprocess, prepared, training=False)
            middle = time.perf_counter()
            segment_case(
                prepared, model, InferenceSettings(), PostprocessSettings(min_lesion_mm3=50.0), str(device), out
            )
            end = time.perf_counter()
            return {"prepare": middle - start, "segment": end - middle, "total": end - start}

    with fresh_folder() as prepared:
        prepare_case(case, settings.preprocess, prepared, training=False)
        pixels = load_prepared(prepared / PREPARED).slices.pixels
    bare = network_seconds(pixels, model, InferenceSettings().batch_size, device)
    seconds = whole()
    ratio = seconds["total"] / bare
    detail = (
        f"{len(pixels)} slices of {settings.preprocess.slice_px} px: scan to mask {seconds['total']:.2f} s "
        f"(read and prepare {seconds['prepare']:.2f}), bare networks {bare:.2f} s"
    )
    what = f"scan to mask / bare networks, {name} nets, {device.type}"
    return Row("a", what, ratio, "x", "<= 1.3", ratio <= 1.3, detail)


# (b) synthesis


def synthesise_with_scipy(
    image: ndarray, organ: ndarray, settings: SynthesisSettings, rng: np.random.Generator
) -> ndarray:
    """Compute algorithm 1 and eq. 3.1 for one image, in the way of usual SciPy code."""
    element = noise.ellipse(settings.ellipse_px).numpy()
    blurred = ndimage.gaussian_filter(rng.standard_normal(image.shape), settings.blur_sigma_px)
    grey = (blurred - blurred.min()) / np.ptp(blurred) * 255
    mask = ndimage.binary_opening(grey > settings.threshold_grey, element)
    mask = ndimage.binary_closing(mask, element) & organ
    shift = rng.uniform(*settings.shift_grey) * rng.choice([-1, 1])
    result: ndarray = np.where(mask, np.clip(image + shift, 0, 255), image)
    return result


def time_synthesis(name: str, pixels: ndarray, organ: ndarray) -> list[Row]:
    settings = load(CONFIGS / f"{name}.yaml")
    batch = settings.train.restoration.batch_size
    rows = []
    for device in DEVICES:
        clean = torch.from_numpy(pixels[:batch])[:, None].to(device).float()
        inside = torch.from_numpy(organ[:batch])[:, None].to(device)
        generator = torch.Generator(device).manual_seed(0)

        def batched() -> None:
            synthesise(clean, inside, settings.synthesis, generator)  # noqa: B023 - called at once

        rng = np.random.default_rng(0)

        def one_by_one() -> None:
            for image, mask in zip(pixels[:batch], organ[:batch], strict=True):
                synthesise_with_scipy(image.astype(np.float32), mask, settings.synthesis, rng)  # noqa: B023

        ours = median_seconds(batched, 10, device) / batch
        theirs = median_seconds(one_by_one, 5) / batch
        limit = 3 if device.type == "cpu" else 50
        detail = f"an image of {pixels.shape[-1]} px: {ours * 1e3:.2f} ms, SciPy {theirs * 1e3:.2f} ms"
        what = f"SciPy per image / batched synthesis, {name}, {device.type}"
        rows.append(Row("b", what, theirs / ours, "x", f">= {limit}", theirs / ours >= limit, detail))
        if device.type == "cpu":
            for role in ("restoration", "segmentation"):
                step = training_step_seconds(role, settings, clean, inside, generator)
                share = ours * batch / step
                detail = f"batch {batch}: synthesis {ours * batch * 1e3:.1f} ms of a step of {step * 1e3:.0f} ms"
                what = f"synthesis / training step, {role}, {name}, cpu"
                rows.append(Row("b", what, 100 * share, "%", "<= 10", share <= 0.1, detail))
    return rows


def training_step_seconds(
    role: str, settings: LiverSettings, clean: torch.Tensor, organ: torch.Tensor, generator: torch.Generator
) -> float:
    restorer = nets.build("restoration", settings.restoration, torch.Generator().manual_seed(0))
    net: nn.Module = restorer
    if role == "segmentation":
        nets.fold_standardisation(restorer).requires_grad_(False)
        net = nets.build("segmentation", settings.segmentation, torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(net.parameters(), 1e-4)

    def step() -> None:
        made = synthesise(clean, organ, settings.synthesis, generator)
        query = made.image / 255
        if role == "restoration":
            loss = l1_loss(nets.restore(net, query), clean / 255)
        else:
            with torch.no_grad():
                restored = nets.restore(restorer, query)
            loss = focal_loss(nets.segment_logits(net, restored, query), made.mask, settings.train.focal)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return median_seconds(step, 1 if max(settings.restoration.widths) > 256 else 5)


# (c) preprocessing


def time_preprocessing(case: LabelledScan, slice_px: int) -> Row:
    """Compare the time from two files to equalised slices with MONAI's transforms for the same."""
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        HistogramNormalize,
        LoadImaged,
        MaskIntensityd,
        Orientationd,
        Resize,
        ScaleIntensityRanged,
    )

    settings = PreprocessSettings(slice_px=slice_px)
    assert case.label is not None
    label_path = case.label

    def ours() -> int:
        volume = read_scan(case.scan)
        liver = require_liver(read_labels(label_path), case.liver_labels, label_path)
        return len(prepare(volume.hu, liver, settings).z)

    low, high = settings.window_hu
    chain = Compose([
        LoadImaged(["image", "label"]),
        EnsureChannelFirstd(["image", "label"]),
        Orientationd(["image", "label"], axcodes="LPS", labels=None),
        ScaleIntensityRanged("image", low, high, 0, 255, clip=True),
        MaskIntensityd("image", mask_key="label", select_fn=lambda label: label > 0),
    ])  # fmt: skip
    linear = Resize((slice_px, slice_px), mode="bilinear")
    nearest = Resize((slice_px, slice_px), mode="nearest")

    def theirs() -> int:
        loaded = chain({"image": str(case.scan), "label": str(label_path)})
        image, label = loaded["image"][0], loaded["label"][0] > 0
        slices = []
        for z in range(image.shape[-1]):
            if label[..., z].any():
                organ = nearest(label[None, ..., z].float())[0] > 0
                plane = linear(image[None, ..., z])
                slices.append(HistogramNormalize(256, 0, 255, mask=organ[None].numpy())(plane))
        return len(slices)

    assert ours() == theirs()
    a, b = median_seconds(ours, 3), median_seconds(theirs, 1)
    detail = f"{slice_px} px, files to slices: {a:.2f} s, MONAI {b:.2f} s"
    return Row("c", "MONAI chain / our preprocessing", b / a, "x", ">= 1", b >= a, detail)


# (d) memory


def write_big_scan(folder: Path, planes: int) -> LabelledScan:
    """Write a scan of 512 x 512 x `planes` with CT-like noise and a liver on 400 planes."""
    rng = np.random.default_rng(0)
    grid = np.mgrid[-1:1:512j, -1:1:512j]
    body = np.hypot(*grid) < 0.9
    hu = np.full((planes, 512, 512), -1000, np.float32)
    liver = np.zeros(hu.shape, bool)
    for z in range(planes):
        hu[z] += body * 1040 + rng.normal(0, 20, (512, 512)).astype(np.float32)
        reach = 1 - ((z - planes / 2) / 200) ** 2
        if reach > 0:
            liver[z] = np.hypot(grid[0] + 0.2, grid[1] + 0.3) < 0.45 * reach**0.5
            hu[z] += liver[z] * 60
    geometry = Geometry((512, 512, planes), np.diag([-0.8, -0.8, 0.8, 1.0]))
    write_hu(folder / "scan.nii.gz", np.rint(hu).transpose(2, 1, 0), geometry)
    write_mask(folder / "label.nii.gz", liver.transpose(2, 1, 0), geometry)
    return LabelledScan(folder / "scan.nii.gz", folder / "label.nii.gz", (1,), None)


def _segment_and_report_peak(
    case: LabelledScan, model: Model[Path], slice_px: int, reply: multiprocessing.Queue[int]
) -> None:
    with fresh_folder() as prepared, fresh_folder() as out:
        prepare_case(case, PreprocessSettings(slice_px=slice_px), prepared, training=False)
        segment_case(prepared, model, InferenceSettings(), PostprocessSettings(min_lesion_mm3=50.0), "cpu", out)
    # not ru_maxrss, because a child inherits it from its parent
    status = Path("/proc/self/status").read_text(encoding="ascii")
    reply.put(int(status.partition("VmHWM:")[2].split()[0]) * 1024)


def measure_memory(name: str, planes: int) -> Row:
    settings = load(CONFIGS / f"{name}.yaml")
    context = multiprocessing.get_context("spawn")
    with fresh_folder() as folder:
        # in a new process, because the memory of this process must not count
        maker = context.Process(target=write_big_scan, args=(folder, planes))
        maker.start()
        maker.join()
        case = LabelledScan(folder / "scan.nii.gz", folder / "label.nii.gz", (1,), None)
        reply = context.Queue()
        model = random_model(settings, folder)
        worker = context.Process(
            target=_segment_and_report_peak, args=(case, model, settings.preprocess.slice_px, reply)
        )
        start = time.perf_counter()
        worker.start()
        peak = reply.get(timeout=1800) / 1e9
        worker.join()
    detail = f"peak resident memory of the process, Python and torch included; {time.perf_counter() - start:.0f} s"
    return Row("d", f"512 x 512 x {planes} segmented, {name}", peak, "GB", "< 3", peak < 3, detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with volume-17.nii.gz and segmentation-17.nii.gz")
    parser.add_argument("--nets", default="small,thesis", help="configurations whose networks to time")
    parser.add_argument("--parts", default="abcd", help="letters to measure")
    parser.add_argument("--planes", type=int, default=1000, help="planes of the scan of (d)")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    keep_freed_memory()
    names = arguments.nets.split(",")
    rows: list[Row] = []
    with fresh_folder() as scratch:
        case = load_case(arguments.data, scratch)
        if "c" in arguments.parts:
            rows.append(time_preprocessing(case, 256))
        for name in names:
            settings = load(CONFIGS / f"{name}.yaml")
            if "b" in arguments.parts:
                with fresh_folder() as prepared:
                    prepare_case(case, settings.preprocess, prepared, training=False)
                    slices = load_prepared(prepared / PREPARED).slices
                rows += time_synthesis(name, slices.pixels, slices.organ)
            if "a" in arguments.parts:
                rows += [time_segmentation(case, name, device, scratch) for device in DEVICES]
        if "d" in arguments.parts:
            rows.append(measure_memory(names[0], arguments.planes))
    rows.sort(key=lambda row: row.part)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {gpu}, torch {torch.__version__}"
    print(f"{machine}; scan: {'generated' if arguments.data is None else 'lits-17'}\n")
    print("| | figure | value | limit | | behind it |\n|---|---|---|---|---|---|")
    for row in rows:
        verdict = "kept" if row.kept else "MISSED"
        print(f"| {row.part} | {row.what} | {row.value:.2f} {row.unit} | {row.limit} | {verdict} | {row.detail} |")
    if not all(row.kept for row in rows):
        print("\nA limit was missed.")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1), encoding="utf-8"
        )
    sys.exit(0 if all(row.kept for row in rows) else 1)


if __name__ == "__main__":
    main()
