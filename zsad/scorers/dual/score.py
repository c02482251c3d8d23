"""The dual-image scorer for one category with one seed: it reads features and writes scores.

Features are read from disk in batches of images with the same number of crops. Only the scores are in memory
for the whole set. They take about a thousandth of the size of the features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy import ndarray
from safetensors.numpy import save_file
from torch import Tensor

from medad.base.devices import pick_device
from medad.base.errors import InputError
from medad.base.storage import atomic_path
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import FeatureStore, ImageProblem, batches_by_crop_count, read_text
from zsad.config.run import AdaptSettings, EncoderSettings, ScoreSettings
from zsad.data.images import crop_image, map_in_threads, read_image
from zsad.scorers.dual.adapt import adapt, corrupt, crop_generator
from zsad.scorers.dual.scorer import PARTS, Evidence, Part, fuse_image, text_scores, visual_scores
from zsad.scorers.dual.scores_file import INDEX_FILE, SCORES_FILE, ScoredImage, ScoresIndex
from zsad.scorers.interface import NO_OTHER_NORMAL
from zsad.scorers.references import draw_references
from zsad.scorers.textures import Textures, open_textures


def score_category(
    features: Path,
    text: Path | None,
    paths: Sequence[Path] | None,
    encoder: EncoderSettings,
    score: ScoreSettings,
    adapt: AdaptSettings,
    seed: int,
    device: str,
    out: Path,
    on_progress: Callable[[int, int], None] | None = None,
    largest_batch: int | None = None,
    shots: Path | None = None,
) -> None:
    """Score a category's images for all variants of `score`. Write `scores.safetensors` and `scores.json` into `out`.

    The scores of an image depend on its content, the content of its reference images, and the seed. Names, order and
    batch size have no effect, except for rounding. Other images affect only the choice of the reference images.

    Parameters
    ----------
    features, text
        Folders of `encode_images` and `encode_category_text`. `text` may be None if only `visual` is scored.
    paths
        Image files in the order of the features' index, without images that have no features. Only variants with
        adaptation need them: they encode corrupted copies.
    encoder
        Settings of the model that made the features.
    score, adapt
        Settings of the scorer and of the adaptation. `score.batch_size` limits the crops in memory.
    seed
        Seed of the reference images and of the pseudo anomalies.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    out
        Output folder, created if it does not exist.
    on_progress
        Function called after each batch with the number of finished images and the number of all images.
    largest_batch
        Largest number of crops per batch, if memory is too small for the settings' batch sizes.
    shots
        Folder of `encode_images` for normal images. They are the references of every image, except of themselves.
        None: references are other images of the category.

    Raises
    ------
    ConfigError
        The model cannot be loaded, or no mask of a pseudo anomaly is large enough.
    InputError
        Features, text, an image or a texture cannot be used, or the category has too few images to compare.
    DiskFullError
        The disk is full.
    """
    place = pick_device(device)
    batch_limit = largest_batch or max(encoder.batch_size, score.batch_size)
    store = FeatureStore(features)
    parts = tuple(dict.fromkeys(part for variant in score.variants for part in PARTS[variant]))
    if "a_v" in parts and shots is not None:
        references: _References = _NormalImages.read(FeatureStore(shots), place)
    else:
        references = _OtherImages(store, seed, score.references.count if "a_v" in parts else 0, place)
    problems = references.missing(store)
    if len(problems) == len(store):
        raise InputError(paths[0] if paths else features, next(iter(problems.values())))
    text_features = None if text is None or parts == ("a_v",) else _read_text(text, store, place)
    adapter = None
    if "a_t" in parts or "a_t_text" in parts:
        if paths is None or len(paths) != len(store):
            raise ValueError(f"adaptation needs the {len(store)} images' files, in the order of the features")
        model = Encoder.load(encoder, place)
        if json.loads(json.dumps(dict(model.identity))) != store.index.identity:
            raise InputError(features, f"the features were made with another model ({store.index.model})")
        adapter = _Adapter(model, min(encoder.batch_size, batch_limit), adapt, open_textures(adapt.textures), seed)
    scorer = _Scorer(store, references, text_features, score, frozenset(parts), adapter, place)

    rows, n = sum(image.rows for image in store.images), store.grid**2
    table = {part: np.zeros((rows,) if part == "class" else (rows, n), np.float32) for part in parts}
    done = 0
    batches = [
        [number for number in batch if number not in problems]
        for batch in batches_by_crop_count(store, min(score.batch_size, batch_limit))
    ]
    for numbers, pixels in _read_crops_ahead(store, paths if adapter else None, batches, problems):
        for part, values in scorer.score(numbers, pixels).items() if numbers else ():
            for number, image_values in zip(numbers, values.cpu().numpy(), strict=True):
                image_rows = store.rows_of(number)
                table[part][image_rows.start : image_rows.stop] = image_values.reshape(
                    len(image_rows), *table[part].shape[1:]
                )
        done += len(numbers)
        if on_progress is not None:
            on_progress(done, len(store))
    if len(problems) == len(store):
        raise InputError(paths[0] if paths else features, f"no image could be scored: {next(iter(problems.values()))}")
    compared = [tuple(references.of(number, digest)) for number, digest in enumerate(store.digests)]
    _write_scores(out, store, compared, table, score, seed, problems)


@runtime_checkable
class _References(Protocol):
    """Images with which an image is compared."""

    def missing(self, store: FeatureStore) -> dict[int, str]:
        """Return the images that cannot be compared with any other, with the reason."""

    def of(self, number: int, digest: str) -> Sequence[str]:
        """Return the digests of an image's references."""

    def patches(self, number: int, digest: str) -> list[Float32[Tensor, "M D"]]:
        """Return the patches of an image's references."""


class _OtherImages:
    """Other images of the category, chosen by the seed. They are read when they are needed."""

    def __init__(self, store: FeatureStore, seed: int, count: int, device: torch.device) -> None:
        self._store, self._device, self._needed = store, device, count > 0
        self._drawn = draw_references(store.digests, seed, count)

    def missing(self, store: FeatureStore) -> dict[int, str]:
        if not self._needed or self._drawn.shape[1]:
            return {}
        rule = "this is the only image, but it needs a reference; add images, or use the variants text and text_tta"
        return dict.fromkeys(range(len(store)), rule)

    def of(self, number: int, digest: str) -> Sequence[str]:
        return [self._store.digests[other] for other in self._drawn[number]]

    def patches(self, number: int, digest: str) -> list[Float32[Tensor, "M D"]]:
        return [self._store.patches(int(other)).flatten(0, 1).to(self._device) for other in self._drawn[number]]


@dataclass(frozen=True)
class _NormalImages:
    """Normal images, which are the references of every image except of themselves. Their patches are in memory."""

    by_digest: Mapping[str, Float32[Tensor, "M D"]]

    @classmethod
    def read(cls, store: FeatureStore, device: torch.device) -> _NormalImages:
        return cls({d: store.patches(number).flatten(0, 1).to(device) for number, d in enumerate(store.digests)})

    def missing(self, store: FeatureStore) -> dict[int, str]:
        return {number: NO_OTHER_NORMAL for number, digest in enumerate(store.digests) if not self.of(number, digest)}

    def of(self, number: int, digest: str) -> Sequence[str]:
        return [other for other in self.by_digest if other != digest]

    def patches(self, number: int, digest: str) -> list[Float32[Tensor, "M D"]]:
        return [patches for other, patches in self.by_digest.items() if other != digest]


def _read_text(text: Path, store: FeatureStore, device: torch.device) -> Float32[Tensor, "2 D"]:
    features = read_text(text)
    if features.shape != (2, store.dim):
        raise InputError(
            text, f"text features of shape {tuple(features.shape)} do not fit patches of {store.dim} numbers"
        )
    return features.to(device)


@dataclass(frozen=True)
class _Adapter:
    """Inputs of the adaptation in addition to the features."""

    encoder: Encoder
    batch_size: int
    settings: AdaptSettings
    textures: Textures
    seed: int

    def corrupted(
        self, digests: Sequence[str], pixels: Float32[Tensor, "B C 3 S S"]
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M"]]:
        """Return the tokens of corrupted copies, and M_a, over all patches of each image's crops."""
        images, crops = pixels.shape[:2]
        generators = [crop_generator(self.seed, digest, crop) for digest in digests for crop in range(crops)]
        made = corrupt(
            pixels.flatten(0, 1).to(self.encoder.device), generators, self.encoder.grid, self.settings, self.textures
        )
        tokens = torch.cat([self.encoder.encode_patches(part) for part in torch.split(made.images, self.batch_size)])
        return tokens.reshape(images, -1, tokens.shape[-1]), made.mask.reshape(images, -1)


@dataclass(frozen=True)
class _Scorer:
    """Scorer of batches, with everything that scores depend on in addition to the images."""

    store: FeatureStore
    references: _References
    text: Float32[Tensor, "2 D"] | None
    settings: ScoreSettings
    parts: frozenset[Part]
    adapter: _Adapter | None
    device: torch.device

    @torch.no_grad()
    def score(
        self, numbers: Sequence[int], pixels: Float32[Tensor, "B C 3 S S"] | None
    ) -> dict[Part, Float32[Tensor, "B _"]]:
        """Return the requested parts for images with the same number of crops.

        The part `class` has one value per crop. The others have one value per patch of all crops.
        """
        tau = self.settings.tau
        tokens = torch.stack([self._patches(number) for number in numbers])
        scored: dict[Part, Tensor] = {}
        if self.text is not None:
            scored["a_l"] = text_scores(tokens, self.text, tau)
            if "class" in self.parts:
                classes = torch.stack([self.store.class_tokens(number) for number in numbers])
                scored["class"] = text_scores(classes.to(self.device), self.text, tau)
        if "a_v" in self.parts:
            scored["a_v"] = torch.stack(
                [self._visual(number, query) for number, query in zip(numbers, tokens, strict=True)]
            )
        if self.adapter is not None and pixels is not None and self.text is not None:
            corrupted, mask = self.adapter.corrupted([self.store.images[number].sha256 for number in numbers], pixels)
            # eq. 6 without lambdas: the weights of the fusion do not affect the adaptation
            targets: dict[Part, Tensor] = {"a_t_text": scored["a_l"]}
            if "a_v" in scored:
                targets["a_t"] = scored["a_v"] + scored["a_l"]
            for part in targets.keys() & self.parts:
                scored[part] = adapt(tokens, corrupted, mask, targets[part], self.text, self.adapter.settings, tau)
        return {part: values for part, values in scored.items() if part in self.parts}

    def _patches(self, number: int) -> Float32[Tensor, "M D"]:
        """Return all patches of all crops."""
        return self.store.patches(number).flatten(0, 1).to(self.device)

    def _visual(self, number: int, query: Float32[Tensor, "M D"]) -> Float32[Tensor, " M"]:
        memory = self.references.patches(number, self.store.digests[number])
        return visual_scores(query, memory, self.settings.references.aggregate)


def _read_crops_ahead(
    store: FeatureStore, paths: Sequence[Path] | None, batches: Sequence[Sequence[int]], problems: dict[int, str]
) -> Iterator[tuple[Sequence[int], Float32[Tensor, "B C 3 S S"] | None]]:
    """Yield the numbers and crops of each batch. The next batch is read during scoring.

    Images that can no longer be read are left out and added to `problems`. Without `paths` no crops are read.
    """
    if paths is None:
        yield from ((numbers, None) for numbers in batches)
        return

    def read_one(number: int) -> Float32[Tensor, "C 3 S S"] | None:
        try:
            return _read_crops(store, number, paths[number])
        except InputError as error:
            problems[number] = error.rule
            return None

    def read(numbers: Sequence[int]) -> tuple[Sequence[int], Float32[Tensor, "B C 3 S S"] | None]:
        crops = dict(zip(numbers, map_in_threads(read_one, numbers), strict=True))
        found = {number: one for number, one in crops.items() if one is not None}
        return list(found), torch.stack(list(found.values())) if found else None

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="images") as reader:
        coming = None
        for numbers in batches:
            ready, coming = coming, reader.submit(read, numbers)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def _read_crops(store: FeatureStore, number: int, path: Path) -> Float32[Tensor, "C 3 S S"]:
    image = read_image(path)
    if image.shape[:2] != (store.images[number].height, store.images[number].width):
        raise InputError(path, "is not the image that the features were computed from")
    return crop_image(image, store.crops(number))


def _write_scores(
    out: Path,
    store: FeatureStore,
    compared: Sequence[tuple[str, ...]],
    table: dict[Part, ndarray],
    score: ScoreSettings,
    seed: int,
    problems: Mapping[int, str],
) -> None:
    images = []
    for number, image in enumerate(store.images):
        if number in problems:
            continue
        rows = slice(image.first_row, image.first_row + image.rows)
        image_parts = {part: values[rows] for part, values in table.items()}
        evidence = Evidence(image_parts.pop("class", None), **image_parts)
        images.append(
            ScoredImage(
                sha256=image.sha256,
                first_row=image.first_row,
                rows=image.rows,
                references=compared[number],
                image_score={variant: fuse_image(evidence, variant, score) for variant in score.variants},
            )
        )
    settings = ScoreSettings(**score.model_dump(exclude={"batch_size"}))
    left_out = tuple(ImageProblem(sha256=store.digests[number], rule=rule) for number, rule in sorted(problems.items()))
    index = ScoresIndex(seed=seed, tau=score.tau, settings=settings, images=tuple(images), problems=left_out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / SCORES_FILE) as path:
        save_file({str(part): values for part, values in table.items()}, path)
    with atomic_path(out / INDEX_FILE) as path:
        path.write_text(index.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
