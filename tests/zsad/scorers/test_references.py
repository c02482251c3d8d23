"""The choice of reference images: stable when images are added."""

from __future__ import annotations

import hashlib

from zsad.scorers.references import draw_references


def digests(count: int) -> list[str]:
    return [hashlib.sha256(f"image {i}".encode()).hexdigest() for i in range(count)]


def chosen(names: list[str], count: int) -> dict[str, list[str]]:
    drawn = draw_references(names, 0, count).tolist()
    return {name: [names[row] for row in rows] for name, rows in zip(names, drawn, strict=True)}


def test_one_more_image_becomes_a_reference_of_about_one_other() -> None:
    """Each of 200 images takes the new one with probability 1/201: mean 1, standard deviation 1."""
    names = digests(220)
    changed = []
    for more in range(200, 220):
        before, after = chosen(names[:more], 1), chosen(names[: more + 1], 1)
        different = [name for name in before if before[name] != after[name]]
        assert all(after[name] == [names[more]] for name in different), "no other choice changes"
        changed.append(len(different))
    assert max(changed) <= 6
    assert 0.4 < sum(changed) / len(changed) < 1.8


def test_one_more_image_changes_at_most_one_of_several_references() -> None:
    names = digests(61)
    before, after = chosen(names[:60], 8), chosen(names, 8)
    for name, references in before.items():
        assert len(set(references) - set(after[name])) <= 1
