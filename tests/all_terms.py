"""An objective with every term, in a closed-form world that has all that terms may need."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from closed_form import FLOW_WORLD, D, World, gaussian_params, make_batch, one_step
from formula_pixels import autoencoder, decode
from formula_terms import WIDTH, pictures, with_features

from gadjax.objectives import TERMS, build
from gadjax.training.state import create_state
from gadjax.types import Cond

B = 16

DMD = {"dmd": {}}
# Objectives of one term where that is one, otherwise beside another.
OBJECTIVES = {name: {name: {}} for name in TERMS} | {
    "adversarial": DMD | {"adversarial": {"hidden": 8}},
    "anchor": DMD | {"anchor": {"steps": 1}},
    "consistency": {"consistency": {"variance_bins": 4, "images": True, "warmup": 6}},
    "disback": {"disback": {"path": ("a", "b")}},
    "dmm": {"dmm": {"teachers": ("a", "b"), "features": 0.5, "blocks": (1,)}},
    "f_distill": {"f_distill": {"hidden": 8}},
    "flash_dmd": {"flash_dmd": {"width": 2, "r1": 0.1}},
    "gad": DMD | {"gad": {"steps": 1}},
    "gad_lift": DMD | {"gad_lift": {}},
    "gad_script": {"tdm": {}, "gad_script": {}},
    "gdd": {"gdd": {"width": 2}},
    "ladd": {"ladd": {"blocks": (0, 2), "hidden": 8, "r1": 0.1}},
    "ladd mismatched": {"ladd": {"blocks": (0, 2), "hidden": 8, "mismatched": True}},
    "tbcm": {"tbcm": {"points": 2}},
    "tcm": {"tcm": {"transition": 0.5}},
    "tscd": {"tscd": {"segments": (4, 1)}},
    "uni_dad": {"uni_dad": {"target": "a", "hidden": 8}},
    "uni_instruct": {"uni_instruct": {"hidden": 8}},
}
ONE_STEP = ("boot",)


def world_of(name: str) -> World:
    return with_features(one_step(FLOW_WORLD) if name in ONE_STEP else FLOW_WORLD)


def objective_of(name: str, more=None):
    """The objective with a term; more: further terms, as a config has them."""
    return build(OBJECTIVES[name] | (more or {}), TERMS, world_of(name).times[:-1])


def setting(name: str, more=None):
    """Step specification, state, networks and batch of an update in float64, whose optimizers
    subtract the gradient. name, more: as for `objective_of`."""
    objective, world, rng = objective_of(name, more), world_of(name), np.random.default_rng(3)
    objective.check_denoiser(world.denoiser)
    roles = {"student": world.student_params(bend=0.4, dtype=float)}
    if objective.needs.critic:
        roles["critic"] = gaussian_params(3, dtype=float)
    if objective.needs.discriminator:
        width = 3 if objective.trainer_needs(("discriminator",)).pixels else WIDTH
        head = objective.init_discriminator(jax.random.key(0), width)
        roles["discriminator"] = jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape), head)
    optimizers = dict.fromkeys(roles, optax.sgd(1.0))  # a step is the gradient
    spec = partial(
        world.step_spec,
        objective,
        optimizers=optimizers,
        steps=12,
        decode=decode,
        student_layers=(0, 2) if objective.needs.fewer_layers else (),
    )
    state = create_state(roles, optimizers, objective.init_memory())._replace(step=jnp.int32(3))
    networks = {
        n: gaussian_params(7 + i, dtype=float) for i, n in enumerate(objective.needs.networks)
    }
    networks |= {"teacher": gaussian_params(0, dtype=float)} | autoencoder(float)
    text = 0.5 * rng.normal(size=(B, 1, D))
    batch = make_batch(B, dtype=float)._replace(
        x0=pictures(float, B),
        override=Cond(jnp.asarray(text), jnp.ones((B, 1))) if objective.needs.override else None,
        label=jnp.asarray(rng.integers(0, 2, B), jnp.int32),
    )
    return spec, state, networks, batch
