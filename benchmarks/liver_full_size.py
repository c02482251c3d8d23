"""An estimate of the time that training at full size takes on a GPU, from ratios measured on this machine.

    python benchmarks/liver_full_size.py [--config thesis] [--slices 2500] [--peak-tflops 312] [--steps 2]

Counted by torch: the floating-point operations of one training step of each phase. Measured here: the time of that
step, of only the synthesis, and of a large matrix product, which bounds the speed of the CPU. The step reaches a
share of that bound. Assumed: on the GPU it reaches the same share of the given peak, or a half or a quarter of it. If
this machine has a GPU, the step is timed on it and nothing is assumed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medad.anomalies.synthesis import synthesise
from medad.base.devices import flush_denormals, keep_freed_memory
from medad.config.liver import LiverSettings, load
from medad.networks import nets
from medad.networks.losses import focal_loss, l1_loss

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "liver"
MATRIX_SIDE = 2048
PEAK_SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Phase:
    """One training phase: one of its steps, and how many it has."""

    name: str
    step: Callable[[], object]
    epochs: int
    batch: int

    def steps(self, slices: int) -> int:
        return self.epochs * ceil(slices / self.batch)


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median seconds of a call, after one warm-up call."""
    work()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def build_phases(settings: LiverSettings, device: torch.device) -> tuple[list[Phase], Callable[[], object]]:
    """Return both phases on random slices, and the synthesis on its own."""
    side, batch = settings.preprocess.slice_px, settings.train.restoration.batch_size
    generator = torch.Generator(device).manual_seed(0)
    clean = torch.rand(batch, 1, side, side, generator=generator, device=device) * 255
    organ = torch.ones_like(clean, dtype=torch.bool)
    built = {}
    for role, shape in (("restoration", settings.restoration), ("segmentation", settings.segmentation)):
        net = nets.build(role, shape, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        built[role] = net.to(device).to(memory_format=torch.channels_last)
    restorer, segmenter = built["restoration"], built["segmentation"]

    def optimised(net: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        adam = torch.optim.Adam(net.parameters(), lr=1e-4)

        def step() -> None:
            adam.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            adam.step()

        return step

    def restoration() -> torch.Tensor:
        made = synthesise(clean, organ, settings.synthesis, generator)
        return l1_loss(nets.restore(restorer, made.image / 255).float(), clean / 255)

    def segmentation() -> torch.Tensor:
        made = synthesise(clean, organ, settings.synthesis, generator)
        with torch.no_grad():
            restored = nets.restore(restorer, made.image / 255).float()
        return focal_loss(nets.segment_logits(segmenter, restored, made.image / 255), made.mask, settings.train.focal)

    one, two = settings.train.restoration, settings.train.segmentation
    both = [
        Phase("restoration", optimised(restorer, restoration), one.epochs, one.batch_size),
        Phase("segmentation", optimised(segmenter, segmentation), two.epochs, two.batch_size),
    ]
    return both, lambda: synthesise(clean, organ, settings.synthesis, generator)


def count_flops(work: Callable[[], object]) -> int:
    """Return the floating-point operations of a call: convolutions and matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="thesis")
    parser.add_argument("--slices", type=int, default=2500)
    parser.add_argument("--peak-tflops", type=float, default=312.0, help="Dense bfloat16 peak; 312 is an A100's.")
    parser.add_argument("--steps", type=int, default=2, help="Timed steps of each phase.")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = load(CONFIGS / f"{arguments.config}.yaml")
    both, synthesis = build_phases(settings, device)
    matrix = torch.rand(MATRIX_SIDE, MATRIX_SIDE, device=device)
    bound = 2 * MATRIX_SIDE**3 / median_seconds(lambda: matrix @ matrix, 5, device)
    painted = median_seconds(synthesis, arguments.steps, device)
    print(f"{arguments.config}: {arguments.slices} slices; {device.type}, {torch.get_num_threads()} threads")
    print(f"matrix product: {bound / 1e9:.0f} GFLOP/s (float32); synthesis: {painted * 1e3:.0f} ms a batch")
    print("| phase | steps | TFLOP a step | seconds a step here | share of the bound |")
    print("|---|---|---|---|---|")
    total, here, least = 0.0, 0.0, 1.0
    for phase in both:
        with flush_denormals():
            work, taken = count_flops(phase.step), median_seconds(phase.step, arguments.steps, device)
        share, steps = work / taken / bound, phase.steps(arguments.slices)
        total, here, least = total + steps * work, here + steps * taken, min(least, share)
        print(f"| {phase.name} | {steps} | {work / 1e12:.3f} | {taken:.2f} | {share:.2f} |")
    print(f"whole training: {total / 1e15:.1f} PFLOP; at this pace {here / 3600:.1f} h")
    if device.type == "cuda":
        return
    for part in PEAK_SHARES:
        minutes = total / (arguments.peak_tflops * 1e12 * least * part) / 60
        print(
            f"calculated, not measured: {minutes:.1f} min on a GPU of {arguments.peak_tflops:g} TFLOP/s "
            f"that reaches {least * part:.2f} of its peak"
        )


if __name__ == "__main__":
    main()
