"""Closed-form worlds, in which every network is a formula: 8-dimensional x0 as [B, 2, 2, 2].

One `apply` has all roles; the names of the parameters select the formula:
  gaussian   x0 ~ N(mean + text, basis diag(variance) basis^T): the exact posterior mean;
  mixture    x0 ~ sum_k softmax(logits)_k N(means_k + text, variances_k I): likewise;
  student    x0 = A_k x + bend_k tanh(A_k x) + bias_k + text at step k of its grid, with separate
             parameters for each k, so that the gradients of the steps can be distinguished.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gadjax.analytic import teachers
from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.parameterization import from_prediction
from gadjax.diffusion.schedules import DDPM, Flow
from gadjax.training.backward_simulation import stratified_step_indices
from gadjax.training.context import Roles, make_context
from gadjax.training.state import StepSpec
from gadjax.types import Batch, Cond, Prediction

SHAPE, D = (2, 2, 2), 8
GUIDANCE = 1.7


@dataclass(frozen=True)
class World:
    """Closed-form world: a schedule, the networks' parameterization, and the student's grid."""

    schedule: object
    kind: str
    times: tuple[float, ...]
    denoiser: Denoiser = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "denoiser", Denoiser(self.apply, self.schedule, self.kind))

    def apply(self, params, x_BHWC, t_B, cond):
        x = x_BHWC.reshape(-1, D)
        text = cond.text[:, 0].astype(x.dtype)
        alpha, sigma = (v[:, None] for v in self.schedule.alpha_sigma(t_B))
        if "basis" in params:
            pred = gaussian(params, x, alpha, sigma, text)
        elif "logits" in params:
            pred = mixture(params, x, alpha, sigma, text)
        else:
            pred = self.student(params, x, t_B, alpha, sigma, text)
        return from_prediction(self.kind, pred, alpha, sigma).reshape(x_BHWC.shape)

    def student(self, params, x, t_B, alpha, sigma, text):
        starts = jnp.asarray(self.times[:-1], t_B.dtype)
        step_B = jnp.argmin(jnp.abs(starts - t_B[:, None]), axis=1)
        steps = [params[f"step{k}"] for k in range(len(starts))]
        drawn = jax.tree.map(lambda *leaves: jnp.stack(leaves)[step_B], *steps)
        moved = jnp.einsum("bij,bj->bi", drawn["matrix"], x)
        x0 = moved + drawn["bend"] * jnp.tanh(moved) + drawn["bias"] + text
        return Prediction(x0, (x - alpha * x0) / sigma)

    def student_params(self, seed=1, bend=0.0, scale=0.3, dtype=jnp.float32):
        rng = np.random.default_rng(seed)
        return {
            f"step{k}": {
                "matrix": jnp.asarray(scale * rng.normal(size=(D, D)), dtype),
                "bias": jnp.asarray(scale * rng.normal(size=D), dtype),
                "bend": jnp.asarray(bend * rng.uniform(0.5, 1.5, size=D), dtype),
            }
            for k in range(len(self.times) - 1)
        }

    def step_spec(self, objective, **more) -> StepSpec:
        given = dict(guidance=GUIDANCE, optimizers={}, ema=0.999) | more
        return StepSpec(denoiser=self.denoiser, objective=objective, times=self.times, **given)

    def context(self, term, batch, student=None, critic=None, teacher=None, **more):
        """Context of an update for one term."""
        step_spec, needs = self.step_spec(term, **more), term.needs
        context = make_context(step_spec, needs, Roles(student, teacher, critic), batch)
        return with_memory(term, context)

    def losses(self, term, **more):
        """Jitted (batch, student, critic, teacher) -> (loss_B, metrics)."""
        return jax.jit(lambda *given: term(self.context(term, *given, **more)))


def with_memory(term, context):
    """The context as a sum gives it to the term at step 0."""
    return replace(context, memory=term.init_memory() if hasattr(term, "init_memory") else None)


DDPM_WORLD = World(DDPM(), "eps", (899.0, 674.0, 449.0, 224.0, -1.0))
FLOW_WORLD = World(Flow(), "flow", (1000.0, 900.0, 750.0, 500.0, 0.0))
WORLDS = {"ddpm": DDPM_WORLD, "flow": FLOW_WORLD}
all_worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
# For formulas of which one world shows nearly all: the other one is slow.
flow_first = pytest.mark.parametrize(
    "world", [FLOW_WORLD, pytest.param(DDPM_WORLD, marks=pytest.mark.slow)], ids=["flow", "ddpm"]
)


def one_step(world: World) -> World:
    return World(world.schedule, world.kind, (world.times[0], world.times[-1]))


def gaussian(params, x, alpha, sigma, text):
    return teachers.gaussian(
        params["mean"] + text, params["basis"], params["variance"], x, alpha, sigma
    )


def mixture(params, x, alpha, sigma, text):
    means = params["means"] + text[:, None]
    return teachers.mixture(means, params["variances"], params["logits"], x, alpha, sigma)


def gaussian_params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    params = {"mean": rng.normal(size=D), "basis": basis, "variance": np.geomspace(0.05, 2, D)}
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), params)


def mixture_params(seed=0, components=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    params = {
        "means": rng.normal(size=(components, D)),
        "variances": rng.uniform(0.1, 0.6, components),
        "logits": rng.normal(size=components),
    }
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), params)


def make_batch(samples, seed=0, dtype=jnp.float32, text_scale=0.5) -> Batch:
    rng = np.random.default_rng(seed)

    def cond(text):
        return Cond(jnp.asarray(text, dtype), jnp.ones((samples, 1), dtype))

    return Batch(
        cond=cond(text_scale * rng.normal(size=(samples, 1, D))),
        null=cond(text_scale * rng.normal(size=(samples, 1, D))),
        noise=jnp.asarray(rng.normal(size=(samples, *SHAPE)), dtype),
        key=jax.random.split(jax.random.key(seed), samples),
        stratum=jnp.arange(samples, dtype=jnp.int32),
    )


def flat(x):
    """[B, ...] as [B, N] in float64."""
    return np.asarray(x, float).reshape(len(x), -1)


def central(f, x, v, h=1e-5):
    """Derivative of f at x along v by central differences."""
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


def later_steps(samples, steps=4):
    """Weights of samples whose drawn step is not the first, with the mean of all."""
    later = stratified_step_indices(np.arange(samples), steps) > 0
    return np.where(later, steps / (steps - 1), 0)


def law(matrix, bias=0.0, floor=0.0):
    """Parameters of the gaussian of x0 = A z + bias, z standard normal."""
    variance, basis = jnp.linalg.eigh(matrix @ matrix.T)
    mean = jnp.broadcast_to(jnp.float32(bias), (D,))
    return {"mean": mean, "basis": basis, "variance": jnp.maximum(variance, floor)}


def loss_of_x0(term, context):
    """The term's summed loss as a function of the student's x0 alone."""

    def loss(x0):
        prediction = Prediction(x0, context.student[0].eps)
        return term(replace(context, student=(prediction, None)))[0].sum()

    return loss


def guided_text(batch: Batch, guidance=GUIDANCE):
    """Shift [B, D] of a gaussian's mean by its guided text; a guided gaussian is a gaussian."""
    text, negative = (np.asarray(c.text[:, 0], np.float64) for c in (batch.cond, batch.null))
    return negative + guidance * (text - negative)


def gaussian_map(params, schedule, x, start_B, end_B, text):
    """End of the gaussian's probability-flow ODE from x [B, D], and its Jacobians [B, D, D]."""
    mean, basis, variance = (np.asarray(params[k], float) for k in ("mean", "basis", "variance"))
    start, end = (
        tuple(v[:, None] for v in schedule.alpha_sigma(np.asarray(t, float)))
        for t in (start_B, end_B)
    )
    return teachers.gaussian_map(mean + text, basis, variance, np.asarray(x, float), start, end)


def gaussian_walk(params, schedule, times, text):
    """The same map in the DDIM steps between times [n + 1, B]: (x -> J x + shift) as (J, shift)."""
    mean, basis, variance = (np.asarray(params[k], float) for k in ("mean", "basis", "variance"))
    alpha, sigma = schedule.alpha_sigma(np.asarray(times, float))
    mean = mean + text
    jacobian = np.broadcast_to(np.eye(D), (alpha.shape[1], D, D))
    shift = np.zeros((alpha.shape[1], D))
    for (a, s), (b, r) in zip(
        zip(alpha[:-1], sigma[:-1], strict=True),
        zip(alpha[1:], sigma[1:], strict=True),
        strict=True,
    ):
        a, s, b, r = (v[:, None] for v in (a, s, b, r))
        spread = a**2 * variance + s**2
        gain = np.einsum("ij,bj,kj->bik", basis, (b * a * variance + r * s) / spread, basis)
        jacobian = gain @ jacobian
        shift = np.einsum("bij,bj->bi", gain, shift - a * mean) + b * mean
    return jacobian, shift


def perfect_student(world, teacher, steps):
    """Parameters of a student whose steps are a gaussian teacher's maps in `steps` DDIM steps."""
    alpha, sigma = world.schedule.alpha_sigma(np.array(world.times))
    params = {}
    for k in range(len(world.times) - 1):
        times = np.linspace(world.times[k], world.times[k + 1], steps + 1)[:, None]
        jacobian, shift = (v[0] for v in gaussian_walk(teacher, world.schedule, times, 0))
        a = sigma[k + 1] / sigma[k]
        reach = alpha[k + 1] - a * alpha[k]
        params[f"step{k}"] = {
            "matrix": jnp.float32((jacobian - a * np.eye(D)) / reach),
            "bias": jnp.float32(shift / reach),
            "bend": jnp.zeros(D),
        }
    return params


def exact_map(predict, schedule, x_BHWC, start: int, end: int):
    """The probability-flow ODE of any predictor by Runge-Kutta, one time unit a step; use float64.

    Within a unit both schedules are linear in t, so that dx/dt = alpha' x0 + sigma' eps has
    constant alpha', sigma' there.
    """
    knots = jnp.arange(start, end - 1, -1, dtype=x_BHWC.dtype)
    alpha, sigma = schedule.alpha_sigma(knots)

    def step(x, now):
        t, da, ds = now

        def slope(x, t):
            pred = predict(x, t)
            return da * pred.x0 + ds * pred.eps

        k1 = slope(x, t)
        k2 = slope(x + k1 / 2, t - 0.5)
        k3 = slope(x + k2 / 2, t - 0.5)
        k4 = slope(x + k3, t - 1)
        return x + (k1 + 2 * k2 + 2 * k3 + k4) / 6, None

    return jax.lax.scan(step, x_BHWC, (knots[:-1], jnp.diff(alpha), jnp.diff(sigma)))[0]


def sgd(rate=0.1, critic=None):
    """Optimizers for tests: plain steps, so that an update is the gradient."""
    roles = {"student": optax.sgd(rate)}
    return roles if critic is None else roles | {"critic": optax.sgd(critic)}
