"""Distillation from a closed-form teacher to an MLP, in seconds, with exact metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.analytic.fit import train
from gadjax.analytic.result import Reference, Result, compare_maps
from gadjax.analytic.teachers import Gaussian, Mixture, jacobians
from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.parameterization import from_prediction
from gadjax.diffusion.rollout import FIRST_ORDER, rollout
from gadjax.diffusion.samplers import fresh_noise
from gadjax.diffusion.schedules import DDPM, Flow, NoiseSchedule
from gadjax.errors import InputError, RunStopped, check_choice
from gadjax.objectives import Needs, Sum, Term
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.types import Batch, Cond, Params, Prediction

FAMILIES = {"flow": (Flow(), "flow"), "ddpm": (DDPM(), "eps")}
SAMPLES = 4096  # of the metrics that need no exact ODE
ODE_SAMPLES = 2048  # / D, but at least 64: of those that do
FREQUENCIES = 4  # of the timestep embedding of the MLP


@dataclass(frozen=True, eq=False)
class Bench:
    """Closed-form teacher, and a student of `steps` steps, even in time.

    Student and critic are the teacher's formula plus a small MLP r that starts near zero, so that
    they start as the teacher, as copies of its weights do:
    x0 = E[x0 | x_t] + sigma s r / sqrt(alpha^2 s^2 + sigma^2), s being the data's scale. With this
    factor (Karras et al. 2022) the error is bounded in x0, eps and velocity at all times.

    teacher: a Gaussian or a mixture.
    family: "flow" (a velocity on the straight-line schedule) or "ddpm" (eps on DDPM's).
    steps: of the student's sampler.
    width: of the MLP's two hidden layers.
    batch: samples of an update.
    lr: learning rate of the student; the critic's is twice that.
    critic_updates: updates of the critic for each of the student's.
    rollout: of the student's steps, "ode" or "fresh_noise".
    redraw, critic_follow: as in `StepSpec`.
    prompts: the teacher's law for each prompt, where it has several; () for a world without any.
      The teacher of `sfd` reads prompt 1 in the place of prompt 0.
    prompt: whose samples are measured, against `teacher`.
    """

    teacher: Gaussian | Mixture
    family: str = "flow"
    steps: int = 1
    width: int = 64
    batch: int = 256
    lr: float = 5e-3
    critic_updates: int = 2
    rollout: str = "ode"
    redraw: tuple[float, ...] = ()
    critic_follow: float = 0.0
    prompts: tuple[Gaussian | Mixture, ...] = ()
    prompt: int = 0

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise InputError(
                f"bench: found family {self.family!r}; expected {' or '.join(FAMILIES)}"
            )
        check_choice("bench.rollout", self.rollout, ("ode", "fresh_noise"))
        if self.steps < 1:
            raise InputError(f"bench: found {self.steps} steps; expected 1 or more")

    @property
    def schedule(self) -> NoiseSchedule:
        return FAMILIES[self.family][0]

    @property
    def times(self) -> tuple[float, ...]:
        """Timesteps of the student, from the last time of the schedule to its clean one."""
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
        return Denoiser(self.apply, *FAMILIES[self.family], self.features, feature_blocks=1)

    def posterior(self, x_BD, alpha_B1, sigma_B1, prompt_B) -> Prediction:
        """Posterior mean of the teacher, by each sample's prompt where there are several.

        Args:
          x_BD: noised samples.
          alpha_B1, sigma_B1: of the noise schedule.
          prompt_B: numbers of the prompts.
        """
        if not self.prompts:
            return self.teacher.posterior(x_BD, alpha_B1, sigma_B1)
        laws = [law.posterior(x_BD, alpha_B1, sigma_B1) for law in self.prompts]
        return jax.tree.map(lambda *of: jnp.stack(of)[prompt_B, jnp.arange(len(x_BD))], *laws)

    def predict(self, params: Params, x_BHWC, t_B, prompt_B=None) -> Prediction:
        """Prediction [B, D] of the teacher's formula, plus the MLP where there are parameters.

        Args:
          params: of the MLP; empty for the teacher.
          x_BHWC: noised samples.
          t_B: timesteps.
          prompt_B: numbers of the prompts, where there are several.
        """
        x = x_BHWC.reshape(-1, self.dim)
        alpha, sigma = (v[:, None] for v in self.schedule.alpha_sigma(t_B))
        prediction = self.posterior(x, alpha, sigma, prompt_B)
        if not params:
            return prediction
        unit = jax.lax.rsqrt((alpha * self.scale) ** 2 + sigma**2)
        inputs = x * unit
        if self.prompts:
            inputs = jnp.concatenate([inputs, jax.nn.one_hot(prompt_B, len(self.prompts))], axis=1)
        r = self.scale * unit * mlp(params, inputs, jnp.arctan2(sigma, alpha))
        return Prediction(prediction.x0 + sigma * r, prediction.eps - alpha * r)

    def apply(self, params: Params, x_BHWC, t_B, cond: Cond):
        """Raw output of teacher (no parameters), student or critic, as a backbone's."""
        alpha, sigma = (v[:, None] for v in self.schedule.alpha_sigma(t_B))
        prediction = self.predict(params, x_BHWC, t_B, prompts_of(cond))
        return from_prediction(FAMILIES[self.family][1], prediction, alpha, sigma).reshape(
            x_BHWC.shape
        )

    def features(self, params: Params, x_BHWC, t_B, cond: Cond, blocks: Sequence[int] = ()):
        """Features [B, 1, 2 D] for a discriminator: x0 and eps, for want of hidden layers; with
        `blocks`, which can be (0,) alone, a tuple of them."""
        features = jnp.concatenate(self.predict(params, x_BHWC, t_B, prompts_of(cond)), axis=1)[
            :, None
        ]
        return (features,) if blocks else features

    def init(self, key) -> Params:
        """Parameters of a random MLP with a small output."""
        inputs = self.dim + len(self.prompts) + 2 * FREQUENCIES + 1
        sizes = (inputs, self.width), (self.width, self.width), (self.width + inputs, self.dim)
        keys = jax.random.split(key, 3)
        gains = (
            3.0,
            1.0,
            0.1,
        )  # of the first: separates modes less than a unit apart
        return {
            f"layer{i}": gain / np.sqrt(size[0]) * jax.random.normal(k, size)
            for i, (k, size, gain) in enumerate(zip(keys, sizes, gains, strict=True))
        }

    def linear(self, matrix, offset=0.0) -> Params:
        """Parameters of the one-step student x0 = matrix z + offset.

        Exact where the teacher's own step is linear, as a Gaussian's always is and any flow's from
        pure noise.
        Raises: InputError for a student of more steps.
        """
        if self.steps != 1:
            raise InputError(f"bench: found a student of {self.steps} steps; expected 1")
        alpha, sigma = (float(v) for v in self.schedule.alpha_sigma(self.times[0]))
        ends = jnp.concatenate([jnp.zeros((1, self.dim)), jnp.eye(self.dim)])  # 0 and the axes
        outputs = self.denoiser({}, ends.reshape(-1, 1, 1, self.dim), self.times[0], None).x0
        shift, *columns = np.asarray(outputs, float).reshape(-1, self.dim)
        unit = 1 / np.hypot(alpha * self.scale, sigma)
        gain = sigma * self.scale * unit
        params = dict(self.init(make_key(0)))
        last = np.zeros((self.width + self.dim + 2 * FREQUENCIES + 1, self.dim))
        x_rows = slice(self.width, self.width + self.dim)
        last[x_rows] = (np.asarray(matrix, float).T - (np.array(columns) - shift)) / (gain * unit)
        last[-1] = (offset - shift) / gain
        return params | {"layer2": jnp.asarray(last, jnp.float32)}

    def cond(self, prompt_B) -> Cond:
        """Conditioning of a batch: the numbers of its prompts, where there are several."""
        return Cond(jnp.asarray(prompt_B, jnp.float32)[:, None, None], jnp.ones((len(prompt_B), 1)))

    def make_batch(self, key, needs: Needs) -> Batch:
        """Noises, keys and prompts of one update; clean samples and prompts in two versions where a
        term needs them."""
        indices, shape = jnp.arange(self.batch, dtype=jnp.int32), (1, 1, self.dim)
        keys = jax.vmap(partial(jax.random.fold_in, key))(indices)
        noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)
        prompt_B = indices % max(1, len(self.prompts))
        cond = self.cond(prompt_B)
        batch = Batch(cond, cond, noise, keys, indices)
        if needs.images:
            sample_key, laws = jax.random.fold_in(key, self.batch), self.prompts or (self.teacher,)
            samples = jnp.stack([law.sample(sample_key, self.batch) for law in laws])
            batch = batch._replace(x0=samples[prompt_B, indices].reshape(noise.shape))
        if needs.override:
            other = self.cond(jnp.where(prompt_B == 0, 1, prompt_B))
            batch = batch._replace(override=other, label=(prompt_B == 0).astype(jnp.int32))
        return batch

    def draw(self, params: Params, z_ND):
        """Map from noise to x0 of a student: its sampler."""
        prompt_N = jnp.full(len(z_ND), self.prompt)
        cond, z = self.cond(prompt_N), z_ND.reshape(-1, 1, 1, self.dim)

        def predict(x, t):
            return self.denoiser(params, x, t, cond)

        solver = fresh_noise(z) if self.rollout == "fresh_noise" else FIRST_ORDER
        trajectory = rollout(predict, self.schedule, z, jnp.array(self.times), solver=solver)
        return trajectory.end.reshape(z_ND.shape)

    @cached_property
    def reference(self) -> Reference:
        """Held-out noises, the same for every student, and the teacher's exact map of them."""
        keys = jax.random.split(make_key(10_000), 2)
        noise = np.asarray(jax.random.normal(keys[0], (SAMPLES, self.dim)))
        few = max(64, ODE_SAMPLES // self.dim)
        ends = (float(v) for v in self.schedule.alpha_sigma(self.times[0]))
        sample = np.asarray(self.teacher.sample(keys[1], SAMPLES), float)
        return Reference(noise, sample, *self.teacher.map(noise[:few], *ends))

    @pinned_jax_config()
    def measure(self, f: Callable, params: Params | None = None) -> Result:
        """Metrics of a map (params, z_ND) -> x_ND that maps every noise independently."""
        reference = self.reference
        few = len(reference.end)
        samples, jacobian = map_and_jacobians(f, few, params, reference.noise)
        return compare_maps(self.teacher, reference, samples, jacobian, params)

    @pinned_jax_config()
    def fit(
        self,
        objective: Term,
        updates: int = 500,
        seed: int = 0,
        start: Params | None = None,
        networks: Mapping[str, Params] | None = None,
    ) -> Result:
        """Train a student with the package's training steps, and measure its EMA.

        Args:
          objective: a term or a sum of terms.
          updates: student updates.
          seed: of the initial parameters, noises and samples.
          start: initial parameters; random ones by default.
          networks: frozen networks that terms may name, beside "start" and "teacher".

        Raises: InputError for an objective that these steps cannot train; RunStopped where updates
          are not finite.
        """
        total = objective if isinstance(objective, Sum) else Sum(((1.0, objective),))
        total.check(self.times[:-1], self.rollout)
        total.check_denoiser(self.denoiser)
        total.check_grid(self.schedule, self.times[:-1])
        needs, networks = total.needs, dict(networks or {})
        known = "start", "teacher", *networks
        if others := set(needs.networks.values()) - set(known):
            raise InputError(
                f"bench: found a term that takes {', '.join(sorted(others))}; expected networks "
                f"among {', '.join(known)}"
            )
        if needs.fewer_layers or needs.override and not self.prompts:
            raise InputError(
                "bench: found a term for prompts of two versions or for a student of fewer layers; "
                "expected another, because the bench has no layers, and here no prompts"
            )
        first = make_key(seed)
        start = self.init(first) if start is None else start
        params, critic, bad = train(self, total, updates, start, first, networks)
        if any(int(count) for count in bad.values()):
            spelt = ", ".join(f"{int(count)} of the {role}" for role, count in bad.items())
            raise RunStopped(f"bench: found updates that were not finite ({spelt})")
        return replace(self.measure(self.draw, params), critic=critic)


def prompts_of(cond: Cond | None):
    """Numbers of the prompts [B] in a conditioning."""
    return None if cond is None else cond.text[:, 0, 0].astype(jnp.int32)


def mlp(params: Params, x_BD, angle_B1):
    """MLP of two hidden layers, with the input concatenated to the last one's.

    Args:
      params: weights by layer.
      x_BD: scaled samples.
      angle_B1: atan2(sigma, alpha), the timestep.
    """
    waves = angle_B1 * 2.0 ** np.arange(FREQUENCIES, dtype=np.float32)
    one = jnp.ones_like(angle_B1)  # for the biases
    inputs = jnp.concatenate([x_BD, jnp.sin(waves), jnp.cos(waves), one], axis=1)
    y = jax.nn.silu(inputs @ params["layer0"])
    y = jax.nn.silu(y @ params["layer1"])
    return jnp.concatenate([y, inputs], axis=1) @ params["layer2"]


@partial(jax.jit, static_argnums=(0, 1))
def map_and_jacobians(f: Callable, few: int, params: Params | None, noise_ND):
    """Samples f(params, noise), and the Jacobians of f at the first `few` noises.

    Args:
      f: (params, z_ND) -> x_ND.
      few: number of Jacobians.
      params: of the student, or None.
      noise_ND: initial noises.
    """

    def apply(z):
        return f(params, z)

    return apply(noise_ND), jacobians(apply, noise_ND[:few])[1]
