"""Tether: the student stays near its own start, in what it draws."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.errors import check_choice
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import sg, step_end
from gadjax.objectives.compose import Addable


@dataclass(frozen=True)
class Tether(Addable):
    """E |S(x_k) - S_0(x_k)|^2, S_0 the student's frozen start.

    For the repair of a distilled student (`gadjax repair`): what other terms change, this one
    holds. x_k is the latent of the drawn step on the student's own trajectory, without gradient.
    end: "next", the difference of both networks' next latents on the ODE; "clean", of their x0.
    S_0 is stop-gradiented. No paper's; distances to a frozen start are usual in fine-tuning.
    Cost beside the student: 1 evaluation of its start.
    """

    end: str = "next"

    def __post_init__(self):
        check_choice("objective.tether.end", self.end, ("next", "clean"))

    @property
    def needs(self) -> Needs:
        return Needs(student=True, next_latent=self.end == "next", networks={"start": "start"})

    def __call__(self, context: Context):
        start = sg(context.net("start", context.x_BHWC, context.t_B))
        difference = step_end(context, context.student[0], self.end) - step_end(
            context, start, self.end
        )
        loss_B = sample_mean(difference**2)
        return loss_B, {"distance": jnp.mean(jnp.sqrt(loss_B))}
