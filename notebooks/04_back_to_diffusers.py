# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Back to diffusers
#
# A student is worth something where pictures are drawn, and that is mostly PyTorch. `gadjax.save`
# writes a complete diffusers folder: weights under their own names, a scheduler whose steps are the
# student's, and a card with the line to call it by. Here we train one for a moment, save it, open
# it with `PixArtAlphaPipeline`, and draw the same picture twice.
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

UPDATES = 60  # the folder is what this is about, not the pictures
OUT = Path("runs/notebooks")
OUT.mkdir(parents=True, exist_ok=True)


def show(rows, captions, name):
    """A row of pictures for each label: saved, and shown where this is a notebook."""
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
# `save` draws three prompts with diffusers and with gadjax before it lets the folder stand, and
# returns what came of it. (`gadjax export` does the same with a workdir.)

# %%
folder = OUT / "student"
verified = gadjax.save(student, folder, overwrite=True)
print(f"largest difference of a pixel, of 1: {verified['max_difference']:.1e}")
print(sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# ## With diffusers alone
#
# From here on it is any diffusers pipeline. Which timesteps the weights were trained for is in
# `gadjax.json` (and in the card): another number of steps would be another sampler. The latents are
# handed over so that both draw from the same noise; otherwise diffusers draws its own.

# %%
PROMPTS = ["a small red triangle", "a large circle", "a blue cross on a white background"]
recipe = json.loads((folder / "gadjax.json").read_text())
noise = initial_noise(0, len(PROMPTS), student.pipeline.latent)

pipe = PixArtAlphaPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
by_diffusers = pipe(
    PROMPTS,
    latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
    timesteps=recipe["timesteps"],
    guidance_scale=recipe["guidance"],
    max_sequence_length=recipe["length"],
    use_resolution_binning=False,
    clean_caption=False,
    output_type="np",
).images
by_diffusers = np.rint(255 * by_diffusers).astype(np.uint8)

# %%
by_gadjax = gadjax.sample(student, PROMPTS)
apart = np.abs(by_gadjax.astype(int) - by_diffusers)
rows = [("gadjax", by_gadjax), ("diffusers", by_diffusers), ("100 x difference", 100 * apart)]
print(f"largest difference of a pixel, of 255: {apart.max()}")
print(f"picture: {OUT / '04_back_to_diffusers.png'}: two rows alike, and a third one black")
show(rows, PROMPTS, "04_back_to_diffusers.png")
