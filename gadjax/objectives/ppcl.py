"""PPCL: features of a student of fewer layers, matched to those of the layers it stands for."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import uniform_timesteps

FLOOR = 1e-12  # below a token's squared norm


@dataclass(frozen=True)
class PPCL(Addable):
    """sum_j E_tokens |u(h_j) - sg u(h'_j)|^2, u(h) = h / |h|, over the student's layers j.

    The student has some of the teacher's layers (student.layers), and each stands for itself and
    for those that were removed behind it: h_j are its tokens after its layer j, h'_j the teacher's
    after the last layer before the student's next one (arXiv 2511.16156, distillation in depth).
    Tokens are compared in direction, as in the code. x_t is the data's x0 with noise, t uniform
    over the span; with images=False the student's latent at its drawn step. Neither network is
    guided, and the teacher is stop-gradiented. The term trains no output: it is one beside another,
    `denoising` for a smaller teacher or any of the few-step ones.
    Not here: the code gives each layer of the student the teacher's tokens as input, so that errors
    do not add up and intervals can be put back one by one; here tokens are the student's own. Text
    tokens of two-stream blocks; pruning in width; the search for the layers (linear probes).
    Cost: 1 evaluation of the student up to its last layer, 1 of the teacher.
    """

    images: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(
            images=self.images,
            student=not self.images,
            fewer_layers=True,
            networks={"ppcl/teacher": "teacher"},
        )

    def __call__(self, context: Context):
        batch, x_t, t_B = context.batch, context.x_BHWC, context.t_B
        if self.images:
            t_B = uniform_timesteps(context, 0.0, 1.0)
            x_t = add_noise(context.schedule, batch.x0, context.normal("eps"), t_B)
        ends = last_layers(context.student_layers, context.denoiser.feature_blocks)

        def tokens(params, blocks):
            return context.denoiser.features(params, x_t, t_B, batch.cond, blocks=blocks)

        student = tokens(context.student_params, tuple(range(len(ends))))
        teacher = tokens(context.networks["ppcl/teacher"], ends)
        errors = [
            jnp.mean(jnp.sum((unit(a) - sg(unit(b))) ** 2, axis=-1), axis=-1)
            for a, b in zip(student, teacher, strict=True)
        ]
        return sum(errors), {"last": jnp.mean(errors[-1])}


def last_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Last of the teacher's `count` layers that each of the student's stands for."""
    return (*(layer - 1 for layer in layers[1:]), count - 1)


def unit(tokens_BND: jax.Array):
    """Tokens divided by their norms, in at least float32."""
    wide = tokens_BND.astype(jnp.promote_types(tokens_BND.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + FLOOR)
