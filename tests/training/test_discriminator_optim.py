"""Optimizer settings of a discriminator: its own, or the critic's."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest
from all_terms import objective_of, setting
from PIL import Image
from tiny_run import config_file
from train_runs import losses, read_vector, train

from gadjax.errors import InputError
from gadjax.objectives import TERMS, build
from gadjax.training.checks import critic_optim, validate
from gadjax.training.config import default_config, read_config
from gadjax.training.setup import make_optimizers
from gadjax.training.state import create_state
from gadjax.training.steps import critic_step

OWN = {"lr": 4e-3, "b1": 0.5, "warmup": 2, "decay": 9, "weight_decay": 0.2, "clip": 0.05}


def configured(objective=None, **discriminator):
    config = default_config()
    config.objective = objective or {"dmd": {}, "adversarial": {"hidden": 8}}
    config.optim.update(lr=2e-3, warmup=5, b2=0.95, weight_decay=0.3, clip=3.0)
    config.critic.update(updates=2, lr=1e-3, b1=0.1, decay=20, clip=2.0)
    config.discriminator.update(discriminator)
    return config


def test_what_is_none_is_the_critics_and_then_the_students():
    critic = critic_optim(configured(**OWN), "critic")
    assert critic.to_dict() == critic_optim(configured(), "critic").to_dict()
    assert critic_optim(configured(), "discriminator").to_dict() == critic.to_dict()
    assert (critic.lr, critic.b1, critic.warmup, critic.decay) == (1e-3, 0.1, 5, 20)
    some = critic_optim(configured(lr=4e-3, warmup=0, clip=0.0), "discriminator")
    assert (some.lr, some.b1, some.b2, some.warmup, some.decay) == (4e-3, 0.1, 0.95, 0, 20)
    assert (some.weight_decay, some.clip) == (0.3, 0.0)
    assert critic_optim(configured(**OWN), "discriminator").to_dict() == OWN | {"b2": 0.95}


def test_without_settings_the_state_is_that_of_the_critics():
    """Checkpoints from before there were any are of the same tree."""
    config, one = configured(), {"w": np.ones(3, np.float32)}
    optimizers = make_optimizers(config, build(config.objective, TERMS, (900.0, 400.0)))
    critic, discriminator = (
        jax.eval_shape(optimizers[role].init, one) for role in ("critic", "discriminator")
    )
    assert jax.tree.structure(critic) == jax.tree.structure(discriminator)
    updates = [
        jax.jit(optimizers[role].update)(one, optimizers[role].init(one), one)[0]["w"]
        for role in ("critic", "discriminator")
    ]
    np.testing.assert_array_equal(*updates)


def adamw(params, grads, moments, number, optim, updates):
    """Parameters and moments after update `number`, from 0, as one float64 vector each."""
    grads = grads * min(1.0, optim["clip"] / np.linalg.norm(grads))
    m = optim["b1"] * moments[0] + (1 - optim["b1"]) * grads
    v = optim["b2"] * moments[1] + (1 - optim["b2"]) * grads**2
    warmup, end = optim["warmup"] * updates, optim["decay"] * updates
    rate = optim["lr"] * number / warmup
    if number >= warmup:
        done = min(1.0, (number - warmup) / (end - warmup))
        rate = optim["lr"] * (0.05 + 0.95 * (1 + np.cos(np.pi * done)) / 2)
    direction = m / (1 - optim["b1"] ** (number + 1))
    direction = direction / (np.sqrt(v / (1 - optim["b2"] ** (number + 1))) + 1e-8)
    return params - rate * (direction + optim["weight_decay"] * params), (m, v)


def test_updates_are_those_of_adam_by_hand():
    """Over warm-up and decay, counted in steps of a run with two updates each; of critic and
    discriminator with their own settings, rates and clips."""
    with jax.enable_x64(True):
        spec, state, networks, batch = setting("adversarial")
        config = configured(**OWN)
        updates = config.critic.updates
        gradient_spec = spec()  # whose optimizers subtract the gradient
        trained_spec = replace(
            gradient_spec, optimizers=make_optimizers(config, objective_of("adversarial"))
        )
        gradients = jax.jit(partial(critic_step, gradient_spec))
        train_one = jax.jit(partial(critic_step, trained_spec))
        sgd = create_state(state.params, dict.fromkeys(state.params, optax.sgd(1.0)))
        state = create_state(state.params, trained_spec.optimizers)
        optims = {
            role: critic_optim(config, role).to_dict() for role in ("critic", "discriminator")
        }
        moments = dict.fromkeys(optims, (0.0, 0.0))
        clipped = dict.fromkeys(optims, 0)
        for number in range(updates * OWN["decay"] + 2):
            after, _ = gradients(sgd._replace(params=state.params), networks, batch)
            expected = {}
            for role, optim in optims.items():
                before = vector(state.params[role])
                grads = before - vector(after.params[role])
                clipped[role] += np.linalg.norm(grads) > optim["clip"]
                expected[role], moments[role] = adamw(
                    before, grads, moments[role], number, optim, updates
                )
            state, _ = train_one(state, networks, batch)
            for role, optim in optims.items():
                # Optax's schedules are in float32.
                limit = 1e-6 * optim["lr"]
                actual = vector(state.params[role])
                np.testing.assert_allclose(actual, expected[role], rtol=0, atol=limit)
        assert min(clipped.values()) > 1  # each by its own norm


def vector(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


@pytest.mark.parametrize("key,value", OWN.items())
def test_settings_without_a_discriminator_are_refused(config, key, value):
    changed = read_config([f"--config={config}"])
    changed.discriminator[key] = value
    expected = f"discriminator.{key}: found {value}; expected none in a run without a discriminator"
    with pytest.raises(InputError, match=expected):
        validate(changed)


def test_its_decay_ends_after_its_warmup(config):
    changed = read_config([f"--config={config}"])
    changed.objective = {"dmd": {}, "adversarial": {"features": "teacher"}}
    changed.data.update(prompts="", world="gadjax.worlds.shapes")
    changed.discriminator.update(warmup=9, decay=9)
    with pytest.raises(InputError, match="discriminator.decay: found 9; expected more steps than"):
        validate(changed)


RUN = dict(
    student={"steps": 2, "timesteps": (900, 400)},
    objective={"ladd": {"blocks": (1,), "hidden": 4}},
    **{"steps": 4, "batch": 4, "remat": "none", "optim": {"lr": 1e-3}},
    **{"critic": {"lr": 1e-3, "updates": 2}, "checkpoint": {"every": 2}, "log": {"every": 1}},
    preview={"every": 0},
)


@pytest.fixture(scope="module")
def on_pictures(tiny_pipeline, tmp_path_factory):
    """Config of a run with a discriminator."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(3):
        picture = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("red circle")
    data = {"images": str(folder), "length": 8}
    path = folder.with_name("adversarial.py")
    return config_file(path, teacher=str(tiny_pipeline), data=data, **RUN)


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(on_pictures, tmp_path, capsys):
    own = "--config.discriminator.lr=0.01", "--config.discriminator.warmup=3"
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert train(on_pictures, whole, *own) == 0
    assert train(on_pictures, half, *own, "--config.steps=2") == 0
    assert train(on_pictures, half, *own) == 0
    for part in ("student", "ema"):
        np.testing.assert_array_equal(read_vector(half, part), read_vector(whole, part))
    assert losses(half) == losses(whole)
    assert train(on_pictures, half, "--config.steps=5") == 2
    assert "discriminator.lr: found 0.01, asked for None" in capsys.readouterr().err


@pytest.mark.slow
def test_a_workdir_from_before_there_were_any_resumes(on_pictures, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert train(on_pictures, whole) == 0
    assert train(on_pictures, half, "--config.steps=2") == 0
    saved = json.loads((half / "config.json").read_text())
    del saved["discriminator"]
    (half / "config.json").write_text(json.dumps(saved))
    assert train(on_pictures, half) == 0
    np.testing.assert_array_equal(read_vector(half, "student"), read_vector(whole, "student"))
    assert losses(half) == losses(whole)
