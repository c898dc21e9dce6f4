from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import make_batch
from formula_steps import (
    NETWORKS,
    STEP_SPEC,
    TOTAL,
    B,
    equal,
    moved,
    start,
    train_critic,
)

from gadjax.objectives import GAD, Needs
from gadjax.objectives.compose import Addable
from gadjax.training.state import create_state
from gadjax.training.steps import critic_step, student_step
from gadjax.training.updates import accumulate, apply_if_finite, on_device


@cache
def one_update(parts):
    """Change of student and critic by plain gradient steps, and their metrics."""
    plain = {"student": optax.sgd(1.0), "critic": optax.sgd(1.0)}
    state, batch = create_state(start().params, plain), make_batch(B)
    step_spec = replace(STEP_SPEC, optimizers=plain, microbatches=parts)

    @jax.jit
    def run(state):
        student, metrics = student_step(step_spec, state, NETWORKS, batch)
        critic, more = critic_step(step_spec, state, {}, batch)
        new = {"student": student.params["student"], "critic": critic.params["critic"]}
        return jax.tree.map(jnp.subtract, new, state.params), metrics | more

    return jax.device_get(run(state))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_sum_to_the_large_batch(microbatches):
    """Same draws, same weights, whatever the number of parts: the gradients are equal."""
    (full, metrics), (parts, same) = one_update(1), one_update(microbatches)
    for a, b in zip(*map(jax.tree.leaves, (full, parts)), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    assert metrics.keys() == same.keys()
    for name, value in metrics.items():
        assert same[name] == pytest.approx(value, rel=1e-5), name


def test_a_microbatch_is_a_strided_share_of_the_batch():
    """On a mesh, where neighbours share a device, every device works on every microbatch."""
    strata = []

    def loss(params, batch):
        jax.debug.callback(lambda s: strata.append(np.asarray(s).tolist()), batch.stratum)
        return params * jnp.mean(batch.stratum.astype(jnp.float32)), {}

    for batch_shards, parts in (
        (1, [[0, 1], [2, 3], [4, 5], [6, 7]]),  # two that walk together
        (2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ):
        spec = replace(STEP_SPEC, batch_shards=batch_shards)
        jax.jit(lambda p, spec=spec: accumulate(loss, p, make_batch(8), 4, spec.neighbours))(1.0)
        jax.effects_barrier()
        assert sorted(strata) == parts
        strata.clear()


@dataclass(frozen=True)
class Spoilt(Addable):
    """An infinite loss, without a gradient, for a batch with a mark."""

    needs = Needs()

    def __call__(self, context):
        mark = context.batch.noise[:, 0, 0, 0]
        return jnp.where(jnp.abs(mark) == 77, jnp.inf, 0.0), {}


def spoil(batch, value):
    return batch._replace(noise=batch.noise.at[5, 0, 0, 0].set(value))


@pytest.mark.parametrize("value", [np.nan, np.inf, 77.0], ids=["nan", "inf", "loss alone"])
def test_a_nonfinite_update_is_skipped(value):
    step_spec = replace(STEP_SPEC, objective=TOTAL + Spoilt(), microbatches=2)
    train, good = jax.jit(partial(student_step, step_spec)), make_batch(B)
    old, _ = train(start(), NETWORKS, good)
    new, metrics = train(old, NETWORKS, spoil(good, value))
    assert equal((new.params, new.opt, new.ema), (old.params, old.opt, old.ema))
    assert int(new.bad["student"]) == 1 == int(metrics["student/bad"])
    assert int(new.bad["critic"]) == 0 and int(new.step) == 2
    assert not np.isfinite(metrics["student/loss"])
    assert np.flatnonzero(~np.isfinite(metrics["student/loss_B"])).tolist() == [5]
    new, _ = train(new, NETWORKS, spoil(good, value))
    assert int(new.bad["student"]) == 2
    new, metrics = train(new, NETWORKS, good)
    assert int(new.bad["student"]) == 0 and np.isfinite(metrics["student/loss"])
    assert moved(new.params["student"], old.params["student"]) and moved(new.ema, old.ema)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_critics_update_likewise(value):
    good = make_batch(B)
    old, _ = train_critic(start(), {}, good)
    new, metrics = train_critic(old, {}, spoil(good, value))
    assert equal(new._replace(bad=0), old._replace(bad=0))
    assert equal(new.bad, {"student": 0, "critic": 1}) and int(metrics["critic/bad"]) == 1
    assert np.flatnonzero(~np.isfinite(metrics["critic/loss_B"])).tolist() == [5]
    new, _ = train_critic(new, {}, good)
    assert equal(new.bad, {"student": 0, "critic": 0})


def test_gradients_that_overflow_in_the_norm_are_skipped():
    """Finite leaf by leaf; their squares' sum is not, and the clip would make them zeros."""
    step_spec = replace(STEP_SPEC, objective=1e30 * GAD(loss="square", normalize=False))
    old = start()
    new, metrics = jax.jit(partial(student_step, step_spec))(old, NETWORKS, make_batch(B))
    assert np.isfinite(metrics["student/loss"]) and np.isinf(metrics["student/grad_norm"])
    assert equal((new.params, new.opt, new.ema), (old.params, old.opt, old.ema))
    assert int(new.bad["student"]) == 1


def test_offloaded_moments_are_transferred_within_the_branch():
    """Not before the update is known to be finite; without offload there is neither."""

    def update(finite, moments, params):
        return apply_if_finite(finite, on_device(change), moments, params)

    def change(moments, params):
        moments = jax.tree.map(lambda m: m + 1, moments)
        return moments, params - moments["m"]

    moments, params = {"m": jnp.ones(3)}, jnp.zeros(3)
    plain = jax.make_jaxpr(update)(True, moments, params)
    assert "cond" not in str(plain) and "device_put" not in str(plain)
    offloaded = jax.device_put(moments, jax.memory.Space.Host)
    equations = jax.make_jaxpr(update)(True, offloaded, params).eqns
    names = [equation.primitive.name for equation in equations]
    assert "cond" in names and "device_put" not in names
    unchanged, changed = equations[names.index("cond")].params["branches"]
    assert "device_put" not in str(unchanged) and str(changed).count("device_put") == 2
    for given in (moments, offloaded):
        (new, params_1), (old, params_0) = (
            jax.jit(update)(f, given, params) for f in (True, False)
        )
        assert equal((new, params_1), ({"m": np.full(3, 2.0)}, np.full(3, -2.0)))
        assert equal((old, params_0), (moments, params))
