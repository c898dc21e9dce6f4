"""Walks of random schedulers, with a network of one line, against diffusers' own."""

import importlib
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_schedulers import SUPPORTED, check_options, keys_of, random_scheduler
from sweeping import Case, Choice, Outputs, sweep

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.samplers import keys_from_noise, sample, step_noise
from gadjax.formats.diffusers_folder import SCHEDULER, read_scheduler
from gadjax.formats.scheduler_config import (
    floors_timesteps,
    parameterization_from_config,
    schedule_from_config,
)
from gadjax.formats.schedulers import sampler_from_config
from gadjax.pipelines.pipeline import floor_timesteps
from gadjax.types import Cond

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()

SHAPE = (2, 4, 3, 4)
MIX = (np.random.default_rng(1).normal(size=(4, 4)) / 2).astype(np.float32)
WORDS = {"_class_name", "steps", "prediction_type", "timestep_spacing", "beta_schedule"}


def network(xp, x, t):
    """A fixed network: tanh of a linear map of x, shifted with t. The same in NumPy and JAX."""
    return xp.tanh(x @ MIX + xp.sin(t / 200))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUPPORTED)
def test_schedulers(name, tmp_path):
    check_options(name)
    sweep(name, partial(draw, name), tmp_path, len(SUPPORTED))


def draw(name: str, rng: np.random.Generator, root: Path) -> Case:
    pick = Choice(rng)
    config = random_scheduler(name, pick)
    steps = pick(1, 2, 3, 4, 5, 7, 10, 20, 25, 50)
    noise = rng.standard_normal(SHAPE, np.float32)
    index = {"scheduler": ["diffusers", name]}
    (root / SCHEDULER).parent.mkdir()
    (root / SCHEDULER).write_text(json.dumps(config))

    def theirs(noise=noise) -> Outputs:
        scheduler = getattr(diffusers, name).from_pretrained(root / SCHEDULER.parent)
        return {"end": their_walk(scheduler, steps, noise)}

    return Case(
        {"scheduler": config, "steps": steps},
        frozenset({*keys_of(name), *WORDS}),
        theirs,
        lambda: {"end": our_walk(read_scheduler(root, index), steps, noise)},
        lambda: theirs(np.nextafter(noise, np.float32(np.inf))),
    )


def their_walk(scheduler, steps: int, noise: np.ndarray) -> np.ndarray:
    """As the pipelines call it."""
    name = type(scheduler).__name__
    if name == "SCMScheduler":
        scheduler.set_timesteps(
            steps, max_timesteps=1.57080, intermediate_timesteps=1.3 if steps == 2 else None
        )
        return their_consistency(scheduler, noise)
    scheduler.set_timesteps(steps)
    x = torch.tensor(noise) * getattr(scheduler, "init_noise_sigma", 1)
    with same_noise(scheduler, noise):
        for t in scheduler.timesteps:
            x_t = (
                scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            )
            output = torch.tensor(network(np, np.asarray(x_t), np.float32(t)))
            out = scheduler.step(output, t, x)
            x = out.prev_sample
    return np.asarray(x)


def their_consistency(scheduler, noise: np.ndarray) -> np.ndarray:
    scheduler.set_begin_index(0)
    scale = scheduler.config.sigma_data
    x = torch.tensor(noise) * scale
    with same_noise(scheduler, noise):
        for t in scheduler.timesteps[:-1]:
            output = torch.tensor(network(np, np.asarray(x / scale), np.float32(t))) * scale
            x, denoised = scheduler.step(output, t.expand(len(x)), x, return_dict=False)
    return np.asarray(denoised / scale)


@contextmanager
def same_noise(scheduler, noise: np.ndarray) -> Iterator[None]:
    """What a scheduler adds is what gadjax adds."""
    module, step = importlib.import_module(type(scheduler).__module__), itertools.count()

    def drawn(shape, **ignored):
        return torch.tensor(np.asarray(step_noise(keys_from_noise(x), next(step), x)))

    x = jnp.asarray(noise)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", drawn)
        yield


def our_walk(config, steps: int, noise: np.ndarray) -> jax.Array:
    sampler = sampler_from_config(config)
    times = sampler.times(steps)

    def apply(params, x, t, cond):
        return network(jnp, x, t[:, None, None, None])

    apply = floor_timesteps(apply) if floors_timesteps(config) else apply
    denoiser = Denoiser(apply, schedule_from_config(config), parameterization_from_config(config))
    with jax.disable_jit():  # a Python loop is faster here than a compilation
        return sample(
            lambda x, t: denoiser({}, x, t, Cond(None, None)), sampler, jnp.asarray(noise), times
        )
