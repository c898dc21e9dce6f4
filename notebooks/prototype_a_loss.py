# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Prototype a distillation loss where the answer is known
#
# The teacher is a mixture of Gaussians in the plane, whose posterior mean is a formula. The student
# is a small network that takes one step. We train it with regression to the teacher's ODE map, then
# with GAD added, and look at how well its Jacobian along the noise agrees with the teacher's.
#
# Run this file as a script, or open it with jupytext.

# %%
import jax
import jax.numpy as jnp
import optax

from gadjax.denoiser import Denoiser
from gadjax.geometry import directions, tangent
from gadjax.objectives import GAD, Regression
from gadjax.parameterization import from_prediction
from gadjax.rollout import rollout
from gadjax.schedules import Flow
from gadjax.training.steps import Recipe, make_context
from gadjax.types import Batch, Cond, Prediction

SCHEDULE, TIMES = Flow(), (990.0, 0.0)
MEANS = jnp.array([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])


def apply(params, x, t, cond):
    """The teacher where params is empty, else a student with one hidden layer."""
    alpha, sigma = (v[:, None] for v in SCHEDULE.alpha_sigma(t))
    flat = x.reshape(-1, 2)
    if params:
        hidden = jnp.tanh(flat @ params["in"] + params["bias"])
        x0 = hidden @ params["out"]
    else:
        spread = alpha**2 * 0.05 + sigma**2
        away = flat[:, None] - alpha[..., None] * MEANS
        share = jax.nn.softmax(-0.5 * jnp.sum(away**2, -1) / spread)[..., None]
        gain = (alpha * 0.05 / spread)[..., None]
        x0 = jnp.sum(share * (MEANS + gain * away), axis=1)
    said = Prediction(x0, (flat - alpha * x0) / sigma)
    return from_prediction("flow", said, alpha, sigma).reshape(x.shape)


denoiser = Denoiser(apply, SCHEDULE, "flow")


# %% [markdown]
# A batch needs a condition (here empty), noise, and a key for every sample.


# %%
def make_batch(key, samples=128):
    cond = Cond(jnp.zeros((samples, 1, 1)), jnp.ones((samples, 1)))
    noise = jax.random.normal(key, (samples, 1, 1, 2))
    return Batch(cond, cond, noise, jax.random.split(key, samples), jnp.arange(samples))


def fit(objective, steps=1500):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (2, 64)),
        "bias": jax.random.normal(keys[1], (64,)),
        "out": 0.1 * jax.random.normal(keys[2], (64, 2)),
    }
    recipe = Recipe(denoiser, objective, TIMES, 1, {}, 0.0)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            context = make_context(recipe, objective.needs, params, None, {}, make_batch(key))
            return jnp.mean(objective(context)[0])

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(steps):
        params, state = step(params, state, jax.random.key(number))
    return params


# %% [markdown]
# The measure: the cosine between the two maps' Jacobian-vector products at held-out noises.


# %%
@jax.jit
def tangent_cosine(params):
    batch = make_batch(jax.random.key(10_000), 1024)
    z, v = batch.noise, directions("gaussian", batch.key, (1, 1, 2))
    times = jnp.linspace(*TIMES, 33)
    _, wanted = tangent(
        lambda x: rollout(lambda x, t: denoiser({}, x, t, batch.cond), SCHEDULE, x, times).end, z, v
    )
    _, found = tangent(lambda x: denoiser(params, x, TIMES[0], batch.cond).x0, z, v)
    dots = [
        jnp.sum(a * b, (1, 2, 3)) for a, b in ((found, wanted), (found, found), (wanted, wanted))
    ]
    return jnp.mean(dots[0] / jnp.sqrt(dots[1] * dots[2]))


# %%
base = Regression(end="clean", steps=16)
for name, objective in (
    ("regression", 1.0 * base),
    ("regression + GAD", base + 0.1 * GAD(end="clean", steps=16)),
):
    print(f"{name:18} tangent cosine {float(tangent_cosine(fit(objective))):.3f}")
