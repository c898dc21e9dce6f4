"""Latent consistency models (LCM): consistency distillation over a skip of the teacher's grid."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import NoiseSchedule, add_noise
from gadjax.errors import InputError, check_choice
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import (
    TARGETS,
    check_count,
    check_huber,
    sg,
    square_or_huber,
    target_params,
    teacher_step,
)
from gadjax.objectives.compose import Addable
from gadjax.types import expand

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


@dataclass(frozen=True)
class LCM(Addable):
    """mean H(f(x_t) - sg f'(x_r)), f(x) = c_skip x + c_out x0_S(x), x_r one DDIM step of `skip`.

    (arXiv 2310.04378, algorithm 1.) x_t = alpha x0 + sigma eps of the data's x0 and the batch's
    noise; t is uniform over the grid that goes down from the student's first time by `skip` times
    of the schedule (k = 20: from 999 the 50 DDIM steps of the code), r = t - skip, at least the
    first noised time. x_r is one step of the teacher's guided ODE. With s = 10 (t - first noised
    time), c_skip = 0.25 / (s^2 + 0.25) and c_out = s / sqrt(s^2 + 0.25), as in diffusers'
    LCMScheduler: f'(x) = x at the first noised time. f' has the average of the student's parameters
    (`target`: "ema", or "student"). H(e) = sqrt(e^2 + c^2) - c, c = `huber`, or e^2 for 0.
    Teacher and f' are stop-gradiented.
    It is `cd` with another grid, which ends at the first noised time, and f in place of x0. At
    times of a student's steps c_skip is below 7e-6 (t >= 19), so that samplers leave it out: an
    export's LCMScheduler has the timestep_scaling 1e4. Sampled with fresh noise (student.rollout).
    Not here: a range of guidance scales (w = scale - 1 from 2 to 14), whose embedding is an input
    of the network that only SANA-Sprint's has, which is a student already (U-Nets with
    time_cond_proj_dim are not read): the student learns the run's guidance, and a teacher with an
    embedding is refused. LoRA; resolutions drawn at random.
    Cost: 2 evaluations of the student, one with gradient; 2 of the teacher.
    """

    skip: int = 20
    huber: float = 1e-3
    target: str = "ema"

    def __post_init__(self):
        check_choice("objective.lcm.target", self.target, TARGETS)
        check_count("lcm", "skip", self.skip, 1)
        check_huber("lcm", self.huber)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=True, images=True, ema=self.target == "ema")

    def check_denoiser(self, denoiser: Denoiser) -> None:
        if denoiser.guidance_embedded:
            raise InputError(
                "objective.lcm: found a teacher with embedded guidance; expected one with "
                "classifier-free guidance, of which the student learns one scale"
            )

    def __call__(self, context: Context):
        batch, schedule = context.batch, context.schedule
        first, step = schedule.clean + schedule.spacing, self.skip * schedule.spacing
        count = max(math.ceil((context.times[0] - first) / step), 1)
        t_B = context.times[0] - step * jnp.floor(context.uniform("t") * count)
        r_B = jnp.maximum(t_B - step, first)
        x_t = add_noise(schedule, batch.x0, batch.noise, t_B)
        x_r = teacher_step(context, x_t, t_B, r_B)
        target = sg(bounded_x0(context, target_params(context, self), x_r, r_B))
        error = bounded_x0(context, context.student_params, x_t, t_B) - target
        return square_or_huber(error, self.huber), {}


def bounded_x0(context: Context, params, x, t_B):
    """f(x) of LCM: x0 of the network, mixed with x near the clean end."""
    c_skip, c_out = boundary_scalings(context.schedule, t_B)
    x0 = context.denoiser(params, x, t_B, context.batch.cond).x0
    return expand(c_skip, x) * x + expand(c_out, x) * x0


def boundary_scalings(schedule: NoiseSchedule, t_B):
    """c_skip and c_out [B] at times, counted from the first noised one."""
    steps_B = (t_B - schedule.clean) / schedule.spacing - 1
    scaled_B = TIMESTEP_SCALING * steps_B
    square_B = scaled_B**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square_B, scaled_B / jnp.sqrt(square_B)
