"""LADD: adversarial distillation by heads on several blocks of the frozen teacher."""

from dataclasses import dataclass
from math import log

import jax
import jax.numpy as jnp

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError, short_repr
from gadjax.objectives.adversarial import LOSSES, Adversarial, logits
from gadjax.objectives.base import Context, Needs, sample_mean
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import check_log_normal, log_normal_times
from gadjax.types import Params

generator_loss, discriminator_losses = LOSSES["hinge"]


@dataclass(frozen=True)
class LADD(Addable):
    """-mean_k D_k(x_t) for the student; 1/2 mean_k [max(0, 1 + D_k(x_t)) + max(0, 1 - D_k(y_t))].

    Latent adversarial diffusion distillation (arXiv 2403.12015) as SANA-Sprint (2503.09641) has it
    beside `consistency`. x_t = alpha x0 + sigma eps of the student's x0 at its drawn step, y_t of a
    picture of the data, with one t, eps and text for both. D_k is a head, that of `adversarial`, on
    the tokens after block k of the frozen teacher, k in `blocks`; one pass has all of them.
    log(sigma / alpha) is normal with `mean` and `std`: the code's -0.6 and 1 are of sigma_d times
    the tangent of TrigFlow's time, sigma_d = 1/2, which adds log 2.
    mismatched: half of the fakes are pictures of the data with the next sample's caption.
    r1: weight of mean_k |dD_k / d tokens|^2 at y_t in D's loss (LADD; an option of the code).
    The student's gradient flows through the teacher's inputs alone, D's stops at the teacher.
    LADD's students start at noised pictures (student.latents = "data"). SANA-Sprint gives half of
    them the last time: of two steps (student.redraw for the other's times) the first is drawn for
    half of the samples.
    Not here: convolutions in the heads and their conditioning; a noise of its own for each picture.
    Cost beside the student: the teacher up to the last block and its reverse pass; twice that for
    D, without a reverse pass, three times with `mismatched`.
    """

    blocks: tuple[int, ...] = (2, 8, 14, 19)
    mean: float = -0.6 + log(2)
    std: float = 1.0
    mismatched: bool = False
    r1: float = 0.0
    hidden: int = 256

    def __post_init__(self):
        numbers = all(type(block) is int and block >= 0 for block in self.blocks)
        if not (numbers and self.blocks and list(self.blocks) == sorted(set(self.blocks))):
            raise InputError(
                f"objective.ladd.blocks: found {short_repr(self.blocks)}; expected rising block "
                "numbers from 0"
            )
        check_log_normal("ladd", self.mean, self.std)
        check_count("ladd", "hidden", self.hidden, 1)
        if not 0 <= self.r1 < float("inf"):
            raise InputError(f"objective.ladd.r1: found {self.r1}; expected 0 or more")

    def check_denoiser(self, denoiser: Denoiser) -> None:
        if not denoiser.feature_blocks:
            raise InputError(
                f"objective.ladd.blocks: found {short_repr(self.blocks)} and a teacher without "
                "features of single blocks; expected a PixArt, SANA or SD3, or 'adversarial'"
            )
        if self.blocks[-1] >= denoiser.feature_blocks:
            raise InputError(
                f"objective.ladd.blocks: found {self.blocks[-1]}; expected numbers below "
                f"{denoiser.feature_blocks}, the teacher's blocks"
            )

    @property
    def needs(self) -> Needs:
        return Needs(
            student=True, teacher=True, discriminator=True, images=True, joint=self.mismatched
        )

    def __call__(self, context: Context):
        fake_KB = self.logits(context, self.tokens(context, context.student[0].x0))
        return jnp.mean(generator_loss(fake_KB), axis=0), {"logit": jnp.mean(fake_KB)}

    def discriminator_loss(self, context: Context):
        """Loss per sample [B] of the heads."""
        pictures = context.batch.x0
        real = sg(self.tokens(context, pictures))
        real_KB = self.logits(context, real)
        fakes = [context.student[0].x0] + [jnp.roll(pictures, 1, 0)] * self.mismatched
        losses = [
            discriminator_losses(self.logits(context, sg(self.tokens(context, x0))), real_KB)
            for x0 in fakes
        ]
        loss_B = 0.5 * jnp.mean(jnp.stack(losses), axis=(0, 1))
        return loss_B + self.r1 * self.penalty(context, real) if self.r1 else loss_B

    def penalty(self, context: Context, tokens):
        """Squared norm [B] of the gradients of the heads' logits in their tokens, over heads."""
        slopes = jax.grad(lambda tokens: jnp.sum(self.logits(context, tokens)))(tokens)
        return sum(slope[0].size * sample_mean(slope**2) for slope in slopes) / len(slopes)

    def tokens(self, context: Context, x0):
        """Tokens [B, N, D] after each block, of x0 with noise added."""
        t_B = log_normal_times(context, self.mean, self.std)
        x_t = add_noise(context.schedule, x0, context.normal("eps"), t_B)
        inputs = context.teacher_params, x_t, t_B, context.batch.cond
        return context.denoiser.features(*inputs, blocks=self.blocks)

    def logits(self, context: Context, tokens):
        """Logits [K, B] of the heads."""
        heads = context.discriminator_params
        pairs = zip(self.blocks, tokens, strict=True)
        return jnp.stack([logits(heads[f"block_{block}"], x) for block, x in pairs])

    def init_discriminator(self, key, width: int) -> Params:
        """Initial parameters of the heads, for features of `width`; their logits start at zero."""
        head = Adversarial("teacher", hidden=self.hidden).init_discriminator
        return {f"block_{k}": head(jax.random.fold_in(key, k), width) for k in self.blocks}
