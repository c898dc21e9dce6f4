"""Both updates of the closed-form world, compiled once for the tests that share them."""

from functools import partial

import jax
import numpy as np
import optax
from closed_form import FLOW_WORLD, gaussian_params, mixture_params

from gadjax.objectives import DMD, GAD, Anchor
from gadjax.training.state import create_state
from gadjax.training.steps import critic_step, student_step

WORLD, B = FLOW_WORLD, 16
TOTAL = DMD() + 0.5 * GAD(steps=2) + 0.05 * Anchor()
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
OPTIMIZERS = {"student": ADAM, "critic": ADAM}
STEP_SPEC = WORLD.step_spec(TOTAL, optimizers=OPTIMIZERS, ema=0.9)
NETWORKS = {"teacher": gaussian_params()}
train_student = jax.jit(partial(student_step, STEP_SPEC))
train_critic = jax.jit(partial(critic_step, STEP_SPEC))


def start():
    params = {"student": WORLD.student_params(bend=0.2), "critic": mixture_params(3)}
    return create_state(params, OPTIMIZERS)


def equal(a, b):
    a, b = (jax.device_get(jax.tree.leaves(tree)) for tree in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def moved(a, b):
    """Whether every leaf changed somewhere."""
    a, b = (jax.device_get(jax.tree.leaves(tree)) for tree in (a, b))
    return all(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
