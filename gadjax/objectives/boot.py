"""BOOT: data-free distillation that bootstraps the signal of one noise from time to time."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.types import expand


@dataclass(frozen=True)
class BOOT(Addable):
    """n^2 mean|y(z, s) - sg[T + rho (y(z, t) - T)]|^2 + `boundary` mean|y(z, T_max) - sg T_w(z)|^2.

    (arXiv 2306.05544.) On the teacher's ODE from a noise z let y_t = (x_t - sigma_t z) / alpha_t,
    the signal in x_t: T_w(z) at the first time T_max, x0 at the clean end. The student is asked for
    y(z, t) at any t, always with z alone as its input. T = T_w(x_t) is the guided teacher at x_t =
    alpha_t y(z, t) + sigma_t z, and rho = sigma_s alpha_t / (sigma_t alpha_s), so that the target
    is one DDIM/Euler step from t to s = t - span / n, n = `points`, written in y; t is uniform. All
    of the teacher and y(z, t) are stop-gradiented. No pictures, no critic.
    y(z, t) is read from the network's raw output at (z, T_max + t_1 - t), t_1 the first noised
    time, as if it were one at T_max. In the paper the network is asked at t and predicts y, which
    no sampler of diffusers draws; with its times turned round y(z, t_1) is the plain x0 of one step
    from z, which previews, samplers and exports have. Students of more steps are refused: there is
    no map but from z; and so are teachers that predict eps, whose output would be magnified by
    sigma / alpha at T_max (156 for DDPM) at all t (on the bench such a student did not learn).
    Not here: the paper's weight of time and its beta, which were not at hand (1, `boundary`).
    Cost: 3 evaluations of the student, two with gradient; 4 of the teacher.
    """

    points: int = 50
    boundary: float = 1.0

    needs = Needs(teacher=True)

    def __post_init__(self):
        check_count("boot", "points", self.points, 2)
        if not 0 < self.boundary < float("inf"):
            raise InputError(
                f"objective.boot.boundary: found {self.boundary}; expected more than 0"
            )

    def check(self, times: Sequence[float]) -> None:
        if len(times) != 1:
            raise InputError(
                f"student.steps: found {len(times)}; expected 1 with objective.boot, whose student "
                "maps the initial noise alone"
            )

    def check_denoiser(self, denoiser: Denoiser) -> None:
        if denoiser.parameterization == "eps":
            raise InputError(
                "objective.boot: found a teacher that predicts eps; expected one that predicts a "
                "velocity or x0, from which the signal in pure noise can be read"
            )

    def __call__(self, context: Context):
        z, schedule = context.batch.noise, context.schedule
        first, last = schedule.clean + schedule.spacing, context.times[0]
        width = (last - first) / self.points
        s_B = first + context.uniform("t") * (last - first - width)
        t_B = s_B + width
        last_B = jnp.full_like(t_B, last)

        y_t = sg(signal(context, t_B))
        real = context.teacher(add_noise(schedule, y_t, z, t_B), t_B).x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(schedule.alpha_sigma, (t_B, s_B))
        rho_B = sigma_s * alpha_t / (sigma_t * alpha_s)
        target = sg(real + expand(rho_B, z) * (y_t - real))
        step_B = sample_mean((signal(context, s_B) - target) ** 2)
        start = sg(context.teacher(z, last_B).x0)
        boundary_B = sample_mean((signal(context, last_B) - start) ** 2)
        loss_B = self.points**2 * step_B + self.boundary * boundary_B
        return loss_B, {"step": jnp.mean(step_B), "boundary": jnp.mean(boundary_B)}


def signal(context: Context, t_B) -> jax.Array:
    """y(z, t) of the student [B, H, W, C]; with gradient."""
    z, schedule, denoiser = context.batch.noise, context.schedule, context.denoiser
    first, last = schedule.clean + schedule.spacing, context.times[0]
    raw = denoiser.raw(context.student_params, z, last + first - t_B, context.batch.cond)
    return denoiser.to_prediction(raw, z, jnp.full_like(t_B, last)).x0
