"""Geometry-aware distillation: the student's noise tangents are the teacher's."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.objectives.base import Context, Needs, TeacherMap, sample_mean
from gadjax.objectives.compose import Addable
from gadjax.objectives.matching import sg
from gadjax.schedules import expand


@dataclass(frozen=True)
class GAD(Addable):
    """E |J_S(x_k) v - J_T(x_k) v|^2 / |J_T(x_k) v|^2, v ~ N(0, I) (arXiv 2606.01651).

    S is the student's step k as a map of its own latent x_k at its own time t_k: to the next
    latent (end="next") or to x0 (end="clean"). T is the teacher's guided multi-step ODE over the
    same interval, in `steps` DDIM/Euler steps. Both tangents are exact (jax.jvp), taken at the
    same x_k; the teacher's is stop-gradiented, and so is the norm that makes the loss relative.
    normalize=False leaves the plain mean square.
    Cost: the student's value is the base's own; its tangent adds 1 evaluation, the teacher's map
    2 * 2 * steps (guidance, tangent).
    """

    end: str = "next"
    steps: int = 4
    direction: str = "gaussian"
    normalize: bool = True

    @property
    def needs(self) -> Needs:
        maps = {TeacherMap(self.end, self.steps): True}
        return Needs(student=True, tangent=self.direction, maps=maps)

    def __call__(self, context: Context):
        _, wanted = context.maps[TeacherMap(self.end, self.steps)]
        wanted = sg(wanted)
        found = student_map(context, self.end, tangent=True)
        square_B = sample_mean((found - wanted) ** 2)
        size_B = sample_mean(wanted**2)
        loss_B = square_B / size_B if self.normalize else square_B
        inner = sample_mean(sg(found) * wanted)
        cosine_B = inner / jnp.sqrt(size_B * sample_mean(sg(found) ** 2))
        ratio_B = jnp.sqrt(sample_mean(sg(found) ** 2) / size_B)
        return loss_B, {"cosine": jnp.mean(cosine_B), "norm_ratio": jnp.mean(ratio_B)}


def student_map(context: Context, end: str, tangent: bool = False):
    """The student's drawn step as a map of x_k, or that map's tangent: linear in (x0, eps)."""
    value, dot = context.student
    said = dot if tangent else value
    if end == "clean":
        return said.x0
    alpha, sigma = context.schedule.alpha_sigma(context.next_B)
    return expand(alpha, said.x0) * said.x0 + expand(sigma, said.eps) * said.eps
