"""(i) of `benchmarks/zsad.py`: encoding for all training-free systems, compared with the encoder's forward passes."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.zsad_scorer import Bench
from benchmarks.zsad_timing import Row, row_at_most, time_alternately, timer
from zsad.clip.windows import encode_windows
from zsad.scorers.anovl.settings import AnoVl
from zsad.scorers.clip.settings import Clip, ClipAc
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.musc.settings import MuSc, MuSc2
from zsad.scorers.winclip.settings import WinClip
from zsad.steps.encode import encode_images
from zsad.steps.score import score_system

BLOCKS = (3, 6, 9, 12)
SYSTEMS = (Clip(), ClipAc(), WinClip(), AnoVl(), MuSc(blocks=BLOCKS), MuSc2(), DualImage())
OUTPUTS = tuple(sorted({output for system in SYSTEMS for output in system.outputs}))


@torch.no_grad()
def time_encoding_for_all(bench: Bench) -> Row:
    """Compare encoding from files to features with one forward pass per image and one of its windows."""
    encoder, device = bench.encoder, bench.plan.device
    model, visual = encoder.model, encoder.model.visual
    features = bench.folder / "all-systems"
    batches = torch.split(bench.images, bench.plan.batch)

    def ours() -> None:
        encode_images(bench.paths, bench.digests, bench.settings, str(device), features, outputs=OUTPUTS)

    def bare() -> None:
        for part in batches:
            normalised = encoder.normalise(part)
            model.encode_image(normalised)  # type: ignore[operator]
            encode_windows(visual, normalised, WinClip().windows)

    # a forward pass does not include loading the model; the flow loads it once per task
    compared = time_alternately(timer(ours, device), timer(bare, device), bench.plan.repeats)
    scoring = timer(lambda: _score_all(bench, features), device)()
    mine, bound = (statistics.median(seconds) / bench.plan.images for seconds in (compared.first, compared.second))
    detail = (
        f"an image: files to features with {len(OUTPUTS)} outputs {1e3 * mine:.0f} ms, loading the model included; one "
        f"forward and its windows {1e3 * bound:.0f} ms, which bounds it; scoring by {len(SYSTEMS) - 1} systems, "
        f"not counted, {1e3 * scoring / bench.plan.images:.0f} ms"
    )
    what = f"encoding for all training-free systems / the encoder's forwards, {device.type}"
    return row_at_most("i", what, compared, 2, detail)


def _score_all(bench: Bench, features: Any) -> None:
    for system in SYSTEMS:
        if isinstance(system, DualImage):  # measured in (d)
            continue
        text = bench.text if system.prompts is not None else None
        out = bench.folder / f"scores-{system.system}"
        score_system(
            system, "object", features, text, None, None, bench.paths, bench.settings, 0, str(bench.plan.device), out
        )
