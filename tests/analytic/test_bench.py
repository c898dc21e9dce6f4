from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.analytic import Bench, Gaussian, Mixture
from gadjax.diffusion.rollout import rollout
from gadjax.errors import InputError, RunStopped
from gadjax.objectives import (
    DMD,
    GAD,
    LADD,
    SFD,
    TERMS,
    Anchor,
    GADLift,
    Needs,
    Regression,
    UniDAD,
)
from gadjax.objectives.compose import Addable

SMALL = {"width": 32, "batch": 64}
LINE = Bench(Gaussian.random(4), **SMALL)
RING = Mixture.ring()
families = pytest.mark.parametrize("family", ["flow", "ddpm"])


@cache
def fitted(objective, seed=0, turned=False):
    return LINE.fit(objective, 300, seed, turned_student() if turned else None)


def turned_student():
    """The teacher's own map behind a rotation of the noise, and too narrow."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    return LINE.linear(0.6 * LINE.reference.jacobian[0] @ rotation, LINE.teacher.mean)


@families
@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_starts_as_the_teacher_in_as_many_steps(family, steps):
    bench = Bench(RING, family, steps, **SMALL)
    assert len(bench.times) == steps + 1 and bench.times[-1] == bench.schedule.clean
    assert bench.times[0] == bench.schedule.last
    z = np.asarray(jax.random.normal(jax.random.key(0), (64, 2)))
    silent = bench.init(jax.random.key(1))
    silent["layer2"] *= 0

    def predict(x, t):
        alpha, sigma = (jnp.full((64, 1), v) for v in bench.schedule.alpha_sigma(t))
        return RING.posterior(x, alpha, sigma)

    @jax.jit
    def run(z):
        draws = (bench.draw(params, z) for params in (silent, bench.init(jax.random.key(1))))
        return rollout(predict, bench.schedule, z, jnp.array(bench.times)).end, *draws

    expected, quiet, start = run(z)
    # x0 from eps divides by the schedule's smallest alpha.
    np.testing.assert_allclose(quiet, expected, atol=1e-4)
    assert 0 < np.sqrt(np.mean((start - expected) ** 2)) < 0.5 * bench.scale


@families
def test_the_mlp_changes_x0_and_eps_consistently(family):
    """alpha x0 + sigma eps stays x_t, and both stay finite at the ends of the schedule."""
    bench = Bench(RING, family, **SMALL)
    params = bench.init(jax.random.key(0))
    t = jnp.array([bench.schedule.last, 500.0, 1.0, bench.schedule.clean])
    x = jax.random.normal(jax.random.key(1), (4, 1, 1, 2))
    alpha, sigma = (v[:, None] for v in bench.schedule.alpha_sigma(t))
    prediction, bare = jax.jit(lambda x: (bench.predict(params, x, t), bench.predict({}, x, t)))(x)
    moved = np.abs(prediction.x0 - bare.x0).max(axis=1)
    assert np.all(moved[:3] > 1e-5) and moved[3] < 1e-6
    np.testing.assert_allclose(
        alpha * prediction.x0 + sigma * prediction.eps, x[:, 0, 0], rtol=1e-4, atol=1e-5
    )
    assert bench.denoiser.features(params, x, t, None).shape == (4, 1, 4)


@families
def test_a_linear_student_is_the_given_map(family):
    bench = Bench(Gaussian.random(4), family, **SMALL)
    matrix, offset = np.random.default_rng(0).normal(size=(4, 4)), np.arange(4.0)
    z = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)
    student = bench.linear(matrix, offset)
    # In eps an error of x0 grows by 1 / alpha = 157.
    np.testing.assert_allclose(jax.jit(bench.draw)(student, z), z @ matrix.T + offset, atol=2e-4)
    right = bench.reference.jacobian[0]
    result = bench.measure(bench.draw, bench.linear(right, bench.teacher.mean))
    assert result.jacobian_error < 1e-4 and result.modes_covered == 1
    # An eps network's x0 divides float32 rounding by alpha, here 1/157, on the way in and out.
    alpha = float(bench.schedule.alpha_sigma(bench.times[0])[0])
    rounding = np.finfo(np.float32).eps / alpha**2 if bench.family == "ddpm" else 1e-3
    assert result.transport_cost < rounding**2
    with pytest.raises(InputError, match="found a student of 2 steps; expected 1"):
        Bench(Gaussian.random(4), family, 2).linear(matrix)


def test_regression_learns_a_gaussians_map():
    start = LINE.measure(LINE.draw, LINE.init(jax.random.key(0)))
    found = fitted(Regression(steps=16))
    assert start.jacobian_error > 0.9 and start.transport_cost > 0.9
    assert found.jacobian_error < 0.2 and found.jacobian_cosine > 0.99
    assert found.transport_cost < 0.02 and found.sliced_wasserstein < 0.15
    assert found.params.keys() == {"layer0", "layer1", "layer2"}


@pytest.mark.slow
def test_gad_turns_a_rotated_map_back_and_matching_distributions_does_not():
    """Trained by the package's own steps, with networks as student and critic. Both objectives
    match the distribution, which the rotated map has as well as the right one."""
    start = LINE.measure(LINE.draw, turned_student())
    blind = fitted(DMD() + GADLift(), turned=True)
    seeing = fitted(DMD() + 0.3 * GAD(steps=16, loss="square"), turned=True)
    assert start.mode_spread == pytest.approx(0.6, rel=0.05) and start.sliced_wasserstein > 0.25
    for result in (blind, seeing):
        assert result.mode_spread == pytest.approx(1, rel=0.1)
        assert result.modes_covered == 1 and result.sliced_wasserstein < 0.15
    assert blind.jacobian_error > 1.1 and blind.transport_cost > 1.2
    assert seeing.jacobian_error < 0.2 and seeing.transport_cost < 0.05


def test_a_seed_is_a_result():
    objective = Regression(steps=16)
    one, other = fitted(objective), fitted(objective, seed=1)
    again = LINE.fit(objective, 300, 0)
    for name, value in one.params.items():
        np.testing.assert_array_equal(value, again.params[name])
        assert np.all(value != other.params[name])
    np.testing.assert_array_equal(one.samples, again.samples)
    np.testing.assert_array_equal(one.noise, other.noise)
    assert one.jacobian_error == again.jacobian_error != other.jacobian_error


@dataclass(frozen=True)
class Judged(Addable):
    """A term that needs all that a batch and a state may hold: pictures and a discriminator."""

    needs = Needs(student=True, discriminator=True, images=True)

    def init_discriminator(self, key, width):
        return {"w": jnp.zeros(width)}

    def score(self, context, x0):
        t_B = jnp.full(len(x0), 100.0)
        features = context.denoiser.features({}, x0, t_B, context.batch.cond)
        return features[:, 0] @ context.discriminator_params["w"]

    def __call__(self, context):
        return -self.score(context, context.student[0].x0), {}

    def discriminator_loss(self, context):
        fake, real = context.student[0].x0, context.batch.x0
        size = jnp.sum(context.discriminator_params["w"] ** 2)
        return self.score(context, fake) - self.score(context, real) + size


def test_pictures_and_a_discriminator_are_provided_on_request():
    """A linear discriminator moves the student's mean to that of the pictures; it would move on
    from there, so few updates."""
    teacher = Gaussian(np.array([2.0, -1.0]), np.eye(2), np.full(2, 0.01))
    bench = Bench(teacher, steps=2, **SMALL)
    start = bench.init(jax.random.key(0))
    start["layer2"] = start["layer2"].at[-1].set(jnp.array([-2.0, 2.0]))
    results = bench.measure(bench.draw, start), bench.fit(Judged(), 10, start=start)
    before, after = (teacher.mean - result.samples.mean(axis=0) for result in results)
    assert np.linalg.norm(before) > 1 and np.linalg.norm(after) < 0.8 * np.linalg.norm(before)


@pytest.mark.slow
def test_every_update_has_new_noise():
    calls = []

    @dataclass(frozen=True)
    class Watching(Addable):
        needs = Needs(student=True, critic=True)

        def __call__(self, context):
            return self.record("student", context, context.student[0].x0), {}

        def critic_loss(self, context):
            return self.record("critic", context, context.critic(context.x_BHWC, context.t_B).x0)

        def record(self, role, context, x0):
            jax.debug.callback(
                lambda z, k: calls.append((role, z.tobytes(), np.asarray(k).tolist())),
                context.batch.noise,
                context.step_B,
                ordered=True,
            )
            return jnp.mean(x0**2, axis=(1, 2, 3))

    bench = Bench(RING, steps=2, critic_updates=3, **SMALL)
    bench.fit(Watching(), 2)
    jax.effects_barrier()
    assert [role for role, *_ in calls] == 2 * (3 * ["critic"] + ["student"])
    assert len({noise for _, noise, _ in calls}) == 8
    assert all(steps == [0, 1, 1, 0] * 16 for *_, steps in calls)


@dataclass(frozen=True)
class Spoilt(Addable):
    needs = Needs(student=True)

    def __call__(self, context):
        return jnp.log(-jnp.abs(context.student[0].x0[:, 0, 0, 0])), {}


def test_untrainable_objectives_are_refused():
    with pytest.raises(InputError, match="bench: found family 'edm'; expected flow or ddpm"):
        Bench(RING, "edm")
    with pytest.raises(InputError, match="bench: found 0 steps"):
        Bench(RING, steps=0)
    with pytest.raises(InputError, match="student.steps: found 1; expected at least 2"):
        LINE.fit(DMD() + Anchor())
    with pytest.raises(InputError, match="found 0 terms that train the critic"):
        LINE.fit(GADLift())
    with pytest.raises(InputError, match="bench: found a term that takes some/folder; expected"):
        LINE.fit(UniDAD("some/folder"))
    with pytest.raises(InputError, match="bench: found a term for prompts of two versions or"):
        LINE.fit(SFD())
    with pytest.raises(InputError, match="objective.ladd.blocks: found 19; expected numbers below"):
        LINE.fit(LADD())
    with pytest.raises(RunStopped, match=r"not finite \(5 of the student\)"):
        LINE.fit(Spoilt(), 5)


def test_each_prompt_has_its_law_and_the_student_knows_which():
    """With a silent MLP the student is the teacher's one step, to the mean of the prompt's law."""
    left, right = (Gaussian(np.full(2, m), np.eye(2), np.full(2, 0.1)) for m in (-1.0, 2.0))
    z = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    for prompt, law in enumerate((left, right)):
        bench = Bench(right, prompts=(left, right), prompt=prompt, **SMALL)
        params = bench.init(jax.random.key(0))
        assert params["layer0"].shape[0] == Bench(right, **SMALL).init(jax.random.key(0))[
            "layer0"
        ].shape[0] + len(bench.prompts)
        silent = params | {"layer2": 0 * params["layer2"]}
        np.testing.assert_allclose(jax.jit(bench.draw)(silent, z).mean(0), law.mean, atol=0.1)
    batch = bench.make_batch(jax.random.key(1), Needs(images=True, override="forget"))
    prompts, read = batch.cond.text[:, 0, 0], batch.override.text[:, 0, 0]
    assert prompts.tolist() == [0, 1] * 32 and set(read.tolist()) == {1}
    assert batch.label.tolist() == [1, 0] * 32
    side = np.asarray(batch.x0).reshape(-1, 2).mean(1)
    assert (side[::2] < 0.5).all() and (side[1::2] > 0.5).all()
    plain = bench.make_batch(jax.random.key(1), Needs())
    assert plain.override is None and plain.x0 is None


# These take networks of a run, features of its teacher's blocks, prompts or layers.
OF_RUNS = "disback", "dmm", "ladd", "ppcl", "sfd", "tether", "uni_dad"
# The first step of four; the transition that its student's last step allows.
OPTIONS = {"flash_dmd": {"early": 2}, "tcm": {"transition": 0.3}, "tscd": {"segments": (8, 4)}}
FLOWS = "boot", "meanflow", "twinflow"


@pytest.mark.slow
@families
@pytest.mark.parametrize("name", [name for name in TERMS if name not in OF_RUNS])
def test_every_term_trains_here(name, family):
    """With a base, where the term is no objective by itself. Far from convergence."""
    term = TERMS[name](**OPTIONS.get(name, {}))
    bench = Bench(RING, family, steps=1 if name == "boot" else 4, **SMALL)
    if name in FLOWS and family == "ddpm":
        with pytest.raises(InputError, match=f"objective.{name}"):
            bench.fit(term, 20)
        return
    start = bench.init(jax.random.key(0))
    needs = term.needs
    alone = not needs.detach_first_step and (not needs.critic or hasattr(term, "critic_loss"))
    result = bench.fit(term if alone else DMD() + term, 20, start=start)
    assert np.all(np.isfinite(result.samples)) and np.isfinite(result.jacobian_error)
    for key, value in result.params.items():
        assert np.any(value != start[key]), key
