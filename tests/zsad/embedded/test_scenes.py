"""Check generated images: reproducible, with disjoint subsets and with masks that equal the defect."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.random import Generator
from scipy.ndimage import binary_dilation, gaussian_filter

from zsad.embedded.pool import numbered_image, numbered_twins
from zsad.embedded.scenes.scenes import (
    LEAST_AREA,
    LEAST_CHANGE,
    Product,
    Subset,
    add_defect,
    coloured,
    defects,
    kinds,
    make_image,
    make_twins,
)

SIZE_PX = 96
SUBSETS: tuple[Subset, ...] = ("first", "train", "held_out")
EVERY_KIND = [(subset, kind, surface) for subset in ("train", "held_out") for kind, surface in kinds(subset)]
EVERY_DEFECT = [(subset, name) for subset in ("train", "held_out") for name in defects(subset)]


def test_subsets_share_no_kind_and_no_defect() -> None:
    first, train, held_out = ({name for name, _ in kinds(subset)} for subset in SUBSETS)
    assert first < train
    assert not train & held_out
    first, train, held_out = (set(defects(subset)) for subset in SUBSETS)
    assert first < train
    assert not train & held_out
    for subset in SUBSETS:
        assert {surface for _, surface in kinds(subset)} == {True, False}


def test_training_images_are_of_the_training_subset_only() -> None:
    names = {name for name, _ in kinds("train")}
    for normal, defective in (numbered_twins(3, number) for number in range(30)):
        assert normal.kind == defective.kind
        assert normal.kind in names
        assert normal.defect == ""
        assert defective.defect in defects("train")
    made_images = [numbered_image(3, number) for number in range(40)]
    assert {made.kind for made in made_images} <= {name for name, _ in kinds("first")}
    assert {made.defect for made in made_images} <= {"", *defects("first")}
    assert any(made.defect for made in made_images)
    assert any(not made.defect for made in made_images)


def test_a_scene_is_a_function_of_seed_and_number() -> None:
    for first, again, other in (
        [numbered_image(0, 5), numbered_image(0, 5), numbered_image(0, 6)],
        *zip(numbered_twins(0, 5), numbered_twins(0, 5), numbered_twins(0, 6), strict=True),
    ):
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.mask, again.mask)
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("name", ["hole", "cut", "burr"])
def test_twins_differ_where_the_mask_is_and_in_light_alone_elsewhere(name: str) -> None:
    normal, defective = make_twins(np.random.default_rng(5), SIZE_PX, product=Product("dice", False, 4), defect=name)
    assert not normal.mask.any()
    assert defective.mask.mean() >= LEAST_AREA
    change = gaussian_filter(np.abs(normal.image - defective.image).mean(-1), 1.0)
    elsewhere = change[~binary_dilation(defective.mask, iterations=4)]
    assert elsewhere.max() < 0.2  # light differs by at most 12 % from 1 in each image
    assert change[defective.mask].mean() > 2 * elsewhere.mean()


@pytest.mark.parametrize(("subset", "kind", "surface"), EVERY_KIND)
def test_every_kind_is_drawn_within_range_and_varies(subset: str, kind: str, surface: bool) -> None:
    del subset
    product = Product(kind, surface, 11)
    one, two = (make_image(np.random.default_rng(seed), SIZE_PX, product=product) for seed in (1, 2))
    for made in (one, two):
        assert made.image.shape == (SIZE_PX, SIZE_PX, 3)
        assert made.image.dtype == np.float32
        assert 0 <= made.image.min() <= made.image.max() <= 1
        assert made.image.std() > 0.004
        assert not made.mask.any()
    assert not np.array_equal(one.image, two.image)


@pytest.mark.parametrize(("subset", "name"), EVERY_DEFECT)
def test_a_mask_is_where_the_image_changed_and_lies_in_the_region(subset: str, name: str) -> None:
    size = SIZE_PX
    rng = np.random.default_rng(3)
    ramp = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (size, size // 16))
    clean = coloured(np.random.default_rng(1), ramp)
    region = np.zeros((size, size), bool)
    region[16:80, 16:80] = True
    defect = dict(defects(subset))[name]  # type: ignore[arg-type]
    image, mask = add_defect(rng, clean, region, defect)
    assert mask.mean() >= LEAST_AREA
    assert np.abs(image - clean)[~mask].max() <= LEAST_CHANGE
    assert np.abs(image - clean).max(-1)[mask].min() > LEAST_CHANGE
    outside = mask.copy()
    outside[8:88, 8:88] = False  # a hole's bright rim may extend some pixels beyond the region
    assert not outside.any()


def test_a_defect_that_never_shows_is_an_error() -> None:
    def nothing(rng: Generator, image: np.ndarray, region: np.ndarray) -> np.ndarray:
        del rng, region
        return image

    clean = np.full((32, 32, 3), 0.5, np.float32)
    with pytest.raises(ValueError, match="is not visible"):
        add_defect(np.random.default_rng(0), clean, np.ones((32, 32), bool), nothing)
