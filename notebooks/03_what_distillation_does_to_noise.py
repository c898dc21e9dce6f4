# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Distillation and the noise-to-image Jacobian
#
# A deterministic sampler is a map from noise z to a picture x0(z). Its Jacobian is the effect of a
# small change of the noise on the picture, and the Jacobian's leading right singular vectors are
# the changes with the largest effect. Distribution matching (DMD) constrains the set of pictures
# and not this map. We distil the bundled teacher twice, with DMD alone and with GAD added, and
# measure for each student whether the teacher's directions still have the same effect.
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
TOP = 6  # leading singular directions
STEP = 4.0  # distance along a direction; the norm of a noise is about 16
OUT = Path("runs/notebooks")
OUT.mkdir(parents=True, exist_ok=True)


def show(rows, captions, name):
    """Grid with a row of pictures for each label: saved, and displayed in a notebook."""
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
# J is never materialised. A forward derivative gives J v, a reverse one J^T u, and a randomised SVD
# (Halko, Martinsson and Tropp 2011) needs no more: sketch the range of J with random vectors,
# refine the sketch with J and J^T once more, and take the SVD of the small projected matrix.


# %%
def singular_directions(f, z, directions=None):
    """TOP largest singular values of f's Jacobian J at z, their right vectors, and J `directions`.

    The vectors are [TOP, ...]; `directions` are these vectors by default.
    """
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
    """Function (z, directions) -> singular_directions of the model's map from noise to x0."""
    pipeline, sampling = model.pipeline, model.sampling
    prompt_tokens, empty_tokens = (
        pipeline.tokens([text], sampling.length) for text in (prompt, "")
    )

    @jax.jit
    def run(params, z, directions):
        cond = pipeline.encode_text(params, *prompt_tokens)
        null = pipeline.encode_text(params, *empty_tokens)

        def x0(z):
            return clean_latent(pipeline, params[pipeline.backbone], sampling, z[None], cond, null)[
                0
            ]

        return singular_directions(x0, z, directions)

    return lambda z, directions=None: [np.asarray(x) for x in run(model.params, z, directions)]


# %% [markdown]
# For each student, three numbers over a few noises:
#
# - *overlap* of the student's leading directions with the teacher's, |V_S V_T^T|^2 / TOP, from 0 to
#   1; random ones of 256 dimensions would have TOP / 256 = 0.02.
# - *cosine* between J_S v and J_T v for the teacher's directions v: 1 if the picture changes in the
#   same way.
# - *norm* |J_S v| / |J_T v|: below 1 the student's map is flatter than the teacher's.

# %%
PROMPT, NOISES = "a shape", 4
noises = initial_noise(0, NOISES, teacher.pipeline.latent)
directions_at = at_noise(teacher, PROMPT)
of_teacher = [directions_at(z) for z in noises]


def flat(x):
    return x.reshape(len(x), -1)


print(f"{'':10} overlap  cosine    norm")
for name, model in models.items():
    directions_at, rows = at_noise(model, PROMPT), []
    for z, (_, V_T, J_T) in zip(noises, of_teacher, strict=True):
        _, V_S, J_S = directions_at(z, V_T)
        lengths = [np.linalg.norm(flat(x), axis=1) for x in (J_S, J_T)]
        cosine = np.sum(flat(J_S) * flat(J_T), axis=1) / (lengths[0] * lengths[1])
        overlap = np.sum((flat(V_S) @ flat(V_T).T) ** 2) / TOP
        rows.append([overlap, cosine.mean(), np.exp(np.log(lengths[0] / lengths[1]).mean())])
    print(f"{name:10} " + "  ".join(f"{x:6.3f}" for x in np.mean(rows, axis=0)))

# %% [markdown]
# ## Moving along the directions
#
# One noise, moved along the teacher's first three directions, forwards and back. In the teacher's
# row each pair of columns shows the effect of a direction; the rows below show what the students
# keep of it.

# %%
_, directions, _ = of_teacher[0]
moves = [np.zeros_like(noises[0])] + [sign * STEP * v for v in directions[:3] for sign in (-1, 1)]
captions = ["this noise"] + [f"{sign} v{n}" for n in (1, 2, 3) for sign in ("less", "more")]
moved = np.stack([noises[0] + move for move in moves])
rows = []
for name, model in models.items():
    images = draw(model, [PROMPT] * len(moved), moved)
    rows.append((name, to_uint8(images)))
print(f"pictures: {OUT / '03_same_noises.png'}: the same noises, three models")
print(f"          {OUT / '03_directions.png'}: one noise, moved along the teacher's directions")
show(rows, captions, "03_directions.png")
