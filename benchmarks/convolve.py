"""The work of the device steps of `device_steps.py`. Each step's process imports this module."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path


def convolve(out: Path, *, rounds: int, number: int) -> None:
    """Convolve images with all cores. Write the time of begin and end, and the peak of the memory in MB."""
    import torch

    began = time.monotonic()
    generator = torch.Generator().manual_seed(number)
    images, weights = (
        torch.randn(8, 16, 160, 160, generator=generator),
        torch.randn(16, 16, 3, 3, generator=generator),
    )
    with torch.inference_mode():
        for _ in range(rounds):
            images = torch.nn.functional.conv2d(images, weights, padding=1).tanh()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (out / "times").write_text(json.dumps([began, time.monotonic(), memory]), encoding="utf-8")
