"""Train the embedded model, a small open_clip ViT with a text tower, on generated images only.

    python -m zsad.embedded.pretrain --out FOLDER [--seed 0] [--start WEIGHTS]
    python -m zsad.embedded.pretrain --held-out FOLDER    # images of kinds that it is not trained on

Both towers are trained with the product's own prompts. The class token learns from CLIP's contrastive loss over
captions and from the state of the image (normal or anomalous). The V-V patch tokens learn which patches a defect
touches.

The training has two legs. In the first, on fewer kinds, the towers learn to see defects. In the second, each batch
contains each scene twice, without and with a defect, so that the two differ only in the defect. Untrained towers do not
learn from such twins, so the first leg is needed. Each batch is a function of seed, leg and step. A stopped training
therefore continues from its checkpoint with the same result.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.random import Generator
from open_clip import CLIP, get_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from medad.base.storage import atomic_path
from zsad.clip.attention_paths import AttentionPath, two_path
from zsad.clip.prompts import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES
from zsad.embedded.pool import SIZE_PX, Leg, Pool, make_pool, write_held_out
from zsad.embedded.scenes.objects import OBJECTS

PATCH_PX = 16
LAYERS = 6
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIZE_PX,
        "layers": LAYERS,
        "width": 192,
        "head_width": 32,
        "patch_size": PATCH_PX,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
"""Architecture. Half of the 10 MB is CLIP's vocabulary, so that text is processed as in all other models."""
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
ATTENTION_PATH = AttentionPath(vv_blocks=tuple(range(LAYERS)))
DOMAINS = ("industrial", "textural", "surface", "manufacturing")
GENERIC = ("object", "part", "product", "item", "thing", "sample", "piece", "material")
TAU = 0.07
VALUE_GAIN = 2.5
"""Factor on the initial value weights; the output projection is divided by it. As in a trained CLIP, a token's V-V
attention then prefers the token itself instead of all tokens equally."""
PEAK_PATCHES = 3
"""Number of patches with the highest scores over which an image's peak is averaged."""
OBJECT_SHARE = 2 / 3
"""Fraction of objects in a batch during sharpening. The others are textures."""
SHARPEN_FACTOR = 0.6
"""Factor on the learning rate when sharpening begins."""
CHECKPOINT, CHECKPOINT_STEPS, CURVE_STEPS = "checkpoint.pt", 100, 20
FULL_TOUCH = 0.15
"""Fraction of anomalous pixels from which a patch counts as fully anomalous. Below it, the target is proportional."""


@dataclass(frozen=True)
class Plan:
    """Plan of the training. The defaults take about an hour on two idle cores."""

    seed: int = 0
    legs: tuple[Leg, ...] = (
        Leg(twins=False, scenes=9000, steps=3400, sharpen_from=2400, learning_rate=1e-3, warmup_steps=200),
        Leg(twins=True, scenes=14000, steps=2700, sharpen_from=0, learning_rate=5e-4, warmup_steps=100),
    )
    batch_size: int = 32
    weight_decay: float = 0.05


def _augmented(rng: Generator, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Augment an image and its mask. Pixels are returned in 0..1.

    The image is turned and its channels are shuffled. It may also be flipped, zoomed, made grey or inverted.
    """
    turns, flipped = int(rng.integers(4)), rng.random() < 0.5
    both = torch.cat((image.float() / 255.0, mask[None].float())).rot90(turns, (1, 2))
    both = both.flip(2) if flipped else both
    if rng.random() < 0.5:
        side = int(SIZE_PX * rng.uniform(0.6, 1.0))
        y, x = (int(rng.integers(SIZE_PX - side + 1)) for _ in range(2))
        window = both[None, :, y : y + side, x : x + side]
        both = functional.interpolate(window, size=(SIZE_PX, SIZE_PX), mode="bilinear", antialias=True)[0]
    pixels = both[:3][torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.4:  # grey images are more frequent in factories than among the generated ones
        pixels = torch.lerp(pixels, pixels.mean(0, keepdim=True), float(rng.uniform(0.6, 1.0)))
    if rng.random() < 0.3:
        pixels = 1.0 - pixels
    contrast, shift = rng.uniform(0.7, 1.2), rng.uniform(-0.1, 0.1)
    return ((pixels - 0.5) * contrast + 0.5 + shift).clamp(0, 1), both[3]


def _noun(rng: Generator, kind: str, words: list[str]) -> str:
    """Return a noun for the object in a prompt. Often it is not its kind, so that unknown names can be ignored."""
    chance = rng.random()
    if chance < 0.4:
        return kind
    return str(rng.choice(GENERIC)) if chance < 0.7 else str(rng.choice(words))


def _prompt(rng: Generator, states: tuple[str, ...], noun: str) -> str:
    template = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
    state = states[int(rng.integers(len(states)))].replace("[c]", noun)
    return template.replace("[d]", str(rng.choice(DOMAINS))).replace("[s]", state)


@dataclass(frozen=True)
class Batch:
    """Training batch: images 0..1, the anomalous fraction of each patch (`touched`), kinds and prompts."""

    images: Float[Tensor, "B 3 S S"]
    touched: Float[Tensor, "B N"]
    kinds: tuple[str, ...]
    prompts: tuple[str, ...]
    """Prompts: B normal ones, B anomalous ones, then B captions."""


def _chances(pool: Pool, *, sharpen: bool) -> np.ndarray | None:
    """Return the probability of each image to be in a batch. None: equal.

    Sharpening uses more objects, because they are harder and fewer than textures.
    """
    objects = np.array([kind in OBJECTS for kind in pool.kinds])
    if not sharpen or objects.all() or not objects.any():
        return None
    return np.asarray(np.where(objects, OBJECT_SHARE / objects.sum(), (1 - OBJECT_SHARE) / (~objects).sum()))


def make_batch(pool: Pool, plan: Plan, leg: Leg, step: int, words: list[str]) -> Batch:
    """Return batch `step` of a leg. Twins are adjacent, but they are augmented independently."""
    rng = np.random.default_rng([plan.seed, step, 7])
    if leg.twins:
        scenes = rng.choice(len(pool.kinds) // 2, plan.batch_size // 2, replace=False)
        rows = np.stack([2 * scenes, 2 * scenes + 1], 1).ravel()
    else:
        chances = _chances(pool, sharpen=step >= leg.sharpen_from)
        rows = rng.choice(len(pool.kinds), plan.batch_size, replace=False, p=chances)
    augmented = [_augmented(rng, pool.pixels[row], pool.masks[row]) for row in rows]
    masks = torch.stack([mask for _, mask in augmented])[:, None]
    share = functional.avg_pool2d(masks, PATCH_PX).flatten(1)
    touched = (share / FULL_TOUCH).clamp(max=1.0)
    names = [pool.kinds[i] for i in rows]
    nouns = [_noun(rng, name, words) for name in names]
    states = [ANOMALOUS_STATES if row.max() > 0.3 else NORMAL_STATES for row in touched]
    prompts = (
        *(_prompt(rng, NORMAL_STATES, noun) for noun in nouns),
        *(_prompt(rng, ANOMALOUS_STATES, noun) for noun in nouns),
        *(_prompt(rng, state, name) for state, name in zip(states, names, strict=True)),
    )
    return Batch(torch.stack([image for image, _ in augmented]), touched, tuple(names), prompts)


def normalised(images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Apply the model's mean and standard deviation to images with values 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def loss_of(model: CLIP, tokens: Tensor, batch: Batch, *, sharpen: bool) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch and its parts.

    The parts are: which patches a defect touches, the state of the class token, and CLIP's loss over captions.
    `sharpen` adds the state predicted from an image's highest patches. Without it, a false alarm in one of many patches
    costs little. But the maximum over the patches decides an image's score (eq. 13).
    """
    count = len(batch.images)
    class_token, patches = two_path(model.visual, normalised(batch.images), ATTENTION_PATH)
    class_token, patches = functional.normalize(class_token, dim=-1), functional.normalize(patches, dim=-1)
    text = functional.normalize(model.encode_text(tokens), dim=-1)
    normal, anomalous, captions = text[:count], text[count : 2 * count], text[2 * count :]
    direction = (anomalous - normal) / TAU
    state = batch.touched.amax(1)
    by_patch = torch.einsum("bnd,bd->bn", patches, direction)
    of_patches = functional.binary_cross_entropy_with_logits(by_patch, batch.touched, pos_weight=torch.tensor(4.0))
    of_state = functional.binary_cross_entropy_with_logits((class_token * direction).sum(-1), state)
    same = torch.tensor([[a == b for b in batch.kinds] for a in batch.kinds])
    same &= (state[:, None] > 0.3) == (state[None, :] > 0.3)
    target = same / same.sum(1, keepdim=True)
    logits = model.logit_scale.exp().clamp(max=100.0) * class_token @ captions.T
    of_captions = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    parts = {"patches": of_patches.item(), "state": of_state.item(), "captions": of_captions.item()}
    if not sharpen:
        return of_patches + 0.5 * of_state + 0.15 * of_captions, parts
    of_peak = functional.binary_cross_entropy_with_logits(by_patch.topk(PEAK_PATCHES, dim=1).values.mean(1), state)
    total = of_patches + of_state + 0.5 * of_peak + 0.15 * of_captions
    return total, parts | {"peak": of_peak.item()}


def build(seed: int) -> CLIP:
    """Return the untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**MODEL)
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            width = block.attn.embed_dim
            block.attn.in_proj_weight[2 * width :] *= VALUE_GAIN
            block.attn.out_proj.weight /= VALUE_GAIN
    return model


def train(plan: Plan, out: Path, *, workers: int = 2, start: Path | None = None) -> None:
    """Train and write open_clip_config.json, open_clip_model.safetensors and training.json to `out`.

    If `start` contains the weights of the first leg, that leg is skipped. A leg starts from the weights of the previous
    one, rounded to half precision as in a written file.
    """
    model = build(plan.seed).train()
    checkpoint: dict[str, Any] = {"leg": 0}
    if (out / CHECKPOINT).is_file():
        checkpoint = torch.load(out / CHECKPOINT, weights_only=True)
        model.load_state_dict(checkpoint["model"])
    elif start is not None:
        model.load_state_dict(load_file(start))
        checkpoint = {"leg": 1}
    curve = list(checkpoint.get("curve", ()))
    for number in range(checkpoint["leg"], len(plan.legs)):
        leg = plan.legs[number]
        _train_leg(model, plan, number, make_pool(plan.seed, leg, workers), out, curve, checkpoint)
        model.load_state_dict({name: value.half() for name, value in model.state_dict().items()})
        checkpoint = {}
    save(model, out)
    facts = {"plan": asdict(plan), "curve": curve}
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / CHECKPOINT).unlink(missing_ok=True)


def _train_leg(
    model: CLIP,
    plan: Plan,
    number: int,
    pool: Pool,
    out: Path,
    curve: list[dict[str, Any]],
    checkpoint: Mapping[str, Any],
) -> None:
    """Train one leg from the state in `checkpoint`. Add a row to `curve` every `CURVE_STEPS` steps."""
    leg = plan.legs[number]
    tokenise = get_tokenizer("ViT-B-32", context_length=MODEL["text_cfg"]["context_length"])
    words = sorted(word[:-4] for word in tokenise.encoder if word.endswith("</w>") and word[:-4].isalpha())
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=leg.learning_rate, betas=(0.9, 0.98))
    schedule = learning_rates(optimiser, leg)
    first = 0
    if "optimiser" in checkpoint:
        optimiser.load_state_dict(checkpoint["optimiser"])
        schedule.load_state_dict(checkpoint["schedule"])
        first = checkpoint["step"]
    started = time.monotonic()
    for step in range(first, leg.steps):
        batch = make_batch(pool, plan, leg, step, words)
        loss, parts = loss_of(model, tokenise(list(batch.prompts)), batch, sharpen=step >= leg.sharpen_from)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % CURVE_STEPS == 0:
            rounded = {name: round(value, 5) for name, value in parts.items()}
            curve.append({"leg": number + 1, "step": step + 1, **rounded})
            left = (leg.steps - step - 1) * (time.monotonic() - started) / (step + 1 - first) / 60
            print(f"{curve[-1]}  {left:.0f} min left in this leg", file=sys.stderr, flush=True)  # noqa: T201
        if (step + 1) % CHECKPOINT_STEPS == 0:
            with atomic_path(out / CHECKPOINT) as temporary:
                states = {"model": model, "optimiser": optimiser, "schedule": schedule}
                place = {"leg": number, "step": step + 1, "curve": curve}
                torch.save({name: part.state_dict() for name, part in states.items()} | place, temporary)


def learning_rates(optimiser: torch.optim.Optimizer, leg: Leg) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule: warm-up and cosine decay, then a second, lower cosine decay for later sharpening."""

    def second_decay(step: int) -> float:
        return SHARPEN_FACTOR * 0.5 * (1 + math.cos(math.pi * step / (leg.steps - leg.sharpen_from)))

    end = leg.sharpen_from or leg.steps
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 1e-2, 1.0, leg.warmup_steps)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(end - leg.warmup_steps, 1), 1e-6)
    if end == leg.steps:
        return torch.optim.lr_scheduler.SequentialLR(optimiser, [warm, decay], [leg.warmup_steps])
    sharpen = torch.optim.lr_scheduler.LambdaLR(optimiser, second_decay)
    return torch.optim.lr_scheduler.SequentialLR(optimiser, [warm, decay, sharpen], [leg.warmup_steps, end])


def save(model: CLIP, out: Path) -> None:
    """Write the weights in half precision and the configuration, as open_clip's `local-dir:` reads them."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(out / "open_clip_model.safetensors") as temporary:
        save_file(weights, temporary)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "shortest"}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, see the module."""
    parser = argparse.ArgumentParser(prog="python -m zsad.embedded.pretrain", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="train and write the model to this folder")
    what.add_argument("--held-out", type=Path, help="write images of the held-out kinds to this folder instead")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--start", type=Path, help="weights of the first leg, which is then skipped")
    parser.add_argument("--workers", type=int, default=2, help="number of processes that generate images")
    given = parser.parse_args(arguments)
    if given.held_out is not None:
        write_held_out(given.held_out, seed=given.seed)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    train(Plan(seed=given.seed), given.out, workers=given.workers, start=given.start)


if __name__ == "__main__":
    main()
