"""Loss of the released GAD script, in float32, for comparison only."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_huber, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.tdm import TDM
from gadjax.types import expand


@dataclass(frozen=True)
class GADScript(Addable):
    """Finite differences as the public train_gad_distillation.py takes them (commit 237bf7e).

    d = h n / |n| perturbs x_tau, which is shared with a `tdm` in the same sum, as in the script (if
    that has the default floor and gap). dT_w and dF are same-point differences over
    h. The student's, ds = (S(x_tau + d, tau) - S(x_k, t_k)) / h, is not: it compares two inputs and
    two times, and that is kept, since this term exists for comparison. The loss is
    mean H(ds - sg[ds + dT_w - dF]) / mean|ds - dT_w|, with gradient through both student values.
    `weighted` is the script's --use_nsp_timestep_weighting. Its fp16 has a resolution coarser than
    d; here everything is float32, and `half` rounds the networks' inputs and outputs to fp16, as
    its autocast does.
    Cost: 4 teacher evaluations, 2 of the critic, 1 of the student with gradient; those at x_tau, 2
    and 1, are the same as TDM's.
    """

    step: float = 1e-2
    huber: float = 1e-3
    weighted: bool = False
    half: bool = False

    needs = Needs(student=True, next_latent=True, critic=True)

    def __post_init__(self):
        if not self.step > 0:
            raise InputError(f"objective.gad_script.step: found {self.step}; expected more than 0")
        check_huber("gad_script", self.huber)

    def __call__(self, context: Context):
        value = context.student[0].x0
        # That of TDM, on which the script builds.
        x_tau, tau_B, _ = TDM().renoised(context.with_term_stream("tdm"))
        raw = context.normal("perturbation")
        length = jnp.sqrt(jnp.sum(raw**2, axis=tuple(range(1, raw.ndim))))
        moved = x_tau + self.step * raw / expand(length, raw)

        if self.half:
            moved, x_tau, value = round_to_fp16(moved), round_to_fp16(x_tau), round_to_fp16(value)

        def x0_at(f, x):
            return round_to_fp16(f(x, tau_B).x0) if self.half else f(x, tau_B).x0

        def difference(f):
            return sg((x0_at(f, moved) - x0_at(f, x_tau)) / self.step)

        real, fake = difference(context.teacher), difference(context.critic)

        def student(x, t):
            return context.denoiser(context.student_params, x, t, context.batch.cond)

        ds = (x0_at(student, moved) - value) / self.step
        error = ds - sg(ds + real - fake)
        scale_B = sg(sample_mean(jnp.abs(ds - real))) + 1e-8
        loss_B = sample_mean(jnp.sqrt(error**2 + self.huber**2) - self.huber) / scale_B
        if self.weighted:
            loss_B = loss_B * (0.1 + 0.9 * (tau_B / context.times[0]) ** 2)
        return loss_B, {}


def round_to_fp16(x):
    """x rounded to fp16; the gradient passes straight through."""
    return x + sg(x.astype(jnp.float16).astype(x.dtype) - x)
