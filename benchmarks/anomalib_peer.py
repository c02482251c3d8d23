"""The anomalib side of `benchmarks/zsad.py`, which runs it in an environment with requirements-anomalib.txt.

It imports nothing of this project. It reads one JSON object per line from standard input and writes one answer for
each. Arrays and weights are files. It measures its times itself, so that the communication costs nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file


def load_winclip(model: str, weights: str, class_name: str, device: str) -> Any:
    """Load zero-shot WinCLIP with weights from a file. Its constructor would download pretrained weights."""
    open_clip: Any = importlib.import_module("open_clip")
    create = open_clip.create_model_and_transforms

    def create_from_file(*_: object, **__: object) -> tuple[Any, ...]:
        made = create(model, pretrained=None)
        made[0].load_state_dict(load_file(weights))
        return tuple(made)

    open_clip.create_model_and_transforms = create_from_file
    try:
        winclip: Any = importlib.import_module("anomalib.models.image.winclip.torch_model")
        # this computes the text embeddings, outside every measured time
        return winclip.WinClipModel(class_name=class_name).eval().to(device)
    finally:
        open_clip.create_model_and_transforms = create


def time_call(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Return the seconds that `work` takes, and its result."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class Peer:
    """The loaded model and data, and the orders that this program carries out."""

    model: Any = None
    images: torch.Tensor
    device: str
    maps: torch.Tensor
    masks: torch.Tensor

    def versions(self) -> dict[str, str]:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return {name: version(name) for name in ("anomalib", "open_clip_torch", "torch")}

    @torch.no_grad()
    def load(self, model: str, weights: str, images: str, device: str) -> dict[str, Any]:
        """Load a model and images. Return the first image's embedding and the text features.

        `images` is a .npy file, f32 [n 3 S S], normalised. The embedding serves to compare weights. The text features,
        normal and anomalous, are not normalised.
        """
        self.device = device
        self.model = load_winclip(model, weights, "object", device)
        self.images = torch.from_numpy(np.load(images)).to(device)
        embedding = self.model.clip.encode_image(self.images[:1])[0][0].tolist()
        return {"embedding": embedding, "text": self.model.text_embeddings.tolist()}

    def winclip(self, batch: int, count: int) -> dict[str, Any]:
        """Compute scores and maps of `count` images, `batch` at a time. Images repeat if there are too few."""
        images = self.images[torch.arange(count) % len(self.images)]

        def work() -> list[Any]:
            return [self.model(part) for part in torch.split(images, batch)]

        seconds, made = time_call(work, self.device)
        shape = [sum(len(part.anomaly_map) for part in made), *made[0].anomaly_map.shape[1:]]
        return {"seconds": seconds, "maps": shape}

    def winclip_scores(self, count: int, memory: list[int], out: str) -> dict[str, Any]:
        """Write scores and maps of the first `count` images to the .npz file `out`. `memory` numbers normal images."""
        if memory:
            self.model.setup(reference_images=self.images[memory])
        made = self.model(self.images[:count])
        self.model.k_shot = 0
        np.savez(out, scores=made.pred_score.cpu().numpy(), maps=made.anomaly_map.cpu().numpy())
        return {}

    def load_maps(self, maps: str, masks: str) -> dict[str, Any]:
        """Load maps, f32 [n H W], and masks, bool [n H W], from .npy files."""
        self.maps = torch.from_numpy(np.load(maps))
        self.masks = torch.from_numpy(np.load(masks)).long()
        return {}

    def aupro(self) -> dict[str, Any]:
        """Compute only AUPRO, with anomalib's limit of the false-positive rate, 0.3."""
        metrics: Any = importlib.import_module("anomalib.metrics")
        metric = metrics.AUPRO(fields=["anomaly_map", "gt_mask"])
        batch = SimpleNamespace(anomaly_map=self.maps, gt_mask=self.masks)

        def work() -> float:
            metric.update(batch)
            return float(metric.compute())

        seconds, value = time_call(work)
        return {"seconds": seconds, "value": value}


def main() -> None:
    # output of libraries must not mix with the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer = Peer()
    for line in sys.stdin:
        order = json.loads(line)
        reply = getattr(peer, order.pop("do"))(**order)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
