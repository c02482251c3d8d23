"""Tests of CLIPSeg, SAM and a dichotomous model from local files, against their forward passes written out."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor, SamImageProcessor, SamModel
from transformers.utils import logging

from medad.base.errors import ConfigError, InputError, UserError
from tests.zsad.tiny_segmenters import SAM_PX, write_clipseg, write_salient, write_sam
from zsad.scorers.segmentation.models import ClipSeg, Salient, Sam

CPU = torch.device("cpu")
PROMPTS = ("a tear", "some damage", "an error", "a missing component")


def _image(height: int, width: int, seed: int = 0) -> UInt8[ndarray, "H W 3"]:
    """Return an image of noise with a bright box."""
    image = np.random.default_rng(seed).integers(0, 120, (height, width, 3), dtype=np.uint8)
    image[height // 5 : height // 2, width // 8 : width // 2] = 240
    return image


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clipseg(tmp_path_factory.mktemp("clipseg"))


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam(tmp_path_factory.mktemp("sam"), seed=4, gain=4.0)


def test_clipseg_gives_what_the_model_gives_for_each_prompt_alone(clipseg: Path) -> None:
    tile = _image(40, 40)
    ours = ClipSeg.load(clipseg, CPU)
    maps = ours.segment(tile, ours.embed(PROMPTS))
    assert maps.shape == (4, 32, 32)
    logging.disable_progress_bar()
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg, local_files_only=True).eval()
    logging.enable_progress_bar()
    processor = CLIPSegProcessor.from_pretrained(clipseg, local_files_only=True)
    for prompt, ours_of_it in zip(PROMPTS, maps, strict=True):
        inputs = processor(text=[prompt], images=[Image.fromarray(tile)], return_tensors="pt")
        with torch.no_grad():
            expected = torch.sigmoid(model(**inputs).logits.reshape(32, 32))
        assert torch.allclose(ours_of_it, expected, atol=1e-5)
    assert (maps[0] - maps[1]).abs().max() > 1e-3  # far above the tolerance, so prompts have an effect


def _sam_written_out(
    folder: Path, image: UInt8[ndarray, "H W 3"], side: int, min_iou: float, min_stability: float, max_box_iou: float
) -> tuple[list[Bool[ndarray, "H W"]], Counter[str]]:
    """Generate masks as SAM's paper describes, point by point. Also return how many masks each rule dropped."""
    logging.disable_progress_bar()
    model = SamModel.from_pretrained(folder, local_files_only=True).eval()
    logging.enable_progress_bar()
    height, width = image.shape[:2]
    prepared = SamImageProcessor.from_pretrained(folder, local_files_only=True)(
        Image.fromarray(image), return_tensors="pt"
    )
    scale = SAM_PX / max(height, width)
    new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
    found: list[tuple[float, Any]] = []
    dropped: Counter[str] = Counter()
    for row in range(side):
        for column in range(side):
            point = [(column + 0.5) / side * new_width, (row + 0.5) / side * new_height]
            with torch.no_grad():
                out = model(pixel_values=prepared["pixel_values"], input_points=torch.tensor([[[point]]]))
            for low, iou in zip(out.pred_masks[0, 0], out.iou_scores[0, 0].tolist(), strict=True):
                padded = functional.interpolate(low[None, None], (SAM_PX, SAM_PX), mode="bilinear", align_corners=False)
                own = padded[..., :new_height, :new_width]
                logits = functional.interpolate(own, (height, width), mode="bilinear", align_corners=False)[
                    0, 0
                ].numpy()
                if not iou > min_iou:
                    dropped["iou"] += 1
                elif not (logits > 1).sum() > min_stability * (logits > -1).sum():
                    dropped["stability"] += 1
                else:
                    found.append((iou, logits > 0))
    selected: list[Any] = []
    for _, mask in sorted(found, key=lambda pair: -pair[0]):
        if any(_box_iou(mask, other) > max_box_iou for other in selected):
            dropped["overlap"] += 1
        else:
            selected.append(mask)
    return selected, dropped


def _box_iou(first: Any, second: Any) -> float:
    """Return the IoU of boxes from the first to the last pixel. Their width is the difference of the two."""
    boxes = []
    for mask in (first, second):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append((rows[0], columns[0], rows[-1], columns[-1]))
    (t1, l1, b1, r1), (t2, l2, b2, r2) = boxes
    common = max(0, min(b1, b2) - max(t1, t2)) * max(0, min(r1, r2) - max(l1, l2))
    return float(common / ((b1 - t1) * (r1 - l1) + (b2 - t2) * (r2 - l2) - common))


@pytest.mark.parametrize(
    ("settings", "drops"),
    [
        ({"min_iou": 2.0, "min_stability": 0.3, "max_box_iou": 1.0}, {"iou", "stability"}),
        ({"min_iou": 2.0, "min_stability": 0.3, "max_box_iou": 0.9}, {"iou", "stability", "overlap"}),
        ({"min_iou": 1e9, "min_stability": 0.3, "max_box_iou": 1.0}, {"iou"}),
    ],
)
def test_sam_is_asked_at_every_point_and_filtered(sam: Path, settings: dict[str, float], drops: set[str]) -> None:
    image = _image(50, 80)
    expected, dropped = _sam_written_out(sam, image, 4, **settings)
    assert set(dropped) == drops
    found = Sam.load(sam, CPU, points_per_side=4, **settings).segments(image)
    assert len(found) == len(expected) == 4 * 4 * 3 - dropped.total()
    for ours, literal in zip(found, expected, strict=True):
        assert ours.dtype == np.bool_
        assert (ours != literal).mean() < 1e-3


def test_sam_asks_for_fewer_points_at_a_time_of_a_large_image() -> None:
    calls = []

    def generator(image: Image.Image, points_per_batch: int, **_: Any) -> dict[str, list[Any]]:
        calls.append((image.size, points_per_batch))
        return {"masks": [], "scores": []}

    small, large = Sam(generator), np.zeros((4000, 8000, 3), dtype=np.uint8)
    assert small.segments(_image(50, 80)) == []
    assert small.segments(large) == []
    assert calls[0][0] == (80, 50)
    # three masks per point, together at most 64 Mi pixels; a small image also counts as 1024 x 1024
    assert [points for _, points in calls] == [21, 1]


def test_what_is_bright_stands_out(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[10:20, 20:50] = 255
    found = Salient.load(write_salient(tmp_path / "s.pt"), CPU, size_px=120).mask(image)
    assert found.shape == (40, 60)
    assert (found == (image[:, :, 0] > 0)).all()


class _Constant(nn.Module):
    """Returns one value everywhere, nested as in networks with side outputs."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        first = torch.full((1, 1, 9, 9), self.value)
        return [first, 1 - first], image


@pytest.mark.parametrize(
    ("value", "output", "threshold", "stands_out"),
    [
        (0.5, "probability", 0.5, True),
        (0.49, "probability", 0.5, False),
        (0.49, "probability", 0.4, True),
        (0.49, "logits", 0.5, True),
        (-0.01, "logits", 0.5, False),
        (7.0, "logits", 0.99, True),
    ],
)
def test_probabilities_and_logits(
    tmp_path: Path, value: float, output: str, threshold: float, stands_out: bool
) -> None:
    path = write_salient(tmp_path / "s.pt", _Constant(value))
    model = Salient.load(path, CPU, size_px=32, output=output, threshold=threshold)
    found = model.mask(_image(20, 30))
    assert found.shape == (20, 30)
    assert (found == stands_out).all()


class _TwoChannels(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image[:, :2]


class _WrongSize(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image + torch.zeros(1, 3, 7, 7)


@pytest.mark.parametrize(
    ("network", "rule"),
    [
        (_TwoChannels(), "one channel"),
        (_Constant(3.0), "salient_output"),
        (_Constant(float("nan")), "salient_output"),
        (_WrongSize(), "fails on an image of 32 px"),
    ],
)
def test_a_network_of_another_kind_is_one_line(tmp_path: Path, network: nn.Module, rule: str) -> None:
    path = write_salient(tmp_path / "s.pt", network)
    with pytest.raises(InputError, match=rule) as caught:
        Salient.load(path, CPU, size_px=32).mask(_image(20, 30))
    _one_line(caught.value, path)


def _one_line(error: UserError, path: Path) -> None:
    assert str(path) in str(error)
    assert len(str(error).splitlines()) == 1


def _lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (shutil.rmtree, "no such file"),
        (lambda folder: (folder / "config.json").unlink(), "that can be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "that can be loaded"),
        (_cut_short, "that can be loaded"),
        (_lacking, "lacks 1 weights"),
    ],
)
@pytest.mark.parametrize("kind", ["clipseg", "sam"])
def test_a_damaged_folder_is_one_line(
    kind: str, damage: Any, rule: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(kind), folder)
    damage(folder)
    with pytest.raises(InputError, match=f"(?i){rule}") as caught:
        (ClipSeg if kind == "clipseg" else Sam).load(folder, CPU)
    _one_line(caught.value, folder)


def test_a_folder_of_another_model_is_one_line(clipseg: Path, sam: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    for path in (sam, file):
        with pytest.raises(InputError) as caught:
            ClipSeg.load(path, CPU)
        _one_line(caught.value, path)
    with pytest.raises(InputError) as caught:
        Sam.load(clipseg, CPU)
    _one_line(caught.value, clipseg)


def test_a_file_that_is_no_torchscript_is_one_line(tmp_path: Path) -> None:
    missing, junk = tmp_path / "missing.pt", tmp_path / "junk.pt"
    junk.write_bytes(b"junk")
    for path, rule in ((missing, "(?i)no such file"), (tmp_path, "(?i)directory"), (junk, "not a TorchScript file")):
        with pytest.raises(InputError, match=rule) as caught:
            Salient.load(path, CPU)
        _one_line(caught.value, path)


def test_without_transformers_the_extra_is_named(sam: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for model in (ClipSeg, Sam):
        with pytest.raises(ConfigError, match=r"adflows\[segmentation\]") as caught:
            model.load(sam, CPU)
        assert len(str(caught.value).splitlines()) == 1


def test_loading_is_silent_and_leaves_things_as_they_were(
    clipseg: Path, sam: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state, level = torch.get_rng_state(), logging.get_verbosity()
    ClipSeg.load(clipseg, CPU)
    Sam.load(sam, CPU)
    assert (torch.get_rng_state() == state).all()
    assert logging.get_verbosity() == level
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
