"""Small CTs in conditions that users reported: each is read exactly, read with a note, or refused with one line.

ADFLOWS_CASES names a folder with a folder per case, and in it case.json with the paths `scan` and `mask`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medad.base.errors import InputError
from medad.cohort.datasets import LabelledScan
from medad.config.liver import PreprocessSettings
from medad.ct import io
from medad.steps.cases import prepare_case

FOLDER = Path(os.environ.get("ADFLOWS_CASES", ""))
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not os.environ.get("ADFLOWS_CASES"), reason="ADFLOWS_CASES names no folder of cases"),
]
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/case.json")) if os.environ.get("ADFLOWS_CASES") else []

REFUSED = {
    "d05_two_phases_one_series": "two phases in one series",
    "d05c_two_phases_same_text": "two phases in one series",
    "d07_missing_slice": "missing slice",
    "d09_gantry_tilt": "gantry tilt of 13.5 degrees",
    "d16_htj2k": r"transfer syntax 1\.2\.840",
    "d24_broken_link_at_end": "6 links lead nowhere",
    "d26_modality_mr": "expected modality CT, found MR",
    "d30_orientation_jitter": "orientation",
    "d37_uneven_thin_thick": "uneven slice spacing",
    "d40_subset_mask_seg_dicom": "",
    "d49_two_patients_one_folder": "two patients",
    "n02_no_affine": "no affine",
    "n03_shear_01deg": "sheared",
    "n04b_4d_two_frames": "3 dimensions",
    "n05d_label_float_noise": "whole numbers",
    "n08b_pair": "format|pair",
    "n10_sform_qform_differ": "affine-from",
    "n13_windowed_0_255": "HU",
    "n14_plus_1024": "HU",
    "n15_mr_like": "HU",
    "n17c_mask_identity_affine": "affine mismatch",
    "n19_lits_mask": r"2: \d+ mL.*--liver-label 1 --liver-label 2",
    "n36_lits_tumour_mask_by_default": r"2: \d+ mL.*--liver-label 1 --liver-label 2",
    "n18_totalseg_multilabel": r"mL.*--liver-label 5|--liver-label 5.*mL",
    "n19b_mask_255": "255",
    "n20b_2d": "3 dimensions",
    "n21_tiny": "4 x 4 x 4|too small|slice",
    "n21c_micrometre": "micrometre",
    "n25_empty_mask": "label without liver",
    "n30_mask_15mm": "shape mismatch",
    "n31_rgb": "RGB",
    "n32_vox_offset_0": "start of the voxels",
    "n37_swapped": "",
    "n38b_scan_as_own_mask": "",
    "n39_folder_with_nifti": "holds NIfTI",
    "n43_normalised_0_1000": "HU",
    "n46_shear_007": "sheared",
    "n52_mask_flipped_x": "mask|label",
    "n52c_mask_flipped_z": "mask|label",
    "n53_label5": "--liver-label 5",
}
"""Cases with one line, and a part of it. An empty text: any line."""
NOTED = {
    "d02_localizer_other_series": "1 localizer",
    "d04_rtstruct_beside": "1 RT structure set",
    "d08_rounded_positions": "rounded",
    "d18_nested_cd": "passed over",
    "d19_no_rescale": "RescaleSlope",
    "d23_junk_beside": "passed over",
    "d42_bits_stored_wrong": "bits of the header",
    "d45_rescale_type_us": "RescaleType is not HU",
    "n11_negative_pixdim": "",
    "n12_nan_outside": "air|-1024",
    "n17b_mask_affine_02vox": "voxel",
    "n22b_pad_99999": "padding|-1024|air",
    "n40_spleen_only_mask": "volume|place|side|mL",
    "n45_inf_outside": "air|-1024",
    "n50_mask_spacing_rounded": "voxel",
}
"""Cases that are read, and a part of one of their warnings. An empty text: any warning."""
PLAIN = (
    *("d01_plain", "d02_localizer_other_series", "d04_rtstruct_beside", "d08_rounded_positions"),
    *("d10_negative_spacing_between", "d10b_zero_spacing_between", "d11_monochrome1", "d12_overlay_bits"),
    *("d13_signed_12_bits", "d15a_jpeg2000", "d15b_jpegls", "d15c_jpeg_lossless", "d15d_rle", "d15e_deflated"),
    *("d15f_big_endian", "d17_enhanced_ct", "d18_nested_cd", "d19_no_rescale", "d20_no_preamble", "d22_unicode_spaces"),
    *("d23_junk_beside", "d25_coronal", "d36_wrong_charset", "d39_single_dcm", "d42_bits_stored_wrong"),
    *("d43_slope_ten", "d44_series_uid_padded", "d45_rescale_type_us", "d47_prone", "d48_feet_first_descending"),
    *("d51_empty_series_uid_and_phase", "n01_plain", "n11_negative_pixdim", "n16_mask_other_orientation"),
)
"""Cases with the voxels of `n01_plain`."""


def paths(name: str) -> tuple[Path, Path]:
    values = json.loads((FOLDER / name / "case.json").read_text(encoding="utf-8"))
    return Path(values["scan"]), Path(values["mask"])


@pytest.mark.parametrize("name", NAMES)
def test_each_case_is_read_or_refused_as_it_must_be(name: str, tmp_path: Path) -> None:
    scan, mask = paths(name)
    case = LabelledScan(scan, mask, (), None)
    settings = PreprocessSettings(slice_px=64, min_liver_px=16)
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name] or ":") as caught:
            prepare_case(case, settings, tmp_path, training=False)
        assert "\n" not in str(caught.value)
        return
    prepare_case(case, settings, tmp_path, training=False)
    facts = json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))
    if name in NOTED:
        assert facts["warnings"]
        assert re.search(NOTED[name], " ".join(facts["warnings"])), facts["warnings"]
    if name in PLAIN:
        plain = io.read_scan(paths("n01_plain")[0])
        np.testing.assert_array_equal(io.read_scan(scan).hu, plain.hu)
        assert facts["liver_ml"] == pytest.approx(540.35 if name != "d08_rounded_positions" else 112.57, abs=0.1)


@pytest.mark.parametrize("name", [name for name in ("n18_totalseg_multilabel", "n53_label5") if name in NAMES])
def test_the_offered_label_is_the_liver(name: str, tmp_path: Path) -> None:
    scan, mask = paths(name)
    prepare_case(LabelledScan(scan, mask, (5,), None), PreprocessSettings(slice_px=64), tmp_path, training=False)
    facts = json.loads((tmp_path / "case.json").read_text(encoding="utf-8"))
    assert facts["liver_ml"] == pytest.approx(540.35, abs=0.1)
