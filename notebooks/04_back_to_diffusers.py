# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Export to diffusers
#
# Students are mostly used in PyTorch. `gadjax.save` writes a complete diffusers folder: weights
# under diffusers' names, a scheduler with the student's steps, and a model card with the call. Here
# we train a student briefly, save it, open it with `PixArtAlphaPipeline`, and draw the same
# pictures with both libraries.
#
# This needs torch and diffusers: `pip install 'gadjax[torch]'`.

# %%
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtAlphaPipeline

import gadjax
from gadjax.io.image_grid import grid
from gadjax.objectives import DMD, GAD
from gadjax.pipelines.sampling import initial_noise

UPDATES = 60  # enough to export; not enough for good pictures
OUT = Path("runs/notebooks")
OUT.mkdir(parents=True, exist_ok=True)


def show(rows, captions, name):
    """Grid with a row of pictures for each label: saved, and displayed in a notebook."""
    sheet = grid([(label, images / 127.5 - 1) for label, images in rows], captions, scale=4)
    sheet.save(OUT / name)
    return sheet


# %%
student = gadjax.distill(
    "asset:shapes_teacher",
    DMD() + 0.3 * GAD(),
    "asset:shapes_prompts.txt",
    timesteps=(899, 674, 449, 224),
    updates=UPDATES,
    optim={"lr": 2e-4, "b1": 0.0, "b2": 0.95},
    ema=0.9,
    remat="none",
)

# %% [markdown]
# `save` draws three prompts with diffusers and with gadjax before it keeps the folder, and returns
# the result of the comparison. (`gadjax export` does the same with a workdir.)

# %%
folder = OUT / "student"
verified = gadjax.save(student, folder, overwrite=True)
print(f"largest difference of a pixel, of 1: {verified['max_difference']:.1e}")
print(sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# ## With diffusers alone
#
# From here on it is an ordinary diffusers pipeline. The timesteps of training are in `gadjax.json`
# (and in the card): another number of steps would be another sampler. The latents are passed so
# that both draw from the same noise; otherwise diffusers draws its own.

# %%
PROMPTS = ["a small red triangle", "a large circle", "a blue cross on a white background"]
sampling = json.loads((folder / "gadjax.json").read_text())
noise = initial_noise(0, len(PROMPTS), student.pipeline.latent)

pipe = PixArtAlphaPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
by_diffusers = pipe(
    PROMPTS,
    latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
    timesteps=sampling["timesteps"],
    guidance_scale=sampling["guidance"],
    max_sequence_length=sampling["length"],
    use_resolution_binning=False,
    clean_caption=False,
    output_type="np",
).images
by_diffusers = np.rint(255 * by_diffusers).astype(np.uint8)

# %%
by_gadjax = gadjax.sample(student, PROMPTS)
difference = np.abs(by_gadjax.astype(int) - by_diffusers)
rows = [("gadjax", by_gadjax), ("diffusers", by_diffusers), ("100 x difference", 100 * difference)]
print(f"largest difference of a pixel, of 255: {difference.max()}")
print(f"picture: {OUT / '04_back_to_diffusers.png'}: two rows alike, and a third one black")
show(rows, PROMPTS, "04_back_to_diffusers.png")
