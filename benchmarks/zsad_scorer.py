"""(a), (b), (d) and (e) of `benchmarks/zsad.py`: encoding, scoring, seeds and adaptation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from benchmarks.anomalib_client import Anomalib, skipped_row
from benchmarks.zsad_images import draw_image, image_key
from benchmarks.zsad_timing import Laps, Plan, Row, TimedWork, row_at_least, row_at_most, time_alternately, timer
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import CLASS_TOKENS, TEXT, FeatureStore, output_file, read_text
from zsad.config.encoder_outputs import PATCHES
from zsad.config.run import AdaptSettings, EncoderSettings, ScoreSettings
from zsad.data.images import crop_image, map_in_threads, merge_maps, plan_crops, read_image
from zsad.scorers.dual.adapt import adapt, corrupt, crop_generator
from zsad.scorers.dual.score import score_category
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.dual.scores_file import Scores
from zsad.scorers.textures import open_textures
from zsad.steps.encode import encode_images

SEEDS = range(6)
IMAGE_PX = 1024
"""Side of the image files in px, equal to that of MVTec AD's larger images."""


@dataclass(frozen=True)
class Bench:
    """The model, its images in files and in memory, and their features on disk in the flow's format."""

    plan: Plan
    settings: EncoderSettings
    encoder: Encoder
    paths: tuple[Path, ...]
    images: Float32[Tensor, "n 3 S S"]
    folder: Path

    @classmethod
    def prepare(cls, plan: Plan, folder: Path) -> Bench:
        settings = EncoderSettings(model=plan.model, seed=0, batch_size=plan.batch)
        encoder = Encoder.load(settings, plan.device)
        rng = np.random.default_rng(0)
        paths = tuple(folder / f"{number}.png" for number in range(plan.images))
        for path in paths:
            Image.fromarray(draw_image(rng, IMAGE_PX)).save(path, compress_level=1)
        bench = cls(plan, settings, encoder, paths, read_crops(paths, encoder.size_px).to(plan.device), folder)
        encode_images(paths, bench.digests, settings, str(plan.device), bench.features)
        bench.text.mkdir()
        sides = functional.normalize(torch.randn(2, encoder.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
        save_file({"text": sides}, bench.text / TEXT)
        return bench

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(image_key(number) for number in range(self.plan.images))

    @property
    def features(self) -> Path:
        return self.folder / "features"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    def encode(self) -> None:
        """Encode images and overwrite the features on disk."""
        tokens = [self.encoder.encode(part) for part in torch.split(self.images, self.plan.batch)]
        np.save(self.features / CLASS_TOKENS, torch.cat([part.class_token for part in tokens]).cpu().numpy())
        np.save(self.features / output_file(PATCHES), torch.cat([part.patches for part in tokens]).cpu().numpy())

    def score(self, seed: int) -> Path:
        """Score features with the flow's step: text and one reference, no adaptation. Return the scores' folder."""
        out = self.folder / f"scores-{seed}"
        settings = ScoreSettings(variants=("joint",), batch_size=self.plan.batch)
        device = str(self.plan.device)
        score_category(self.features, self.text, None, self.settings, settings, AdaptSettings(), seed, device, out)
        return out

    def maps(self, scores: Path) -> list[Float32[np.ndarray, "S S"]]:
        store, scored = FeatureStore(self.features), Scores(scores)
        return [merge_maps(scored.patch_map(i, "joint"), store.crops(i)) for i in range(len(store))]


def read_crops(paths: Sequence[Path], size_px: int) -> Float32[Tensor, "n 3 S S"]:
    """Read square images, one crop each."""

    def read(path: Path) -> Float32[Tensor, "3 S S"]:
        image = read_image(path)
        return crop_image(image, plan_crops(image.shape[0], image.shape[1], size_px, 2))[0]

    return torch.stack(map_in_threads(read, paths))


# (a) both attention paths


@torch.no_grad()
def time_attention_paths(bench: Bench) -> Row:
    batches = torch.split(bench.images, bench.plan.batch)
    model: Any = bench.encoder.model
    device, n = bench.plan.device, len(bench.images)

    def plain() -> None:
        for part in batches:
            model.encode_image(bench.encoder.normalise(part), normalize=True)

    def both() -> None:
        for part in batches:
            bench.encoder.encode(part)

    compared = time_alternately(timer(both, device), timer(plain, device), bench.plan.repeats)
    ours, theirs = (statistics.median(seconds) / n * 1e3 for seconds in (compared.first, compared.second))
    detail = f"an image: both paths {ours:.0f} ms, encode_image {theirs:.0f} ms, {bench.plan.batch} at a time"
    return row_at_most("a", f"both paths / open_clip's encode_image, {device.type}", compared, 1.25, detail)


# (b) compared with anomalib's WinCLIP


def load_anomalib(bench: Bench, anomalib: Anomalib) -> dict[str, Any]:
    """Send our weights and images to anomalib. Return its answer with the difference of the first embeddings."""
    weights, images = bench.folder / "weights.safetensors", bench.folder / "images.npy"
    state: dict[str, Tensor] = {key: value.contiguous() for key, value in bench.encoder.model.state_dict().items()}
    save_file(state, weights)
    np.save(images, bench.encoder.normalise(bench.images).cpu().numpy())
    model, device = bench.plan.model, str(bench.plan.device)
    loaded = anomalib.ask("load", model=model, weights=str(weights), images=str(images), device=device)
    theirs = functional.normalize(torch.tensor(loaded["embedding"]), dim=0)
    difference = float((bench.encoder.encode(bench.images[:1]).class_token[0].cpu() - theirs).abs().max())
    assert difference < 1e-4, f"not the same weights: embeddings differ by {difference}"
    return {**loaded, "difference": difference}


def compare_with_winclip(bench: Bench, anomalib: Anomalib | None) -> Row:
    """Compare the time from tensors to scores and maps. Nothing is read, and text features exist on both sides."""
    what = f"anomalib's WinCLIP / dual scorer without adaptation, {bench.plan.device.type}"
    if anomalib is None:
        return skipped_row("b", what, ">= 8")
    loaded = load_anomalib(bench, anomalib)
    device, n = bench.plan.device, len(bench.images)

    # WinCLIP batches its windows, so it runs with its fastest batch size
    anomalib.ask("winclip", batch=1, count=1)
    sizes = sorted({1, min(4, n), bench.plan.batch})
    each = {size: anomalib.ask("winclip", batch=size, count=size)["seconds"] / size for size in sizes}
    best = min(sizes, key=lambda size: each[size])

    def ours() -> None:
        bench.encode()
        bench.maps(bench.score(0))

    def winclip() -> float:
        made = anomalib.ask("winclip", batch=best, count=n)
        assert made["maps"] == [n, bench.encoder.size_px, bench.encoder.size_px]
        return float(made["seconds"])

    own = timer(ours, device)
    own()
    compared = time_alternately(winclip, own, bench.plan.repeats, warm=False)
    other, mine = (n / statistics.median(seconds) for seconds in (compared.first, compared.second))
    detail = (
        f"ours {mine:.2f} images/s ({bench.plan.batch} at a time, with features and scores on disk), WinCLIP "
        f"{other:.3f} ({best} at a time, the best of {sizes}); embeddings agree to {loaded['difference']:.0e}"
    )
    return row_at_least("b", what, compared, 8, detail)


# (d) seeds


def time_seeds(bench: Bench) -> Row:
    device, scoring = bench.plan.device, list[float]()

    def run(count: int) -> TimedWork:
        def work() -> float:
            encoding = timer(bench.encode, device)()
            each = [timer(partial(bench.score, seed), device)() for seed in SEEDS[:count]]
            scoring.extend(each)
            return encoding + sum(each)

        return work

    compared = time_alternately(run(len(SEEDS)), run(1), bench.plan.repeats)
    n = len(bench.images)
    detail = (
        f"an image: encoding and one seed {statistics.median(compared.second) / n * 1e3:.0f} ms, of it one seed's "
        f"pairing and scoring {statistics.median(scoring) / n * 1e3:.1f} ms"
    )
    return row_at_most("d", f"six seeds / one seed, no adaptation, {device.type}", compared, 1.5, detail)


# (e) adaptation


def time_adaptation(bench: Bench) -> Row:
    """Compare the whole additional work of adaptation with only the encoding of the corrupted copy."""
    plan, encoder, settings = bench.plan, bench.encoder, AdaptSettings()
    textures, n, text = open_textures(None), len(bench.images), read_text(bench.text).to(plan.device)
    images = torch.split(bench.images, plan.batch)
    patches = [encoder.encode_patches(part) for part in images]
    numbers = [tuple(part.tolist()) for part in torch.split(torch.arange(n), plan.batch)]
    laps = Laps(plan.device)

    def one_batch(part: Sequence[int], tokens: Tensor) -> None:
        # the flow reads ahead in another thread; here, reading counts in full
        pixels = laps("read", lambda: read_crops([bench.paths[i] for i in part], encoder.size_px).to(plan.device))
        generators = [crop_generator(0, bench.digests[i], 0) for i in part]
        made = laps("corrupt", lambda: corrupt(pixels, generators, encoder.grid, settings, textures))
        bad = laps("encode", lambda: encoder.encode_patches(made.images))
        target = text_scores(tokens, text, tau=1.0)
        laps("adapt", lambda: adapt(tokens, bad, made.mask, target, text, settings, tau=1.0))

    def whole() -> float:
        before = laps.total
        for part, tokens in zip(numbers, patches, strict=True):
            one_batch(part, tokens)
        return laps.total - before

    def encoding() -> None:
        for part in images:
            encoder.encode_patches(part)

    second = timer(encoding, plan.device)
    whole(), second()
    laps.seconds.clear()
    compared = time_alternately(whole, second, plan.repeats, warm=False)
    parts = ", ".join(f"{name} {total / plan.repeats / n * 1e3:.1f}" for name, total in laps.seconds.items())
    only_encoding = statistics.median(compared.second) / n * 1e3
    detail = f"an image: {parts} ms; only the second encoding {only_encoding:.1f} ms, {plan.batch} at a time"
    what = f"adaptation with its second encoding / that encoding, {plan.device.type}"
    return row_at_most("e", what, compared, 1.2, detail)
