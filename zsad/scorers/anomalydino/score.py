"""AnomalyDINO (Damm et al., WACV 2025): the distance of each patch to the nearest patch of normal images.

The paper leaves some points open, or its code differs from what this project does everywhere:

| point | here |
|---|---|
| background of the normal images | it stays in the memory, as in the authors' code |
| number of patches in the top 1 % | rounded down, at least one; patches of the background count with distance 0 |
| several crops of one image | their patches are one set; each crop has its own foreground |
| turned copies | `zsad.steps.encode` makes them; they have the digest of their image |
| map | not smoothed; the authors smooth it with a Gaussian of 4 px at the image's size |
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zsad.scorers.anomalydino.foreground import foreground
from zsad.scorers.anomalydino.settings import AnomalyDino
from zsad.scorers.interface import NO_OTHER_NORMAL, CategoryFeatures, Scored, top_score
from zsad.scorers.learned import patches_of
from zsad.scorers.memory import distances_to, has_others, read_memory


def score(category_features: CategoryFeatures, settings: AnomalyDino) -> Iterator[Scored]:
    """Score all images of a category in order. No image affects the scores of another.

    A normal image that is scored itself is not part of its own memory.

    The map is the distance 1 - cos of each patch to the nearest patch of the memory, 0..2, averaged over `blocks`. The
    image score is the mean of the largest `top_share` of an image's distances. Higher is more anomalous.

    Parameters
    ----------
    category_features
        Features of the category and of the normal images, `shots`, with the outputs `settings.outputs`.
    settings
        `blocks`, `top_share`, `subtract_median`, `mask_background` and `mask_threshold`. The memory has all images of
        `shots`.

    Raises
    ------
    InputError
        The features are damaged or lack the output, or the folder of normal images is empty.
    """
    store, device = category_features.store, category_features.device
    memory = {name: read_memory(category_features.shots, name, settings.title, device) for name in settings.outputs}
    for number, digest in enumerate(store.digests):
        if not has_others(memory[settings.outputs[0]], digest):
            yield Scored.without_score(number, NO_OTHER_NORMAL)
            continue
        patches = {name: patches_of(store, number, name).to(device) for name in settings.outputs}
        bf16 = settings.cosines == "bf16"
        found = [distances_to(memory[name], patches[name], digest, bf16=bf16) for name in settings.outputs]
        maps = torch.stack(found).mean(0).cpu().reshape(-1, store.grid, store.grid)
        if settings.mask_background:
            crops = patches[settings.outputs[0]]
            kept = [torch.from_numpy(foreground(crop, settings.mask_threshold)) for crop in crops]
            maps = maps * torch.stack(kept)
        yield Scored(number, top_score(maps, settings.top_share, subtract_median=settings.subtract_median), maps)
