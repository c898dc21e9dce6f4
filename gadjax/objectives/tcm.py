"""Truncated consistency (TCM): consistency training from a transition time on."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.schedules import NoiseSchedule
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.ct import CT, noise_ratio
from gadjax.objectives.time_laws import times_at_ratio
from gadjax.types import expand


@dataclass(frozen=True)
class TCM(CT):
    """The loss of `ct` at u_t >= u' with S_1 for S where u_r < u', and w times it at u_t = u'.

    Stage 2 of truncated consistency models (arXiv 2410.14895). S_1 is a frozen network that is
    consistent already, as `ct` trains it: the student starts there (student.init) and spends its
    capacity on u >= u' alone. u = sigma / alpha, u' = `transition`: the paper's 1 for data of
    standard deviation 1/2. At u_t = u' the target is always S_1's, which holds the student to it;
    otherwise any constant would be consistent. That part takes `share` of the samples, w =
    `boundary`; both parts are means over their samples. log u_t is normal as in `ct`, conditioned
    on u_t >= u'. The target is stop-gradiented; so is S_1.
    stage1: source of S_1. stages, factor: as in `ct`, here at the last of its gaps from the start.
    The student's steps must start at u' or above: below, S_1 would have to draw.
    Not here: the paper's heavy-tailed law of t (Student's t of log t); dropout.
    Cost: 2 evaluations of the student, one with gradient, and 1 of S_1.
    """

    stages: int = 1
    factor: float = 256.0
    transition: float = 2.0
    boundary: float = 0.1
    share: float = 0.25
    stage1: str = "start"

    sources = ("stage1",)

    def __post_init__(self):
        super().__post_init__()
        for name in ("transition", "boundary"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise InputError(f"objective.tcm.{name}: found {value}; expected more than 0")
        if not 0 < self.share < 1:
            raise InputError(
                f"objective.tcm.share: found {self.share}; expected a share between 0 and 1"
            )
        if not self.stage1:
            raise InputError(
                "objective.tcm.stage1: found nothing; expected 'start', a diffusers folder or a "
                "workdir of gadjax train"
            )

    @property
    def needs(self) -> Needs:
        networks = {"tcm/stage1": self.stage1}
        return Needs(images=True, few_step=True, networks=networks)

    def __call__(self, context: Context):
        at_boundary_B = context.uniform("boundary") < self.share
        ratio_B = jnp.where(at_boundary_B, self.transition, self.truncated_ratio(context))
        loss_B, size_B, _ = self.losses_at(context, times_at_ratio(context, ratio_B))
        weight_B = jnp.where(at_boundary_B, self.boundary / self.share, 1 / (1 - self.share))
        held_B = at_boundary_B / self.share
        return weight_B * loss_B, {"error": jnp.mean(size_B), "boundary": jnp.mean(held_B * size_B)}

    def truncated_ratio(self, context: Context):
        """u_t [B] by the log-normal law, conditioned on u_t >= u'."""
        below = jax.scipy.stats.norm.cdf((jnp.log(self.transition) - self.mean) / self.std)
        share_B = below + (1 - below) * context.uniform("angle")
        return jnp.exp(self.mean + self.std * jax.scipy.special.ndtri(share_B))

    def target(self, context: Context, x_r, r_B):
        """x0 of S_1 at x_r where u_r < u', and of the student elsewhere."""
        student, frozen = super().target(context, x_r, r_B), context.net("tcm/stage1", x_r, r_B).x0
        is_below_B = noise_ratio(context.schedule, r_B) < self.transition
        return jnp.where(expand(is_below_B, student), frozen, student)

    def check_grid(self, schedule: NoiseSchedule, times: Sequence[float]) -> None:
        """Check that the student draws at u' or above. Raises: InputError."""
        alpha, sigma = map(float, schedule.alpha_sigma(np.float64(times[-1])))
        if sigma < self.transition * alpha:
            raise InputError(
                f"objective.tcm.transition: found {self.transition} and a step of the student from "
                f"sigma / alpha = {sigma / alpha:.3g}; expected no step from below the transition"
            )
