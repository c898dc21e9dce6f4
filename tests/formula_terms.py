"""A term and its formula by hand in float64, and the times at which a term evaluates networks."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from closed_form import (
    SHAPE,
    D,
    World,
    gaussian_params,
    law,
    make_batch,
    mixture_params,
    one_step,
    with_memory,
)

from gadjax.objectives.base import Context
from gadjax.training.context import Roles, make_context

SAMPLES, CLOSE = 8, 1e-10


@dataclass(frozen=True)
class Hand:
    """What a formula by hand starts from: the draws of the context, and networks as functions."""

    world: World
    context: Context
    student: dict
    critic: dict
    teacher: dict

    @property
    def batch(self):
        return self.context.batch

    def with_stream(self, name):
        """The same with the draws of a nested random stream."""
        return replace(self, context=self.context.with_stream(name))

    def alpha_sigma(self, t):
        return [v[:, None, None, None] for v in self.world.schedule.alpha_sigma(t)]

    def x0(self):
        """The student's at its drawn step."""
        given = self.context.x_BHWC, self.context.t_B, self.batch.cond
        return self.world.denoiser(self.student, *given).x0

    def uniform_times(self, low=0.02, high=0.98):
        schedule = self.world.schedule
        span = schedule.last - schedule.clean
        return jnp.floor((low + (high - low) * self.context.uniform("t")) * span) + (
            schedule.clean + 1
        )

    def noised(self, x0, t):
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * self.context.normal("eps")

    def guided(self, params, x, t, scale):
        """x0 and eps, guided; scale: a number or [B]."""
        scale = jnp.reshape(jnp.asarray(scale, x.dtype), (-1, 1, 1, 1))
        cond, null = (
            self.world.denoiser(params, x, t, c) for c in (self.batch.cond, self.batch.null)
        )
        return jax.tree.map(lambda c, n: n + scale * (c - n), cond, null)


def compare(
    world: World, term, loss, critic_loss=None, head=None, x0=None, networks=None, more=None
):
    """Compare values and gradients: of the student's loss, and of the critic's.

    Args:
      world: of the formulas.
      term: what is tested.
      loss, critic_loss: Hand -> loss per sample [B].
      head: parameters of the discriminator.
      x0: clean latents of the data.
      networks: frozen networks that the term names.
      more: further fields of the batch.
    """
    with jax.enable_x64(True):
        batch = make_batch(SAMPLES, dtype=float)._replace(x0=x0, **(more or {}))
        student = world.student_params(bend=0.4, dtype=float)
        critic, teacher = gaussian_params(3, dtype=float), mixture_params(dtype=float)

        def context(student, critic, teacher):
            roles = Roles(student, teacher, critic, head, networks=networks or {})
            return with_memory(term, make_context(world.step_spec(term), term.needs, roles, batch))

        def hand(student, critic, teacher):
            given = context(student, critic, teacher)
            return Hand(world, given, student, critic, teacher)

        ours = [lambda *nets: term(context(*nets))[0]]
        theirs = [lambda *nets: loss(hand(*nets))]
        if critic_loss:
            ours += [lambda *nets: term.critic_loss(context(*nets))]
            theirs += [lambda *nets: critic_loss(hand(*nets))]

        @jax.jit
        def run(*nets):
            def both(f, which):
                mean = jax.value_and_grad(lambda *nets: f(*nets).mean(), which)
                return f(*nets), mean(*nets)

            return [[both(f, which) for which, f in enumerate(fs)] for fs in (ours, theirs)]

        actual, expected = jax.device_get(run(student, critic, teacher))
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=CLOSE, atol=CLOSE * max(1e-9, np.abs(b).max()))
    grads = jax.tree.leaves([gradient for _, (_, gradient) in expected])
    assert all(np.abs(leaf).max() > 1e-9 for leaf in grads)  # the formulas depend on everything


def recorded(world: World, term, samples=2048, **more):
    """(network, times [B]) of each evaluation of teacher and critic, and the context."""
    calls = []

    def recorder(name, f):
        def call(x, t, *scale):
            calls.append((name, t, scale[0] if scale else None))
            return f(x, t, *scale)

        return call

    batch = make_batch(samples)
    nets = world.student_params(bend=0.2), gaussian_params(3), mixture_params()

    @jax.jit
    def run():
        context = replace(
            world.context(term, batch, *nets, **more),
        )
        context = replace(
            context,
            teacher=recorder("teacher", context.teacher),
            critic=recorder("critic", context.critic),
        )
        term(context)
        return [(t, scale) for _, t, scale in calls], context.t_B

    values, t_B = run()
    names = [name for name, *_ in calls]
    return [(n, np.asarray(t), s) for n, (t, s) in zip(names, values, strict=True)], np.asarray(t_B)


def networks_gradients(world: World, term, **more):
    """Gradients of the student's loss with respect to critic and teacher."""
    batch, student = make_batch(SAMPLES), world.student_params(bend=0.2)

    def loss(critic, teacher):
        return term(world.context(term, batch, student, critic, teacher, **more))[0].mean()

    slopes = jax.jit(jax.grad(loss, (0, 1)))(gaussian_params(3), mixture_params())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(slopes)]


def descent(world: World, term, samples=64, **more):
    """A step down from a student whose distribution differs from the teacher's in the mean alone.

    Returns: cosine of minus the bias's gradient and the difference of the means; and the largest
      gradient where critic and teacher agree.
    """
    world = one_step(world)
    student = world.student_params()
    critic = law(student["step0"]["matrix"], student["step0"]["bias"])
    critic["variance"] += 1e-3
    towards = np.linspace(-1, 1, D, dtype=np.float32)
    teacher = critic | {"mean": critic["mean"] + towards}
    batch = make_batch(samples, text_scale=0.0)

    @partial(jax.jit)
    def gradient(student, critic, teacher):
        def loss(student):
            return term(world.context(term, batch, student, critic, teacher, **more))[0].mean()

        return jax.grad(loss)(student)

    slope = np.asarray(gradient(student, critic, teacher)["step0"]["bias"], float)
    still = jax.device_get(gradient(student, critic, critic))
    cosine = -slope @ towards / (np.linalg.norm(slope) * np.linalg.norm(towards))
    return cosine, max(np.abs(leaf).max() for leaf in jax.tree.leaves(still))


TOKENS, WIDTH, BLOCKS = 2, 12, 3
MIX = np.random.default_rng(9).normal(size=(2 * D + 2, TOKENS * WIDTH)) / 3


def with_features(world: World) -> World:
    """The world with features for a discriminator: x, x0 and the levels, mixed into two tokens.

    Those after the blocks are functions of them.
    """

    def features(params, x_BHWC, t_B, cond, blocks=()):
        x0 = world.denoiser(params, x_BHWC, t_B, cond).x0
        levels = jnp.stack(world.schedule.alpha_sigma(t_B), axis=1)
        parts = [x_BHWC.reshape(-1, D), x0.reshape(-1, D), levels]
        features = jnp.concatenate(parts, axis=1).astype(x_BHWC.dtype)
        tokens = (features @ MIX.astype(features.dtype)).reshape(-1, TOKENS, WIDTH)
        return tuple(jnp.sin((k + 1) * tokens) for k in blocks) if blocks else tokens

    world = World(world.schedule, world.kind, world.times)
    denoiser = replace(world.denoiser, features=features, feature_blocks=BLOCKS)
    object.__setattr__(world, "denoiser", denoiser)
    return world


def head_params(term, dtype=jnp.float32):
    """Parameters of a discriminator's head with non-zero logits."""
    rng = np.random.default_rng(4)
    head = term.init_discriminator(jax.random.key(0), WIDTH)
    return jax.tree.map(lambda p: np.asarray(rng.normal(size=p.shape) / 4, dtype), head)


def pictures(dtype=np.float32, samples=SAMPLES):
    """Clean latents of data."""
    return np.asarray(np.random.default_rng(5).normal(1, 0.5, (samples, *SHAPE)), dtype)


def by_head(hand: Hand, x, t):
    """Logits [B] of the discriminator on the critic's features."""
    head = hand.context.discriminator_params
    f = hand.world.denoiser.features(hand.critic, x, t, hand.batch.cond)
    f = f - f.mean(2, keepdims=True)
    f = f / jnp.sqrt((f**2).mean(2, keepdims=True) + 1)
    f = jax.nn.gelu(f @ head["linear_1"]["kernel"] + head["linear_1"]["bias"])
    return (f @ head["linear_2"]["kernel"] + head["linear_2"]["bias"]).mean((1, 2))
