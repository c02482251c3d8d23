"""Copies of a prepared scan with lesions: the file, its rounding, its seeds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray

from medad.anomalies.copies import COPIES, NO_SHIFT, load_copies, write_copies
from medad.anomalies.solid_lesions import SolidLesions, draw_solid_lesions
from medad.base.errors import ConfigError, InputError
from medad.config.anomalies import SolidLesionSettings
from tests.medad.prepared import save_slices

GREY_PER_HU = 0.85
SETTINGS = SolidLesionSettings(copies=3, diameter_mm=(8, 20))


def _organ() -> ndarray:
    organ = np.zeros((9, 30, 30), bool)
    organ[1:, 5:26, 4:22] = True
    organ[0, 10:20, 8:16] = True
    return organ


def _prepared(folder: Path, grey_per_hu: float | None = GREY_PER_HU) -> Path:
    organ = _organ()
    pixels = np.where(organ, 128, 0).astype(np.uint8)
    return save_slices(folder, pixels, organ, affine=np.diag([-2.0, -2.0, 3.0, 1.0]), grey_per_hu=grey_per_hu)


def _write(prepared: Path, out: Path, seed: int = 0) -> Path:
    out.mkdir()
    write_copies(prepared, SETTINGS, seed, out)
    return out


def test_a_copys_shift_is_the_hu_that_were_drawn_rounded_to_grey_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[SolidLesions] = []

    def spy(*arguments: object) -> SolidLesions:
        drawn.append(draw_solid_lesions(*arguments))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr("medad.anomalies.copies.draw_solid_lesions", spy)
    got = load_copies(_write(_prepared(tmp_path / "case"), tmp_path / "copies"))
    assert len(drawn) == len(got.shift) == len(got.mask) == 3
    for shift, mask, lesions in zip(got.shift, got.mask, drawn, strict=True):
        hu = (shift.astype(float) - NO_SHIFT) / GREY_PER_HU
        within = np.abs(lesions.shift_hu) < 126 / GREY_PER_HU
        assert np.abs(hu - lesions.shift_hu)[within].max() <= 0.5 / GREY_PER_HU + 1e-3
        assert np.array_equal(mask, lesions.mask)


def test_copies_lie_in_the_organ_and_differ_from_each_other(tmp_path: Path) -> None:
    got = load_copies(_write(_prepared(tmp_path / "case"), tmp_path / "copies"))
    organ = _organ()
    assert got.mask.shape == (3, *organ.shape)
    assert not (got.mask & ~organ).any()
    assert (got.shift[:, ~organ] == NO_SHIFT).all()
    assert len({mask.tobytes() for mask in got.mask}) == 3


def test_the_file_depends_on_the_seed_alone(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path / "case")
    first, again, other = (
        (_write(prepared, tmp_path / name, seed) / COPIES).read_bytes() for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert first == again
    assert first != other


def test_a_part_of_the_copies_is_the_same_part(tmp_path: Path) -> None:
    folder = _write(_prepared(tmp_path / "case"), tmp_path / "copies")
    whole = load_copies(folder)
    for only in (slice(1, 3), slice(1), slice(4), slice(1, 9)):
        part = load_copies(folder, only)
        assert np.array_equal(part.shift, whole.shift[only])
        assert np.array_equal(part.mask, whole.mask[only])


def test_equalised_slices_are_refused(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path / "case", grey_per_hu=None)
    with pytest.raises(ConfigError, match="equalise: false"):
        _write(prepared, tmp_path / "copies")


@pytest.mark.parametrize("kept", [None, 0, 100, 5000])
def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path, kept: int | None) -> None:
    folder = _write(_prepared(tmp_path / "case"), tmp_path / "copies")
    if kept is None:
        (folder / COPIES).unlink()
    else:
        (folder / COPIES).write_bytes((folder / COPIES).read_bytes()[:kept])
    with pytest.raises(InputError, match="copies with lesions cannot be read"):
        load_copies(folder)
