from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import DDPM_WORLD, GUIDANCE, flat, gaussian_params, make_batch, mixture_params

from gadjax.objectives import TDM, GADScript
from gadjax.types import Prediction

B = 64


def differences(term, bend=0.3, samples=B):
    """The term's loss, and the pieces of its formula from the networks themselves."""
    world = DDPM_WORLD

    @jax.jit
    def run(batch, student, critic, teacher):
        context = world.context(term, batch, student, critic, teacher)
        x_tau, tau, _ = TDM().renoised(context.with_term_stream("tdm"))
        raw = context.normal("perturbation")
        d = term.step * raw / jnp.sqrt((raw**2).sum((1, 2, 3), keepdims=True))

        def guided(x):
            return world.denoiser.guided(teacher, x, tau, batch.cond, batch.null, GUIDANCE).x0

        def fake(x):
            return world.denoiser(critic, x, tau, batch.cond).x0

        def student_x0(x):
            return world.denoiser(student, x, tau, batch.cond).x0

        value = context.student[0].x0
        parts = {
            "real": guided(x_tau + d) - guided(x_tau),
            "fake": fake(x_tau + d) - fake(x_tau),
            "script": student_x0(x_tau + d) - value,
            "same point": student_x0(x_tau + d) - student_x0(x_tau),
            "exact": jax.jvp(student_x0, (x_tau,), (d,))[1],
            "d": d,
        }
        return term(context)[0], parts, tau

    return jax.device_get(
        run(
            make_batch(samples),
            world.student_params(bend=bend),
            mixture_params(3),
            mixture_params(0),
        )
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_scripts_formula(weighted):
    term = GADScript(step=0.1, huber=0.02, weighted=weighted)
    loss_B, parts, tau = differences(term)
    lengths = np.linalg.norm(flat(parts["d"]), axis=1)
    np.testing.assert_allclose(lengths, 0.1, rtol=1e-5)
    real, fake, ds = (flat(parts[name]) / 0.1 for name in ("real", "fake", "script"))
    # ds - sg[ds + dT - dF]
    error = fake - real
    scale = np.abs(ds - real).mean(1) + 1e-8
    expected = (np.sqrt(error**2 + 0.02**2) - 0.02).mean(1) / scale
    if weighted:
        expected *= 0.1 + 0.9 * (tau / 899) ** 2
    np.testing.assert_allclose(loss_B, expected, rtol=5e-3, atol=1e-6)


def cosines(a, b):
    a, b = flat(a), flat(b)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_its_student_difference_is_no_derivative():
    """It compares two inputs and two times; the same point's difference is the derivative."""
    _, parts, _ = differences(GADScript(), samples=1024)
    script = cosines(parts["script"], parts["exact"])
    print("cosine", script.mean(), "same point", cosines(parts["same point"], parts["exact"]).min())
    assert abs(script.mean()) < 4 * script.std() / len(script) ** 0.5 < 0.1
    # What float32 leaves of a difference of 1e-2.
    assert cosines(parts["same point"], parts["exact"]).mean() > 0.999
    size = np.linalg.norm(flat(parts["script"]), axis=1)
    assert np.median(size / np.linalg.norm(flat(parts["exact"]), axis=1)) > 100


def test_gradient_reaches_both_of_the_students_values_with_opposite_signs():
    """A shift of S by a constant has no effect on the loss."""
    world, term = DDPM_WORLD, GADScript()

    @jax.jit
    def slopes(student, critic, teacher, batch):
        def loss(student):
            return term(world.context(term, batch, student, critic, teacher))[0].mean()

        return jax.grad(loss)(student)

    # Linear, without a matrix: what is left of S is its bias, at x_k and at x_tau + d alike, and
    # tau lies nearer to the next step's time for some samples, whose values are two steps' then.
    with jax.enable_x64(True):
        student = jax.tree.map(jnp.zeros_like, world.student_params(dtype=float))
        networks = gaussian_params(3, dtype=float), gaussian_params(0, dtype=float)
        slope = jax.device_get(slopes(student, *networks, make_batch(B, dtype=float)))
    biases = np.stack([step["bias"] for step in slope.values()])
    assert np.abs(biases).max() > 1e-3
    np.testing.assert_allclose(biases.sum(0), 0, atol=1e-5 * np.abs(biases).max())


def test_the_gradient_is_the_difference_of_critic_and_teacher():
    """d L / d S(x_tau + d) = H'(dF - dT) / scale, and the opposite for S(x_k): checked for the
    latter, on a student with a constant output."""
    world, term, batch = DDPM_WORLD, GADScript(step=0.1, huber=0.02), make_batch(B)
    student = jax.tree.map(jnp.zeros_like, world.student_params())
    critic, teacher = gaussian_params(3), gaussian_params(0)

    @jax.jit
    def run(student):
        context = world.context(term, batch, student, critic, teacher)
        x_tau, tau, _ = TDM().renoised(context.with_term_stream("tdm"))
        raw = context.normal("perturbation")
        d = 0.1 * raw / jnp.sqrt((raw**2).sum((1, 2, 3), keepdims=True))

        def difference(predict):
            return (predict(x_tau + d, tau).x0 - predict(x_tau, tau).x0) / 0.1

        def loss(x0):
            pred = Prediction(x0, context.student[0].eps)
            return term(replace(context, student=(pred, None)))[0].sum()

        value = context.student[0].x0
        return jax.grad(loss)(value), difference(context.critic) - difference(context.teacher)

    gradient, error = (flat(v) for v in jax.device_get(run(student)))
    direction = error / np.sqrt(error**2 + 0.02**2)
    # The scale, mean |ds - dT| / h, is a number of its own for each sample.
    scale = -gradient / direction
    assert np.all(scale > 0)
    clear = np.abs(error) > 1e-2
    for sample, row in zip(scale, clear, strict=True):
        assert not row.any() or np.ptp(sample[row]) < 1e-2 * sample[row].mean()


def test_it_shares_x_tau_with_tdm():
    """One draw for both losses, as in the script: the networks are evaluated there once."""
    world, batch, total = DDPM_WORLD, make_batch(B), TDM() + GADScript()
    asked = []

    def losses(student, critic, teacher):
        context = world.context(total, batch, student, critic, teacher)

        def telling(x, t):
            asked.append((x, t))
            return context.critic(x, t)

        return total(replace(context, critic=telling))[0], list(asked)

    networks = world.student_params(bend=0.3), mixture_params(3), mixture_params(0)
    _, parts = jax.device_get(jax.jit(losses)(*networks))
    (x, t), (moved, t_too), (same, t_three) = parts
    np.testing.assert_array_equal(t, t_too)
    np.testing.assert_array_equal(t, t_three)
    np.testing.assert_allclose(x, same, rtol=1e-6, atol=1e-6)
    lengths = np.linalg.norm(flat(moved - x), axis=1)
    np.testing.assert_allclose(lengths, GADScript().step, rtol=1e-3)
