# %% [markdown]
# # Find lesions in a liver CT from Python
#
# This script segments one CT and compares the result with the ground truth. It needs neither Prefect nor a server.
#
# By default it reads what `make demo` left behind: a real CT into which lesions of known shape were inserted, and
# the model that found them, which is the one in the package. Run it from the folder that contains `runs/`:
#
#     python docs/examples/liver.py
#
# For your own scan, change the four paths below.

# %%
from pathlib import Path

import matplotlib as mpl
import nibabel
import numpy as np
from skimage.measure import label

import medad

mpl.use("Agg")  # writes files; remove this line in a notebook
import matplotlib.pyplot as plt

# %% [markdown]
# ## Paths
#
# `scan` is a NIfTI, MetaImage or NRRD file, or the folder of one DICOM series. `liver` is a mask on the scan's grid.
# `model` is the folder of `adflows liver run` or `adflows liver train`.

# %%
model = Path("runs/liver/demo")
case = next((model / "inserted").iterdir())
scan, truth = case / "scan.nii.gz", case / "label.nii.gz"
out = Path("out/liver")

# %% [markdown]
# ## Segment
#
# The label of the demo contains 1 for liver and 2 for inserted lesions. Both values together are the liver.

# %%
found = medad.segment(scan, liver=truth, liver_labels=(1, 2), model=model)
found.save(out)
for number, lesion in enumerate(found.lesions, start=1):
    print(f"lesion {number}: {lesion.volume_mm3 / 1000:.1f} mL, {lesion.diameter_mm:.0f} mm across")

# %% [markdown]
# ## Compare with the ground truth
#
# Dice is twice the overlap divided by the sum of both volumes: 1 is perfect, 0 means no overlap. A lesion counts as
# found if the mask touches it.


# %%
def read(path: Path) -> np.ndarray:
    """Return the voxels of a NIfTI file; the axes point to the patient's right, front and head."""
    return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)


lesions = read(truth) == 2
mask = read(out / "mask.nii.gz") > 0
dice = 2 * np.sum(mask & lesions) / (np.sum(mask) + np.sum(lesions))
parts = label(lesions)
hits = sum(bool(mask[parts == part].any()) for part in range(1, parts.max() + 1))
print(f"Dice {dice:.2f}; {hits} of {parts.max()} inserted lesions found")

# %% [markdown]
# ## Look at the slice with the most lesion
#
# Left: the CT. Middle: the probability of lesion. Right: the ground truth in green and the mask in red. The patient's
# right is on the left, as radiologists look at it.


# %%
def axial(volume: np.ndarray, plane: int) -> np.ndarray:
    """Return a slice as an image: the patient's front is up, the right is on the left."""
    return volume[::-1, ::-1, plane].T


hu, probability = read(scan), read(out / "probability.nii.gz")
plane = int(lesions.sum(axis=(0, 1)).argmax())
figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
for axis, title in zip(axes, ("CT, -100 to 200 HU", "probability of lesion", "truth green, mask red"), strict=True):
    axis.imshow(axial(hu, plane), cmap="gray", vmin=-100, vmax=200)
    axis.set_title(title)
    axis.set_axis_off()
axes[1].imshow(np.ma.masked_less(axial(probability, plane), 0.05), cmap="inferno", vmin=0, vmax=1, alpha=0.7)
for outlined, colour in ((lesions, "lime"), (mask, "red")):
    if outlined[:, :, plane].any():
        axes[2].contour(axial(outlined, plane), levels=[0.5], colors=colour, linewidths=1.2)
figure.savefig(out / "slice.png", dpi=120)
print(f"masks and picture: {out}")
