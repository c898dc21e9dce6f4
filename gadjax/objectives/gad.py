"""Geometry-aware distillation (GAD): match the Jacobian-vector products of student and teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.geometry import Directions
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, TeacherMap, sample_mean
from gadjax.objectives.common import check_count, sg, student_tangents, tangent_samples
from gadjax.objectives.compose import Addable


@dataclass(frozen=True)
class GAD(Addable):
    """2 (1 - cos) + log(|J_S(x_k) v| / |J_T(x_k) v|)^2, cos between J_S(x_k) v and J_T(x_k) v.

    S is the student's step k as a map of its own latent x_k at its own time t_k: to the next
    latent (end="next") or to x0 (end="clean"). T is the teacher's guided multi-step ODE over the
    same interval, in `steps` DDIM/Euler steps (0: as `TeacherMap`). With end="whole" both are maps
    of the initial noise to x0 and S is all the student's steps, differentiated through. Both
    tangents are exact (jax.jvp), taken at the same point; the teacher's is stop-gradiented.
    loss: "polar" as above; or "square", the paper's (arXiv 2606.01651):
      E |J_S(x_k) v - J_T(x_k) v|^2 / |J_T(x_k) v|^2, or the plain mean square with
      normalize=False. Both are the same to second order where the tangents meet. Where the
      student can meet the teacher's only at a cosine c, the square is least at a norm of c times
      the teacher's: what cannot be matched is flattened.
    direction, directions: kind and number J of the v (gadjax.diffusion.geometry.Directions); the
      loss is the mean over them.
    A student with fresh noise after its steps (student.rollout) has no next latent; with "whole"
      its tangent is that with respect to the initial noise, the later noises held.
    step_weights: one weight for each step of the student's grid, () for 1 everywhere. Not with
      "whole".
    one_in: k, of every k neighbouring samples one, drawn at random, has tangents, and k times the
      weight: the same gradient in expectation. k has to divide a device's share of a microbatch.
    Cost: the student's value is the base's; J tangents add J evaluations, and the teacher's map
    2 steps (1 + J) (guidance); end="whole" adds the student's n (1 + J). All but the
    student's value over one_in.
    """

    end: str = "next"
    steps: int = 0
    direction: str = "gaussian"
    directions: int = 1
    normalize: bool = True
    loss: str = "polar"
    step_weights: tuple[float, ...] = ()
    one_in: int = 1

    at_first_step = True  # a tangent at z contradicts no anchor there

    def __post_init__(self):
        check_count("gad", "one_in", self.one_in, 1)
        if self.loss not in ("square", "polar"):
            raise InputError(f"objective.gad.loss: found {self.loss!r}; expected square or polar")
        if self.loss == "polar" and not self.normalize:
            raise InputError(
                "objective.gad.normalize: found False with the polar loss, which is relative; "
                "expected loss='square' with it"
            )

    @property
    def needs(self) -> Needs:
        full_map = self.end == "whole"
        return Needs(
            student=not full_map,
            next_latent=self.end == "next",
            full_map=full_map,
            tangent=Directions(self.direction, self.directions, self.one_in),
            map_tangents=(TeacherMap(self.end, self.steps),),
        )

    def check(self, times: Sequence[float]) -> None:
        expected = (0,) if self.end == "whole" else (0, len(times))
        if len(self.step_weights) not in expected:
            raise InputError(
                f"objective.gad.step_weights: found {len(self.step_weights)} of them; expected "
                + " or ".join(map(str, expected))
            )

    def __call__(self, context: Context):
        teacher = sg(context.maps[TeacherMap(self.end, self.steps)][1])
        student = (
            context.full_map[1] if self.end == "whole" else student_tangents(context, self.end)
        )
        mean = jax.vmap(sample_mean)
        teacher_JN, student_JN = mean(teacher**2), mean(student**2)
        cosine_JN = mean(student * teacher) * jax.lax.rsqrt(teacher_JN * student_JN)
        if self.loss == "polar":
            loss_JN = 2 * (1 - cosine_JN) + (0.5 * jnp.log(student_JN / teacher_JN)) ** 2
        else:
            loss_JN = mean((student - teacher) ** 2) / (teacher_JN if self.normalize else 1)
        loss_N, blocks = jnp.mean(loss_JN, axis=0), context.blocks
        if self.step_weights:
            step_N = tangent_samples(context).step_B
            loss_N = loss_N * jnp.asarray(self.step_weights, jnp.float32)[step_N]
        loss_B = blocks.spread(loss_N) if blocks else loss_N
        ratio = jnp.sqrt(student_JN / teacher_JN)
        return loss_B, {"cosine": jnp.mean(sg(cosine_JN)), "norm_ratio": jnp.mean(sg(ratio))}
