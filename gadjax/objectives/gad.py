"""Geometry-aware distillation: the student's noise tangents are the teacher's."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.geometry import Directions
from gadjax.objectives.base import Context, Needs, TeacherMap, sample_mean
from gadjax.objectives.compose import Addable
from gadjax.objectives.matching import sg
from gadjax.schedules import expand


@dataclass(frozen=True)
class GAD(Addable):
    """E |J_S(x_k) v - J_T(x_k) v|^2 / |J_T(x_k) v|^2 (arXiv 2606.01651).

    S is the student's step k as a map of its own latent x_k at its own time t_k: to the next
    latent (end="next") or to x0 (end="clean"). T is the teacher's guided multi-step ODE over the
    same interval, in `steps` DDIM/Euler steps. With end="whole" both are maps of the initial noise
    to x0 and S is all the student's steps, differentiated through. Both tangents are exact
    (jax.jvp), taken at the same point; the teacher's is stop-gradiented, and so is the norm that
    makes the loss relative; normalize=False leaves the plain mean square.
    direction, directions: kind and number J of the v (gadjax.geometry.Directions); the mean is
      taken over them.
    step_weights: one weight for each step of the student's grid, () for 1 everywhere. Not with
      "whole".
    Cost: the student's value is the base's own; J tangents add J evaluations, and the teacher's map
    2 steps (1 + J) (guidance); end="whole" adds the student's n (1 + J).
    """

    end: str = "next"
    steps: int = 4
    direction: str = "gaussian"
    directions: int = 1
    normalize: bool = True
    step_weights: tuple[float, ...] = ()

    @property
    def needs(self) -> Needs:
        whole = self.end == "whole"
        return Needs(
            student=not whole,
            whole=whole,
            tangent=Directions(self.direction, self.directions),
            maps={TeacherMap(self.end, self.steps): True},
        )

    def check(self, steps: int) -> None:
        expected = (0,) if self.end == "whole" else (0, steps)
        if len(self.step_weights) not in expected:
            raise InputError(
                f"objective.gad.step_weights: found {len(self.step_weights)} of them; expected "
                + " or ".join(map(str, expected))
            )

    def __call__(self, context: Context):
        wanted = sg(context.maps[TeacherMap(self.end, self.steps)][1])
        found = context.whole[1] if self.end == "whole" else student_tangents(context, self.end)
        mean = jax.vmap(sample_mean)
        square_JB, size_JB = mean((found - wanted) ** 2), mean(wanted**2)
        loss_B = jnp.mean(square_JB / size_JB if self.normalize else square_JB, axis=0)
        if self.step_weights:
            loss_B = loss_B * jnp.asarray(self.step_weights, jnp.float32)[context.step_B]
        found = sg(found)
        cosine = mean(found * wanted) / jnp.sqrt(size_JB * mean(found**2))
        ratio = jnp.sqrt(mean(found**2) / size_JB)
        return loss_B, {"cosine": jnp.mean(cosine), "norm_ratio": jnp.mean(ratio)}


def student_map(context: Context, end: str):
    """The student's drawn step as a map of x_k: linear in what it says."""
    return _landed(context, context.student[0], end)


def student_tangents(context: Context, end: str):
    """The tangents of that map along the context's directions: [J, B, H, W, C]."""
    return jax.vmap(lambda said: _landed(context, said, end))(context.student[1])


def _landed(context: Context, said, end: str):
    if end == "clean":
        return said.x0
    alpha, sigma = context.schedule.alpha_sigma(context.next_B)
    return expand(alpha, said.x0) * said.x0 + expand(sigma, said.eps) * said.eps
