"""Distillation in seconds where every answer is known: a formula for a teacher, an MLP to train."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gadjax.analytic.result import Reference, Result, compare_maps
from gadjax.analytic.teachers import Gaussian, Mixture, jacobians
from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.parameterization import from_prediction
from gadjax.diffusion.rollout import rollout
from gadjax.diffusion.schedules import DDPM, Flow, NoiseSchedule
from gadjax.errors import InputError, RunStopped
from gadjax.objectives import Sum, Term
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.training.state import StepSpec, create_state
from gadjax.training.steps import CRITICS, critic_step, student_step
from gadjax.types import Batch, Cond, Params, Prediction

FAMILIES = {"flow": (Flow(), "flow"), "ddpm": (DDPM(), "eps")}
SAMPLES = 4096  # over which the metrics are taken; those that need the exact ODE over
FOLLOWED = 2048  # / D samples, but at least 64
WAVES = 4  # frequencies of the time that the MLP sees


@dataclass(frozen=True, eq=False)
class Bench:
    """One teacher in one family, and a student of `steps` steps, even in time.

    family: "flow" (a velocity on the straight-line schedule) or "ddpm" (eps on DDPM's).
    Student and critic are the teacher's formula plus a small MLP r that starts near zero, so that
    they start as the teacher, as they do where its weights are copied:
    x0 = E[x0 | x_t] + sigma s r / sqrt(alpha^2 s^2 + sigma^2), s being the data's scale. With this
    factor (Karras et al. 2022) the error is bounded in x0, eps and velocity at all times.
    width: of the MLP's two hidden layers. batch, lr (of the student; twice that of the critic),
      critic_updates for each of the student's: of the training.
    """

    teacher: Gaussian | Mixture
    family: str = "flow"
    steps: int = 1
    width: int = 64
    batch: int = 256
    lr: float = 5e-3
    critic_updates: int = 2

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise InputError(
                f"bench: found family {self.family!r}; expected {' or '.join(FAMILIES)}"
            )
        if self.steps < 1:
            raise InputError(f"bench: found {self.steps} steps; expected 1 or more")

    @property
    def schedule(self) -> NoiseSchedule:
        return FAMILIES[self.family][0]

    @property
    def times(self) -> tuple[float, ...]:
        """The student's grid, from the last time of the schedule to its clean one."""
        grid = np.linspace(self.schedule.last, self.schedule.clean, self.steps + 1)
        return tuple(float(t) for t in np.round(grid))

    @property
    def dim(self) -> int:
        return self.teacher.dim

    @property
    def scale(self) -> float:
        """Root mean square of the data's elements."""
        return float(
            np.sqrt((self.teacher.total_variance + np.sum(self.teacher.mean**2)) / self.dim)
        )

    @cached_property
    def denoiser(self) -> Denoiser:
        return Denoiser(self.apply, *FAMILIES[self.family], self.features)

    def said(self, params: Params, x_BHWC, t_B) -> Prediction:
        """The teacher's formula [B, D], and where there are parameters the MLP on top."""
        x = x_BHWC.reshape(-1, self.dim)
        alpha, sigma = (v[:, None] for v in self.schedule.alpha_sigma(t_B))
        said = self.teacher.posterior(x, alpha, sigma)
        if not params:
            return said
        unit = jax.lax.rsqrt((alpha * self.scale) ** 2 + sigma**2)
        r = self.scale * unit * mlp(params, x * unit, jnp.arctan2(sigma, alpha))
        return Prediction(said.x0 + sigma * r, said.eps - alpha * r)

    def apply(self, params: Params, x_BHWC, t_B, cond: Cond):
        """Teacher (no parameters), student and critic as a network's raw output."""
        alpha, sigma = (v[:, None] for v in self.schedule.alpha_sigma(t_B))
        said = self.said(params, x_BHWC, t_B)
        return from_prediction(FAMILIES[self.family][1], said, alpha, sigma).reshape(x_BHWC.shape)

    def features(self, params: Params, x_BHWC, t_B, cond: Cond):
        """[B, 1, 2 D] for a discriminator: x0 and eps, as there is no network to look into."""
        return jnp.concatenate(self.said(params, x_BHWC, t_B), axis=1)[:, None]

    def init(self, key) -> Params:
        """A random MLP with a small output."""
        given = self.dim + 2 * WAVES + 1
        sizes = (given, self.width), (self.width, self.width), (self.width + given, self.dim)
        keys = jax.random.split(key, 3)
        gains = (
            3.0,
            1.0,
            0.1,
        )  # of the first: so that modes apart by less than a unit are told apart
        return {
            f"layer{i}": gain / np.sqrt(size[0]) * jax.random.normal(k, size)
            for i, (k, size, gain) in enumerate(zip(keys, sizes, gains, strict=True))
        }

    def linear(self, matrix, offset=0.0) -> Params:
        """The one-step student x0 = matrix z + offset; exact where the teacher's own step is
        linear, as a Gaussian's always is and any flow's from pure noise.

        Raises InputError for a student of more steps.
        """
        if self.steps != 1:
            raise InputError(f"bench: found a student of {self.steps} steps; expected 1")
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(self.times[0]))
        ends = jnp.concatenate([jnp.zeros((1, self.dim)), jnp.eye(self.dim)])  # 0 and the axes
        told = self.denoiser({}, ends.reshape(-1, 1, 1, self.dim), self.times[0], None).x0
        shift, *columns = np.asarray(told, float).reshape(-1, self.dim)
        unit = 1 / np.hypot(alpha * self.scale, sigma)
        gain = sigma * self.scale * unit
        params = dict(self.init(make_key(0)))
        last = np.zeros((self.width + self.dim + 2 * WAVES + 1, self.dim))
        moved = slice(self.width, self.width + self.dim)
        last[moved] = (np.asarray(matrix, float).T - (np.array(columns) - shift)) / (gain * unit)
        last[-1] = (offset - shift) / gain
        return params | {"layer2": jnp.asarray(last, jnp.float32)}

    def cond(self, samples: int) -> Cond:
        """The empty condition."""
        return Cond(jnp.zeros((samples, 1, 1)), jnp.ones((samples, 1)))

    def make_batch(self, key, images: bool) -> Batch:
        """One update's noises and keys, and pictures where they are asked for."""
        places, shape = jnp.arange(self.batch, dtype=jnp.int32), (1, 1, self.dim)
        keys = jax.vmap(partial(jax.random.fold_in, key))(places)
        noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)
        cond, x0 = self.cond(self.batch), None
        if images:
            x0 = self.teacher.sample(jax.random.fold_in(key, self.batch), self.batch)
            x0 = x0.reshape(noise.shape)
        return Batch(cond, cond, noise, keys, places, x0)

    def draw(self, params: Params, z_ND):
        """The student's map from noise to x0."""
        cond, x = self.cond(len(z_ND)), z_ND.reshape(-1, 1, 1, self.dim)
        walk = rollout(
            lambda x, t: self.denoiser(params, x, t, cond), self.schedule, x, jnp.array(self.times)
        )
        return walk.end.reshape(z_ND.shape)

    @cached_property
    def reference(self) -> Reference:
        """The same noises for every student, and where the exact ODE takes them."""
        keys = jax.random.split(make_key(10_000), 2)
        noise = np.asarray(jax.random.normal(keys[0], (SAMPLES, self.dim)))
        few = max(64, FOLLOWED // self.dim)
        ends = (float(v) for v in self.schedule.alpha_sigma(self.times[0]))
        sample = np.asarray(self.teacher.sample(keys[1], SAMPLES), float)
        return Reference(noise, sample, *self.teacher.map(noise[:few], *ends))

    @pinned_jax_config()
    def measure(self, f: Callable, params: Params | None = None) -> Result:
        """Any map (params, z_ND) -> x_ND that takes every noise by itself."""
        reference = self.reference
        few = len(reference.end)
        samples, jacobian = followed(f, few, params, reference.noise)
        return compare_maps(self.teacher, reference, samples, jacobian, params)

    @pinned_jax_config()
    def fit(
        self, objective: Term, updates: int = 500, seed: int = 0, start: Params | None = None
    ) -> Result:
        """Train a student, by the training's own steps, and measure its average.

        start: its first parameters, random ones by default.
        Raises: InputError for an objective that these steps cannot train, RunStopped where updates
        are not finite.
        """
        total = objective if isinstance(objective, Sum) else Sum(((1.0, objective),))
        total.check(self.times[:-1])
        first = make_key(seed)
        start = self.init(first) if start is None else start
        params, bad = train(self, total, updates, start, first)
        if any(int(count) for count in bad.values()):
            spelt = ", ".join(f"{int(count)} of the {role}" for role, count in bad.items())
            raise RunStopped(f"bench: found updates that were not finite ({spelt})")
        return self.measure(self.draw, params)


def mlp(params: Params, x_BD, angle_B1):
    """Two hidden layers; the last one reads the input too. angle: atan2(sigma, alpha)."""
    waves = angle_B1 * 2.0 ** np.arange(WAVES, dtype=np.float32)
    one = jnp.ones_like(angle_B1)  # for the biases
    given = jnp.concatenate([x_BD, jnp.sin(waves), jnp.cos(waves), one], axis=1)
    y = jax.nn.silu(given @ params["layer0"])
    y = jax.nn.silu(y @ params["layer1"])
    return jnp.concatenate([y, given], axis=1) @ params["layer2"]


@partial(jax.jit, static_argnums=(0, 1))
def followed(f: Callable, few: int, params: Params | None, noise_ND):
    """f of all noises, and its Jacobians at the first few."""

    def of(z):
        return f(params, z)

    return of(noise_ND), jacobians(of, noise_ND[:few])[1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def train(bench: Bench, objective: Sum, updates: int, start: Params, key):
    """The student's average, and per role how many updates were left out for not being finite."""
    roles = ["student"] + [role for role in CRITICS if getattr(objective.needs, role)]
    each = bench.critic_updates if len(roles) > 1 else 0
    rate = optax.cosine_decay_schedule(bench.lr, updates, 0.05)
    often = optax.cosine_decay_schedule(2 * bench.lr, updates * max(each, 1), 0.05)
    optimizers = {
        role: optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(rate if role == "student" else often, b1=0.5, b2=0.95),
        )
        for role in roles
    }
    params = {"student": start}
    if "critic" in roles:
        params["critic"] = bench.init(jax.random.fold_in(key, 1))
    if "discriminator" in roles:
        own = jax.random.fold_in(key, 2)
        params["discriminator"] = objective.init_discriminator(own, 2 * bench.dim)
    step_spec = StepSpec(bench.denoiser, objective, bench.times, 1, optimizers, ema=0.98)

    def batch(number):
        return bench.make_batch(
            jax.random.fold_in(jax.random.fold_in(key, 3), number), objective.needs.images
        )

    def critics(state, number):
        state, _ = critic_step(step_spec, state, {}, batch(number))
        return state, state.bad

    def update(state, number):
        first = number * (each + 1)
        if each:
            state, _ = jax.lax.scan(critics, state, first + jnp.arange(each))
        state, _ = student_step(step_spec, state, {}, batch(first + each))
        return state, {role: state.bad[role] > 0 for role in roles}

    state, bad = jax.lax.scan(update, create_state(params, optimizers), jnp.arange(updates))
    return state.ema, {role: jnp.sum(count) for role, count in bad.items()}
