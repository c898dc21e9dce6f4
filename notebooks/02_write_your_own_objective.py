# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Write your own objective
#
# In `gadjax.analytic` the teacher is a mixture of Gaussians with a closed-form posterior mean. Its
# ODE map from noise to data is therefore known exactly, with its Jacobian, and a student trains in
# seconds, by the same update functions that train on pictures: a place to try a loss before paying
# for it.
#
# Run this file as a script, or open it with jupytext. Two CPU cores need a minute.

# %%
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gadjax.analytic import Bench, Mixture, table
from gadjax.diffusion.geometry import Directions
from gadjax.io.image_grid import grid
from gadjax.objectives import DMD, GAD, TERMS, Needs, Regression, TeacherMap, as_config
from gadjax.objectives.base import sample_mean
from gadjax.objectives.compose import Addable

OUT = Path("runs/notebooks")
OUT.mkdir(parents=True, exist_ok=True)

bench = Bench(Mixture.ring(modes=8), family="flow", steps=1)

# %% [markdown]
# ## A loss in ten lines
#
# A term is a frozen dataclass. `needs` lists its inputs from the update: here the student's
# prediction at its drawn step, the teacher's ODE over the same interval in 16 steps, and the
# tangents J v of both along one random direction v of the noise. The tangents are exact
# (`jax.jvp`), gradients flow through the student's, and a need of several terms is computed once. A
# term returns a loss per sample, and scalar metrics.
#
# For any other derivative, call `jax.jvp` in the term itself, as in
# `jax.jvp(lambda x: context.teacher(x, t_B).x0, (x_t,), (v,))`. No gradient reaches the parameters
# of the teacher or the critic.

# %%
ODE = TeacherMap("next", steps=16)


@dataclass(frozen=True)
class Sobolev(Addable):
    """E |S(x) - T(x)|^2 + slope |J_S v - J_T v|^2, v ~ N(0, I): values and tangents at once."""

    slope: float = 0.1
    needs = Needs(student=True, tangent=Directions(), maps=(ODE,), map_tangents=(ODE,))

    def __call__(self, context):
        (student, student_Jv), (teacher, teacher_Jv) = context.student, context.maps[ODE]
        value_B = sample_mean((student.x0 - teacher) ** 2)
        slope_B = sample_mean((student_Jv.x0[0] - teacher_Jv[0]) ** 2)  # of one direction
        return value_B + self.slope * slope_B, {"slope": jnp.mean(slope_B)}


# %% [markdown]
# Terms are added and weighted. We compare ours with existing ones: distribution matching, which
# never compares pictures of the same noise; the same with GAD; and regression, which is ours
# without tangents.

# %%
objectives = {
    "DMD": DMD(),
    "DMD + 0.3 GAD": DMD() + 0.3 * GAD(steps=16),
    "Regression": Regression(steps=16),
    "Sobolev (ours)": Sobolev(),
}
results = {name: bench.fit(objective, updates=1000) for name, objective in objectives.items()}
print(table({name: [result] for name, result in results.items()}))

# %% [markdown]
# Transport cost compares G(z) with where the teacher's exact ODE takes the same z: 0 is the
# teacher's own map, and 2 the right distribution from unrelated noise. Jacobian error and cosine
# compare the two maps' exact Jacobians.
#
# The picture shows each noise's sample in the colour of the noise's angle. All objectives give the
# ring. With DMD alone the order of the colours depends on the initial parameters: a distribution
# does not determine which noise gives which of its points.


# %%
def paint(points_ND, noise_ND, side=160, reach=2.5):
    """Scatter plot of points in the plane: [side, side, 3] in [-1, 1]."""
    angle = np.arctan2(noise_ND[:, 1], noise_ND[:, 0])
    colour = np.cos(angle[:, None] - 2 * np.pi / 3 * np.arange(3))
    picture = np.ones((side, side, 3))
    place = np.clip((1 + points_ND / reach) / 2 * side, 0, side - 1).astype(int)
    picture[side - 1 - place[:, 1], place[:, 0]] = colour
    return picture


def show(sheet, name):
    """Picture: saved, and displayed in a notebook."""
    sheet.save(OUT / name)
    return sheet


reference = bench.reference
cells = {"teacher": paint(reference.end, reference.noise[: len(reference.end)])}
cells |= {name: paint(result.samples, result.noise) for name, result in results.items()}
print(f"picture: {OUT / '02_rings.png'}")
show(grid([("", np.stack(list(cells.values())))], list(cells), scale=1), "02_rings.png")

# %% [markdown]
# To train with it on pictures, register a name: a run stores its objective as a config, in which
# terms are names. With the line below `gadjax.distill(teacher, DMD() + 0.3 * Sobolev(), prompts)`
# accepts it in this process; a process that loads such a run's workdir needs the line as well. For
# the commands add the class as a file of `gadjax/objectives/`, its name to `TERMS` there, and a
# test: `CONTRIBUTING.md` has the three steps.

# %%
TERMS["sobolev"] = Sobolev
print(as_config(DMD() + 0.3 * Sobolev(), TERMS))
