# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # What distillation does to noise
#
# A deterministic sampler is a map from noise z to a picture x0(z). Its Jacobian says what a small
# change of the noise does to the picture, and the Jacobian's leading right singular vectors are the
# changes that do most. Matching distributions, as DMD does, cares about the set of pictures and not
# about this map. We distil the bundled teacher twice, with DMD alone and with GAD added, and ask of
# each student: do the teacher's directions still do what they did?
#
# Two CPU cores need about three minutes.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gadjax
from gadjax.io.image_grid import grid, to_uint8
from gadjax.objectives import DMD, GAD
from gadjax.pipelines.sampling import clean_latent, draw, initial_noise

UPDATES = 150
TOP = 6  # singular directions that we look at
STEP = 4.0  # how far we go along one of them; a noise itself is 16 long
OUT = Path("runs/notebooks")
OUT.mkdir(parents=True, exist_ok=True)


def show(rows, captions, name):
    """A row of pictures for each label: saved, and shown where this is a notebook."""
    sheet = grid([(label, images / 127.5 - 1) for label, images in rows], captions, scale=3)
    sheet.save(OUT / name)
    return sheet


# %%
teacher = gadjax.load("asset:shapes_flow_teacher")


def distil(objective):
    return gadjax.distill(
        teacher,
        objective,
        "asset:shapes_prompts.txt",
        updates=UPDATES,
        optim={"lr": 4e-4, "b1": 0.0, "b2": 0.95},
        critic={"updates": 1, "lr": 8e-4},
        ema=0.95,
        remat="none",
    )


models = {"teacher": teacher, "DMD": distil(DMD())}
models["DMD + GAD"] = distil(DMD() + 0.5 * GAD())

# %% [markdown]
# ## The same noises through all three

# %%
PROMPTS = ["a shape", "a large circle", "a yellow shape at the bottom", "a small red triangle"] * 2
drawn = {name: gadjax.sample(model, PROMPTS) for name, model in models.items()}
show(drawn.items(), PROMPTS, "03_same_noises.png")

# %% [markdown]
# ## The Jacobian's leading directions
#
# J is never written down. A forward derivative gives J v, a reverse one J^T u, and a randomised SVD
# (Halko, Martinsson and Tropp 2011) needs no more: sketch the range of J with random vectors,
# sharpen the sketch with J and J^T once more, and take the SVD of the little that is left.


# %%
def singular_directions(f, z, directions=None):
    """Of f's Jacobian J at z: the TOP largest singular values, their right vectors [TOP, ...], and
    J of `directions`, by default of these vectors."""
    _, push = jax.linearize(f, z)
    pull = jax.linear_transpose(push, z)
    forward, back = jax.vmap(push), jax.vmap(lambda u: pull(u)[0])

    def orthonormal(x):
        return jnp.linalg.qr(x.reshape(len(x), -1).T)[0].T.reshape(x.shape)

    sketch = jax.random.normal(jax.random.key(0), (TOP + 8, *z.shape))
    sketch = orthonormal(forward(orthonormal(back(orthonormal(forward(sketch))))))
    _, values, vectors = jnp.linalg.svd(back(sketch).reshape(TOP + 8, -1), full_matrices=False)
    vectors = vectors[:TOP].reshape(TOP, *z.shape)
    return values[:TOP], vectors, forward(vectors if directions is None else directions)


def at_noise(model, prompt):
    """(z, directions) -> singular_directions of the model's map from noise to x0."""
    pipeline, sampling = model.pipeline, model.sampling
    told, untold = (pipeline.tokens([text], sampling.length) for text in (prompt, ""))

    @jax.jit
    def run(params, z, directions):
        cond = pipeline.encode_text(params, *told)
        null = pipeline.encode_text(params, *untold)

        def x0(z):
            return clean_latent(pipeline, params[pipeline.backbone], sampling, z[None], cond, null)[
                0
            ]

        return singular_directions(x0, z, directions)

    return lambda z, directions=None: [np.asarray(x) for x in run(model.params, z, directions)]


# %% [markdown]
# For each student, three numbers over a few noises:
#
# - *overlap* of its own leading directions with the teacher's, |V_S V_T^T|^2 / TOP, from 0 to 1;
#   random ones of 256 dimensions would have TOP / 256 = 0.02.
# - *cosine* between J_S v and J_T v for the teacher's directions v: does the picture change in the
#   same way?
# - *norm* |J_S v| / |J_T v|: and by as much? Below 1 the map was flattened.

# %%
PROMPT, NOISES = "a shape", 4
noises = initial_noise(0, NOISES, teacher.pipeline.latent)
look = at_noise(teacher, PROMPT)
of_teacher = [look(z) for z in noises]


def flat(x):
    return x.reshape(len(x), -1)


print(f"{'':10} overlap  cosine    norm")
for name, model in models.items():
    look, rows = at_noise(model, PROMPT), []
    for z, (_, wanted, J_T) in zip(noises, of_teacher, strict=True):
        _, own, J_S = look(z, wanted)
        lengths = [np.linalg.norm(flat(x), axis=1) for x in (J_S, J_T)]
        cosine = np.sum(flat(J_S) * flat(J_T), axis=1) / (lengths[0] * lengths[1])
        overlap = np.sum((flat(own) @ flat(wanted).T) ** 2) / TOP
        rows.append([overlap, cosine.mean(), np.exp(np.log(lengths[0] / lengths[1]).mean())])
    print(f"{name:10} " + "  ".join(f"{x:6.3f}" for x in np.mean(rows, axis=0)))

# %% [markdown]
# ## What the directions do
#
# One noise, moved along the teacher's first three directions, forwards and back. In the teacher's
# row every pair of columns shows what that direction means. Below it, what is left of the meaning.

# %%
_, directions, _ = of_teacher[0]
moves = [np.zeros_like(noises[0])] + [sign * STEP * v for v in directions[:3] for sign in (-1, 1)]
captions = ["this noise"] + [f"{sign} v{n}" for n in (1, 2, 3) for sign in ("less", "more")]
moved = np.stack([noises[0] + move for move in moves])
rows = []
for name, model in models.items():
    images = draw(model.pipeline, model.params, model.sampling, [PROMPT] * len(moved), moved)
    rows.append((name, to_uint8(images)))
print(f"pictures: {OUT / '03_same_noises.png'}: the same noises, three models")
print(f"          {OUT / '03_directions.png'}: one noise, moved along the teacher's directions")
show(rows, captions, "03_directions.png")
