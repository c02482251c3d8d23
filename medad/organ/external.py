"""Other tools that find the liver, if this machine has them: TotalSegmentator and networks given by their path.

TotalSegmentator runs as a program, with weights that are already on disk. Nothing is downloaded and it reports nothing.
Networks are TorchScript files or MONAI bundles.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from numpy import ndarray
from torch import Tensor, nn

from medad.base.devices import pick_device
from medad.base.errors import InputError
from medad.ct.io import Geometry, Volume, read_labels_on, write_hu
from medad.organ.coarse import above_on_grid, coarse_shape, to_coarse

PROGRAM = "TotalSegmentator"
WEIGHTS = {"": ("Dataset291_", "Dataset298_"), "--fast": ("Dataset297_",)}
"""Weights that each variant needs: 1.5 mm with a first search at 6 mm, and 3 mm alone."""
ARGUMENTS: dict[str, list[str]] = {"": [], "--fast": ["--fast", "--robust_crop"]}
NO_NETWORK = "http://127.0.0.1:9"
"""Address of a proxy that does not exist, so that the program reaches no server."""

MODEL_MM, MODEL_HU, ROI = 1.5, (-160.0, 240.0), (96, 96, 96)
LIVER_CHANNEL = 1
CONFIGURATION = "configs/inference.json"
PROGRAM_SUFFIX = ".ts"
MODEL_FILES = ("model.ts", "models/model.ts", "models/model.pt")


@dataclass(frozen=True)
class TotalSegmentator:
    """An installed TotalSegmentator with weights on disk."""

    program: Path
    weights: Path
    variant: str
    """Option of the variant whose weights exist: empty or `--fast`."""
    names: tuple[str, ...]
    """Names of the weights' folders."""


def installed_totalsegmentator() -> TotalSegmentator | None:
    """Return this machine's TotalSegmentator. None if the program or its weights are missing."""
    program = shutil.which(PROGRAM)
    home = Path(os.environ.get("TOTALSEG_HOME_DIR", Path.home() / ".totalsegmentator"))
    weights = Path(os.environ.get("TOTALSEG_WEIGHTS_PATH", home / "nnunet" / "results"))
    if program is None or not weights.is_dir():
        return None
    folders = sorted(path.name for path in weights.iterdir() if path.is_dir() and any(path.rglob("*.pth")))
    for variant, wanted in WEIGHTS.items():
        names = [[name for name in folders if name.startswith(each)] for each in wanted]
        if all(names):
            return TotalSegmentator(Path(program), weights, variant, tuple(name for found in names for name in found))
    return None


def run_totalsegmentator(tool: TotalSegmentator, volume: Volume, device: str = "auto") -> Bool[ndarray, "X Y Z"]:
    """Return TotalSegmentator's liver in canonical order.

    The program gets a copy of the scan without the scan's name, and its own settings, so that it sends no statistics.

    Raises
    ------
    InputError
        The program failed or wrote no mask.
    """
    with TemporaryDirectory(prefix="medad-liver-") as name:
        work = Path(name)
        scan, out = work / "scan.nii.gz", work / "out"
        settings = {"totalseg_id": "none", "send_usage_stats": False, "prediction_counter": 0}
        (work / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        write_hu(scan, volume.hu, volume.geometry)
        command = [str(tool.program), "-i", str(scan), "-o", str(out), "--task", "total", "--roi_subset", "liver"]
        command += [*ARGUMENTS[tool.variant], "--device", "gpu" if pick_device(device).type == "cuda" else "cpu"]
        offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NO_NETWORK)
        places = {"TOTALSEG_HOME_DIR": str(work), "TOTALSEG_WEIGHTS_PATH": str(tool.weights)}
        ran = subprocess.run(command, env=os.environ | offline | places, capture_output=True, check=False)
        mask = out / "liver.nii.gz"
        if ran.returncode or not mask.is_file():
            raise InputError(
                tool.program,
                f"{PROGRAM} wrote no liver mask (exit code {ran.returncode}); give a mask with --liver MASK",
            )
        labels, _ = read_labels_on(volume.geometry, mask)
        result: ndarray = labels.values > 0
        return result


def model_files(path: Path) -> list[Path]:
    """Return the files that a network is read from: its weights, and for weights alone the bundle's configuration.

    Raises
    ------
    InputError
        The path contains no network.
    """
    file = path
    if path.is_dir():
        found = [path / name for name in MODEL_FILES if (path / name).is_file()]
        if not found:
            raise InputError(path, f"contains no network; expected one of {', '.join(MODEL_FILES)}")
        file = found[0]
    elif not path.is_file():
        raise InputError(path, "no such file or folder")
    return [file] if file.suffix == PROGRAM_SUFFIX else [file, file.parent.parent / CONFIGURATION]


def is_program(path: Path) -> bool:
    """Return whether a network is a TorchScript file, whose code runs when it is loaded. Raises InputError."""
    return model_files(path)[0].suffix == PROGRAM_SUFFIX


def load_model(path: Path, device: torch.device) -> nn.Module:
    """Load a network: a TorchScript file, or a folder with one of `MODEL_FILES`.

    Unpickles nothing. A TorchScript file runs its own code (`is_program`), so load only one that the user trusts.

    Raises
    ------
    InputError
        The path contains no network, or a file cannot be read as one.
    """
    file, *configuration = model_files(path)
    try:
        if not configuration:
            return torch.jit.load(file, map_location=device).eval()  # type: ignore[no-untyped-call, no-any-return]
        weights = torch.load(file, map_location=device, weights_only=True)
        net = _bundle_network(configuration[0]).to(device)
        net.load_state_dict(weights.get("state_dict", weights) if isinstance(weights, dict) else weights)
    except InputError:
        raise
    except Exception as error:
        raise InputError(file, f"cannot be loaded as a network ({type(error).__name__})") from error
    return net.eval()


def _bundle_network(config: Path) -> nn.Module:
    """Build the network that a bundle's configuration declares. Only classes of monai.networks are built."""
    try:
        declared: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))["network_def"]
        name = str(declared["_target_"]).rsplit(".", maxsplit=1)[-1]
        arguments = {key: value for key, value in declared.items() if not key.startswith("_")}
        from medad.base.monai_parts import nets

        network: nn.Module = getattr(nets, name)(**arguments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(config, f"declares no network of MONAI ({type(error).__name__}: {error})") from error
    return network


def run_model(net: nn.Module, volume: Volume, device: torch.device) -> Bool[ndarray, "X Y Z"]:
    """Return the liver that a network finds, on the scan's grid in canonical order.

    The network gets voxels of 1.5 mm in RAS order, HU -160..240 as 0..1, in windows of 96³ voxels. These are MONAI's
    usual values for CT of the abdomen. Channel 1 of its output, or its only channel, is the liver.
    """
    from medad.base.monai_parts import sliding_window_inference

    geometry: Geometry = volume.geometry
    shape = coarse_shape(volume.hu.shape, geometry.canonical_spacing_mm, MODEL_MM)
    low, high = MODEL_HU
    hu = (np.clip(to_coarse(volume.hu, shape), low, high) - low) / (high - low)
    ras = torch.from_numpy(np.ascontiguousarray(hu[::-1, ::-1]))[None, None].to(device)
    with torch.inference_mode():
        output = sliding_window_inference(ras, ROI, 1, net, overlap=0.25)
    assert isinstance(output, Tensor)
    level = _liver_level(output[0]).float().cpu().numpy()[::-1, ::-1]
    x, y, z = volume.hu.shape
    return above_on_grid(np.ascontiguousarray(level), (x, y, z))


def _liver_level(output: Float32[Tensor, "C X Y Z"]) -> Float32[Tensor, "X Y Z"]:
    """Return a level that is above 0 where the liver's logit is the largest, or where the only logit is positive."""
    if len(output) == 1:
        return output[0]
    others = torch.cat([output[:LIVER_CHANNEL], output[LIVER_CHANNEL + 1 :]])
    return output[LIVER_CHANNEL] - others.max(0).values
