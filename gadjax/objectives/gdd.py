"""GDD: a student of the data's distribution alone, from the teacher's weights (innate one-step)."""

from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.objectives.base import Context, Needs
from gadjax.objectives.compose import Addable
from gadjax.objectives.pixel_discriminator import PixelDiscriminatorTerm, check_pixel_options


@dataclass(frozen=True)
class GDD(PixelDiscriminatorTerm, Addable):
    """mean_k softplus(-D_k(pixels(x0))), x0 of the student at its drawn step.

    A GAN without any instance of the teacher's to imitate (arXiv 2405.20750): teacher and one-step
    student reach different minima of any distance, and the teacher's weights are a generator
    already, which a discriminator finds quickly. D_k: `gadjax.objectives.pixel_discriminator`; its
    loss has `r1` / 2 times |d sum_k D_k / d y|^2 at the data's pictures y (the code: 0.01). The
    code sums over k; here is the mean, so that the weight does not depend on D.
    The student has no guidance in it, whatever `guidance` says, and D reads no captions. D's
    gradient to the student passes the autoencoder; in D's loss both are stop-gradiented.
    Not here: GDD-I, whose student keeps most of the teacher's convolutions and projections frozen;
    the code's pretrained feature networks and their random projections under D, augmentation, and
    its distances to a teacher's instances, which the paper finds worse.
    Cost beside the student: the decoder with its reverse pass, and D; two decodings for D. No
    teacher is evaluated or kept.
    """

    width: int = 32
    r1: float = 0.01

    needs = Needs(student=True, discriminator=True, images=True, pixels=True, few_step=True)

    def __post_init__(self):
        check_pixel_options("gdd", self)

    def __call__(self, context: Context):
        logits_KB = self.fake_logits(context)
        return jnp.mean(jnp.logaddexp(0, -logits_KB), axis=0), {"logit": jnp.mean(logits_KB)}
