from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import gaussian_params, make_batch
from formula_steps import (
    NETWORKS,
    OPTIMIZERS,
    STEP_SPEC,
    WORLD,
    B,
    equal,
    moved,
    start,
    train_critic,
    train_student,
)
from ml_collections import ConfigDict

from gadjax.diffusion.geometry import Directions
from gadjax.objectives import DMD, GAD, TDM, Anchor, Needs, TeacherMap
from gadjax.objectives.compose import Addable
from gadjax.seeds import make_key
from gadjax.training.backward_simulation import backward_simulate, stratified_step_indices
from gadjax.training.batch import make_batch as batch_of
from gadjax.training.context import Roles, make_context
from gadjax.training.state import create_state, make_optimizer
from gadjax.training.steps import critic_step, student_step
from gadjax.types import Cond, TextKV


def test_a_student_step_changes_the_student_and_its_ema():
    old, batch = start(), make_batch(B)
    new, metrics = train_student(old, NETWORKS, batch)
    assert moved(new.params["student"], old.params["student"]) and moved(new.ema, old.ema)
    assert equal(
        (new.params["critic"], new.opt["critic"]), (old.params["critic"], old.opt["critic"])
    )
    assert int(new.step) == 1 and equal(new.bad, {"student": 0, "critic": 0})
    assert metrics.keys() >= {"student/loss", "student/grad_norm", "student/bad", "loss/gad"}
    again, _ = train_student(new, NETWORKS, batch)
    assert int(again.step) == 2


@dataclass(frozen=True)
class Clock(Addable):
    """A term whose losses are the update's number and its share of the run."""

    needs = Needs(critic=True)

    def __call__(self, context):
        return jnp.full(B, 1.0) * context.share, {"step": context.step}

    def critic_loss(self, context):
        return jnp.full(B, 1.0) * context.share + context.step


def test_terms_have_the_clock_of_the_run_in_both_updates():
    step_spec = WORLD.step_spec(1.0 * Clock(), optimizers=OPTIMIZERS, microbatches=2, steps=12)
    old, batch = start()._replace(step=jnp.int32(3)), make_batch(B)
    new, metrics = jax.jit(partial(student_step, step_spec))(old, NETWORKS, batch)
    assert float(metrics["student/loss"]) == 0.25 and float(metrics["clock/step"]) == 3
    assert int(new.step) == 4
    _, metrics = jax.jit(partial(critic_step, step_spec))(old, NETWORKS, batch)
    assert float(metrics["critic/loss"]) == 3.25


def test_a_critic_step_changes_the_critic_and_counts_no_step():
    old, batch = start(), make_batch(B)
    new, metrics = train_critic(old, {}, batch)
    assert moved(new.params["critic"], old.params["critic"])
    assert equal(new._replace(params=0, opt=0), old._replace(params=0, opt=0))
    for tree, part in ((old.params, new.params), (old.opt, new.opt)):
        assert equal(tree["student"], part["student"])
    names = {"critic/loss", "critic/grad_norm", "critic/bad", "critic/loss_B"}
    assert metrics.keys() == names
    assert float(metrics["critic/grad_norm"]) > 0


def test_critic_steps_lower_the_critics_loss():
    """Repeated critic steps lower its loss on samples that it was not trained on."""
    step_spec = replace(STEP_SPEC, optimizers=dict.fromkeys(OPTIMIZERS, optax.adam(0.03)))
    params = {"student": WORLD.student_params(), "critic": gaussian_params(5)}
    state = create_state(params, step_spec.optimizers)

    @jax.jit
    def run(state):
        def update(state, i):
            batch = make_batch(64, text_scale=0.0)
            keys = jax.vmap(lambda k: jax.random.fold_in(k, i))(batch.key)
            noise = jax.vmap(lambda k: jax.random.normal(k, batch.noise.shape[1:]))(keys)
            state, metrics = critic_step(
                step_spec, state, {}, batch._replace(key=keys, noise=noise)
            )
            return state, metrics["critic/loss"]

        return jax.lax.scan(update, state, jnp.arange(200))[1]

    losses = np.asarray(run(state))
    # What is left is the spread of x0 about its posterior mean.
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()


def test_the_ema_decay_is_lower_at_first():
    state, batch = start(), make_batch(B)
    for step in range(3):
        old, (state, _) = state, train_student(state, NETWORKS, batch)
        decay = min(0.9, (1 + step) / (10 + step))
        for e, p, actual in zip(
            *map(jax.tree.leaves, (old.ema, state.params["student"], state.ema)), strict=True
        ):
            np.testing.assert_allclose(actual, decay * e + (1 - decay) * p, rtol=1e-5, atol=1e-7)
    late, _ = train_student(state._replace(step=jnp.int32(1000)), NETWORKS, batch)
    e, p, actual = (
        tree["step1"]["matrix"] for tree in (state.ema, late.params["student"], late.ema)
    )
    np.testing.assert_allclose(actual, 0.9 * e + 0.1 * p, rtol=1e-5, atol=1e-7)


PIPELINE = SimpleNamespace(latent=(2, 2, 2), cond=lambda text, mask, pooled: Cond(text, mask))


def raw(samples):
    rng = np.random.default_rng(0)
    text = rng.normal(size=(samples, 1, 8)).astype(np.float32)
    return {"text": jnp.asarray(text), "mask": jnp.ones((samples, 1))}


@cache
def maker(seed):
    frozen = {"null": raw(1)}
    return jax.jit(lambda raw, update: batch_of(PIPELINE, frozen, raw, make_key(seed), update))


def host_batch(samples, seed, update):
    return maker(seed)(raw(samples), update)


def numbers(batch):
    return jax.device_get((batch.noise, jax.random.key_data(batch.key), batch.stratum))


def test_a_batch_is_a_function_of_the_seed_and_the_update():
    one = host_batch(8, 3, 5)
    for a, b in zip(numbers(one), numbers(host_batch(8, 3, 5)), strict=True):
        np.testing.assert_array_equal(a, b)
    for other in (host_batch(8, 3, 6), host_batch(8, 4, 5)):
        for a, b in zip(numbers(one), numbers(other), strict=True):
            assert np.all(np.any((a != b).reshape(8, -1), axis=1))
    # A sample's numbers are its place's, whatever the size of the batch.
    for a, b in list(zip(numbers(one), numbers(host_batch(6, 3, 5)), strict=True))[:2]:
        np.testing.assert_array_equal(a[:6], b)
    np.testing.assert_array_equal(one.null.text, np.tile(raw(1)["text"], (8, 1, 1)))


def test_steps_of_the_students_grid_are_drawn_evenly():
    firsts = set()
    for update in range(12):
        stratum = np.asarray(host_batch(8, 0, update).stratum)
        np.testing.assert_array_equal(np.diff(stratum), 1)
        steps = np.asarray(stratified_step_indices(stratum, 4))
        assert np.bincount(steps[:4], minlength=4).tolist() == [1, 1, 1, 1]
        assert np.bincount(steps[4:], minlength=4).tolist() == [1, 1, 1, 1]
        firsts.add(int(steps[0]))
    # So that a batch smaller than the grid reaches all of it in time.
    assert firsts == {0, 1, 2, 3}
    for n in (1, 2, 3, 4, 5):
        steps = np.asarray(stratified_step_indices(jnp.arange(2 * n), n))
        assert np.bincount(steps, minlength=n).tolist() == [2] * n
        np.testing.assert_array_equal(steps[::2] + steps[1::2], n - 1)
    needs = Needs(student=True)
    batch = make_batch(8)._replace(stratum=jnp.arange(8, dtype=jnp.int32) + 6)
    context = make_context(STEP_SPEC, needs, Roles(WORLD.student_params()), batch)
    assert np.asarray(context.step_B).tolist() == [2, 1, 0, 3, 1, 2, 3, 0]
    assert np.asarray(context.t_B).tolist() == [750, 900, 1000, 500, 900, 750, 500, 1000]
    assert np.asarray(context.next_B).tolist() == [500, 750, 900, 0, 750, 500, 0, 900]


# Objective -> who reads a text, of how many samples (teacher: both captions), in the order.
READ = {
    TDM() + GAD(steps=2): ["teacher", 2 * B],  # the student's drawn step reads for itself
    DMD() + Anchor(target="x0", steps=2): ["teacher", 2 * B],
    DMD(backprop="all") + Anchor(steps=2): ["teacher", 2 * B, "student", B],
    GAD(end="whole", steps=2): ["teacher", 2 * B, "student", B],
    # The chosen samples' captions once more, for the tangents of the teacher's map.
    GAD(end="whole", steps=2, one_in=2): ["teacher", 2 * B, "student", B, "teacher", B],
}


def cache_text(calls: list):
    """The world's denoiser with a KV cache; its computations are recorded in `calls`."""
    names = {"basis": "teacher", "step0": "student", "logits": "critic"}

    def text_kv(params, text):
        calls.extend([next(names[key] for key in names if key in params), len(text)])
        return TextKV(text[None], text[None])

    def apply(params, x, t, cond):
        if isinstance(cond.text, TextKV):
            cond = cond._replace(text=cond.text.k[0])
        return WORLD.denoiser.apply(params, x, t, cond)

    return replace(WORLD.denoiser, apply=apply, text_kv=text_kv)


@pytest.mark.parametrize("objective", READ, ids=("tdm", "dmd", "endpoint", "whole", "part"))
def test_a_prompts_kv_cache_is_computed_once_for_all_evaluations(objective):
    calls, batch = [], make_batch(B)
    step_spec = replace(STEP_SPEC, objective=objective)
    ahead = replace(step_spec, denoiser=cache_text(calls))
    (state, metrics), (same, others) = (
        jax.jit(partial(student_step, r))(start(), NETWORKS, batch) for r in (step_spec, ahead)
    )
    assert calls == READ[objective]
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(same.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["student/loss"], others["student/loss"], rtol=1e-5)


@dataclass(frozen=True)
class Reading(Addable):
    """A term whose critic's loss reads everything that a term may need."""

    needs = Needs(
        student=True,
        first_step=(TeacherMap("next", 3),),
        tangent=Directions(),
        map_tangents=(TeacherMap("next", 2),),
        endpoint=True,
        teacher=True,
        critic=True,
    )

    def __call__(self, context):
        (pred, dots), (arrived, moved) = context.student, context.maps[TeacherMap("next", 2)]
        first = context.first_step[TeacherMap("next", 3)]
        real = context.teacher(pred.x0, context.t_B)
        read = (pred, dots, arrived, moved, first, context.endpoint, real)
        return sum(jnp.sum(v**2, axis=tuple(range(1, v.ndim))) for v in rows(read)), {}

    def critic_loss(self, context):
        return self(context)[0] * jnp.sum(context.critic_params["logits"])


def rows(tree):
    """Every array with the batch axis first."""
    return [v[0] if v.ndim == 5 else v for v in jax.tree.leaves(tree)]


def test_a_critics_loss_gets_the_needs_of_its_term():
    """They equal those of the student's loss."""
    step_spec = replace(STEP_SPEC, objective=1.0 * Reading())
    given = start(), NETWORKS, make_batch(B)
    _, mine = jax.jit(partial(critic_step, step_spec))(*given)
    _, expected = jax.jit(partial(student_step, step_spec))(*given)
    scale = float(jnp.sum(given[0].params["critic"]["logits"]))
    critic_loss_B = mine["critic/loss_B"] / scale
    np.testing.assert_allclose(critic_loss_B, expected["student/loss_B"], rtol=1e-4)


def test_a_critics_update_computes_the_students_kv_cache_once():
    calls = []
    step_spec = replace(STEP_SPEC, denoiser=cache_text(calls), objective=TDM())
    _, metrics = jax.jit(partial(critic_step, step_spec))(start(), {}, make_batch(B))
    step_spec = replace(STEP_SPEC, objective=TDM())
    _, expected = jax.jit(partial(critic_step, step_spec))(start(), {}, make_batch(B))
    assert calls == ["student", B]
    np.testing.assert_allclose(metrics["critic/loss"], expected["critic/loss"], rtol=1e-5)


@pytest.mark.parametrize("rollout", ["ode", "fresh_noise"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_neighbours_share_one_rollout(steps, rollout):
    """Half of the evaluations, and the latents of a rollout for each."""
    evaluated, denoiser = [], cache_text([])

    def watched(params, x, *rest):
        evaluated.append(len(x))
        return denoiser.apply(params, x, *rest)

    step_spec = replace(
        STEP_SPEC,
        times=(*STEP_SPEC.times[:steps], STEP_SPEC.times[-1]),
        denoiser=replace(denoiser, apply=watched),
        rollout=rollout,
    )

    @jax.jit
    def latents(student, batch):
        step_B = stratified_step_indices(batch.stratum, steps)
        alone = backward_simulate(replace(step_spec, batch_shards=12), student, batch, step_B)
        batch = batch._replace(cond=step_spec.denoiser.cache_text(student, batch.cond))
        return step_B, backward_simulate(step_spec, student, batch, step_B), alone

    with jax.enable_x64(True):
        batch = make_batch(12, dtype=float)
        batch = batch._replace(stratum=batch.stratum + 4)
        student = WORLD.student_params(bend=0.2, dtype=float)
        step, paired, alone = jax.device_get(latents(student, batch))
    assert evaluated == ([] if steps == 1 else [12, 6])
    noise = np.asarray(batch.noise)
    np.testing.assert_array_equal(paired[step == 0], noise[step == 0])
    np.testing.assert_allclose(paired, alone, rtol=1e-12)
    assert np.all(np.abs(paired - noise)[step > 0] > 0)


def test_two_runs_are_the_same_run():
    first, second = start(), start()
    for update in range(2):
        batch = host_batch(B, 1, update)._replace(cond=make_batch(B).cond, null=make_batch(B).null)
        first, _ = train_critic(first, {}, batch)
        first, _ = train_student(first, NETWORKS, batch)
        second, _ = train_critic(second, {}, batch)
        second, _ = train_student(second, NETWORKS, batch)
    assert equal(first, second)


OPTIM = {"lr": 0.1, "warmup": 0, "decay": 0, "b1": 0.9, "b2": 0.999, "weight_decay": 0, "clip": 1}


def rates(updates, **options):
    """The size of AdamW's updates on a constant gradient is the learning rate."""
    adam = make_optimizer(ConfigDict(OPTIM | options))
    params = jnp.zeros(2)

    def update(state, _):
        actual, state = adam.update(jnp.array([3e3, -3e3]), state, params)
        return state, actual

    actual = np.asarray(
        jax.jit(lambda s: jax.lax.scan(update, s, None, updates)[1])(adam.init(params))
    )
    np.testing.assert_allclose(actual[:, 0], -actual[:, 1], rtol=1e-5)
    return -actual[:, 0]


def test_learning_rates():
    np.testing.assert_allclose(rates(3), 0.1, rtol=1e-4)
    np.testing.assert_allclose(rates(6, warmup=4), [0, 0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-4)
    actual = rates(12, warmup=2, decay=10)
    np.testing.assert_allclose(actual[[0, 1, 2]], [0, 0.05, 0.1], rtol=1e-4)
    assert np.all(np.diff(actual[2:11]) < 0)
    np.testing.assert_allclose(actual[10:], 0.005, rtol=1e-4)


def test_the_clip_is_by_the_global_norm():
    adam = make_optimizer(ConfigDict(OPTIM | {"clip": 0.5}))
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    _, state = adam.update(
        {"a": jnp.full(3, 1e3), "b": jnp.full(4, 1e3)}, adam.init(params), params
    )
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(optax.global_norm(mu), 0.1 * 0.5, rtol=1e-5)
    free = make_optimizer(ConfigDict(OPTIM | {"clip": 0.0}))
    one = {"a": jnp.zeros(1)}
    _, state = free.update({"a": jnp.full(1, 1e3)}, free.init(one), one)
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(mu["a"], 0.1 * 1e3, rtol=1e-5)
