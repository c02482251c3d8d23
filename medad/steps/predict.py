"""Prediction of one prepared case by all members of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from medad.base.errors import ConfigError
from medad.config.liver import InferenceSettings
from medad.networks.combine import combine
from medad.networks.infer import FLIPS, Networks, load_networks, predict
from medad.slices.prepared_file import PreparedCase
from medad.steps.results import Member

if TYPE_CHECKING:
    from lightgbm import Booster


@dataclass(frozen=True)
class LoadedMember:
    """A member of a model, ready for prediction."""

    networks: Networks
    classifier: Booster | None


@dataclass(frozen=True)
class CasePrediction:
    """The prediction of a case on its slices.

    Attributes
    ----------
    probability
        Mean P(tumour) of all members, 0..1.
    restored
        Restoration by the first member's network, in grey values.
    """

    probability: Float32[ndarray, "N S S"]
    restored: UInt8[ndarray, "N S S"]


def load_members(members: Sequence[Member[Path]], settings: InferenceSettings, device: str) -> list[LoadedMember]:
    """Load the networks and classifiers of all members.

    Raises InputError for a missing or damaged file, and ConfigError if a classifier is needed but missing.
    """
    loaded = []
    for member in members:
        networks = load_networks(member.restoration, member.segmentation / member.snapshot, device)
        classifier = None
        if settings.combine.classifier > 0:
            if member.classifier is None:
                raise ConfigError("inference.combine.classifier: the model has no voxel classifier")
            from medad.classifier.model import load_classifier

            classifier = load_classifier(member.classifier)
        loaded.append(LoadedMember(networks, classifier))
    return loaded


def predict_case(
    case: PreparedCase, members: Sequence[LoadedMember], settings: InferenceSettings, batch_size: int
) -> CasePrediction:
    """Return the mean map of all members, smoothed within the liver.

    Each member's map is the weighted mean of its networks' and its classifier's maps (`settings.combine`). With
    `settings.flips` the four flips are divided among the members, so that a model of four members takes no longer.
    """
    classified: list[Float32[ndarray, "N S S"] | None] = [None] * len(members)
    boosters = [member.classifier for member in members if member.classifier is not None]
    if boosters:
        from medad.classifier.model import classify

        classified = list(classify(case, boosters))
    total = np.zeros(case.slices.pixels.shape, np.float32)
    restored = None
    for number, (member, trees) in enumerate(zip(members, classified, strict=True)):
        flips = FLIPS[number :: len(members)] if settings.flips else FLIPS[:1]
        # with more than four members, the flips begin again
        flips = flips or FLIPS[number % len(FLIPS) :][:1]
        prediction = predict(case.slices.pixels, member.networks, batch_size, flips=flips)
        restored = prediction.restored if restored is None else restored
        total += combine(prediction, case.slices, case.spacing_mm, settings, trees)
    assert restored is not None, "a model has at least one member"
    mean = total / np.float32(len(members))
    return CasePrediction(mean, restored)
