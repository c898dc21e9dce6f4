# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # From a teacher of 40 evaluations to a student of 4
#
# gadjax bundles a teacher of a million parameters that draws captioned shapes. It samples in 20
# steps, and classifier-free guidance doubles the cost of each: 40 network evaluations per picture.
# Here we distil it into a student of 4 evaluations, and check whether the same noise still gives
# the same picture.
#
# Run this file as a script, or open it with jupytext. Two CPU cores need a minute or two.

# %%
from pathlib import Path

import numpy as np

import gadjax
from gadjax.assets import resolve
from gadjax.data.prompts import read_prompts
from gadjax.io.image_grid import grid
from gadjax.objectives import DMD, GAD, Anchor

UPDATES = 200  # ten times as many make a good student; these make a recognisable one
OUT = Path("runs/notebooks")
OUT.mkdir(parents=True, exist_ok=True)


def show(rows, captions, name):
    """Grid with a row of pictures for each label: saved, and displayed in a notebook."""
    sheet = grid([(label, images / 127.5 - 1) for label, images in rows], captions, scale=3)
    sheet.save(OUT / name)
    return sheet


# %% [markdown]
# ## The teacher
#
# `load` takes a diffusers pipeline folder, a workdir of `gadjax train`, or the name of a bundled
# asset. `sample` draws picture i from noise i of the seed, for every model.

# %%
teacher = gadjax.load("asset:shapes_flow_teacher")
print(teacher)

SHOWN = [
    "a large blue square at the top left on a grey background",
    "a green cross at the centre on a black background",
    "a small purple circle at the right on a white background",
    "a small red triangle",
    "a yellow shape at the bottom",
    "a shape",
]
PROMPTS = SHOWN + read_prompts(resolve("asset:shapes_test_prompts.txt"))[:58]
by_teacher = gadjax.sample(teacher, PROMPTS)

# %% [markdown]
# ## The student
#
# An objective is a sum of terms. DMD matches the distribution of the student's pictures to the
# teacher's, and does not constrain which noise gives which picture. GAD matches the student's
# Jacobian-vector products, its response to a small change of the noise, to the teacher's. The
# anchor matches the student's first step to the teacher's ODE from the same noise. No data are
# needed: prompts and noise suffice.

# %%
student = gadjax.distill(
    teacher,
    DMD() + 0.3 * GAD() + 0.05 * Anchor(),
    "asset:shapes_prompts.txt",
    updates=UPDATES,
    optim={"lr": 3e-4, "b1": 0.0, "b2": 0.95},
    critic={"updates": 2, "lr": 6e-4},
    ema=0.98,
    remat="none",
)
print(student)

# %% [markdown]
# ## The same noises
#
# Each column starts from one noise. The middle row is the teacher in as many steps as the student,
# at the same guidance: too few for it. It costs 8 evaluations, the student 4. What a prompt leaves
# open is decided by the noise, and there a student trained for a minute or two still errs now and
# then.

# %%
hurried = gadjax.sample(teacher, PROMPTS, steps=4)
by_student = gadjax.sample(student, PROMPTS)
rows = {"teacher, 20 steps": by_teacher, "teacher, 4": hurried, "student, 4": by_student}
show([(label, x[: len(SHOWN)]) for label, x in rows.items()], SHOWN, "01_quickstart.png")


# %%
def distance(images):
    """Mean absolute difference to the teacher's pictures of 20 steps, on the scale of 0 to 255."""
    return np.abs(images.astype(float) - by_teacher).mean()


print("mean distance of a pixel from the teacher's picture in 20 steps:")
print(f"  teacher in 4 steps, the same noises   {distance(hurried):5.1f}")
print(f"  student in 4 steps, the same noises   {distance(by_student):5.1f}")
print(
    f"  teacher in 20 steps, other noises     {distance(gadjax.sample(teacher, PROMPTS, 1)):5.1f}"
)
print(f"picture: {OUT / '01_quickstart.png'}: each column starts from one noise")
