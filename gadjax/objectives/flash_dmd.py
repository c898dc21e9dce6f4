"""Flash-DMD: distribution matching in the first steps, a GAN of pictures in the later ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import check_count
from gadjax.objectives.compose import Addable
from gadjax.objectives.dmd import DMD
from gadjax.objectives.pixel_discriminator import PixelDiscriminatorTerm, check_pixel_options
from gadjax.objectives.time_laws import check_span_fractions


@dataclass(frozen=True)
class FlashDMD(PixelDiscriminatorTerm, Addable):
    """DMD of x0 at the first `early` steps, gan mean_k softplus(-D_k(pixels(x0))) at the others.

    (arXiv 2511.20549, stage 1.) Both losses want other gradients of the same x0: the high-noise
    steps, which decide the layout, have the first alone, the low-noise ones, which decide textures,
    the second. DMD and its stop-gradients as in `dmd`, t uniform between `low` and `high` of the
    span. D looks at pictures, through the frozen autoencoder. Its own loss is softplus(D_k(x)) +
    softplus(-D_k(y)), y pictures of the data, at all steps, with `r1` / 2 times |d D / d y|^2.
    The critic has the denoising loss alone, at all steps; the paper also takes it towards the
    student, with critic.follow (its decay was not at hand; 0.001 in the variant, as in `cdm`).
    Not here: SAM's encoder, on which the paper's D is (D here is trained whole); stage 2, whose
    reward model and preferences no world here has. There is no code; the paper is known to us at
    second hand.
    Cost beside the student: 2 evaluations of the teacher and 1 of the critic, the autoencoder's
    decoder with its reverse pass, and D; two decodings for D. Both losses are computed for all
    samples, as a sample's step is known only when it is drawn.
    """

    early: int = 2
    gan: float = 0.01
    width: int = 32
    r1: float = 0.0
    low: float = 0.02
    high: float = 0.98

    needs = Needs(student=True, critic=True, discriminator=True, images=True, pixels=True)

    def __post_init__(self):
        check_count("flash_dmd", "early", self.early, 1)
        check_pixel_options("flash_dmd", self)
        check_span_fractions("flash_dmd", self.low, self.high)
        if not 0 <= self.gan < float("inf"):
            raise InputError(f"objective.flash_dmd.gan: found {self.gan}; expected 0 or more")

    def check(self, times: Sequence[float]) -> None:
        if self.early >= len(times):
            raise InputError(
                f"objective.flash_dmd.early: found {self.early} of {len(times)} steps; expected "
                "fewer, because the later ones have the discriminator's loss"
            )

    @property
    def matching(self) -> DMD:
        """Distribution matching of the early steps."""
        return DMD(self.low, self.high)

    def __call__(self, context: Context):
        matching_B, metrics = self.matching(context)
        logits_KB = self.fake_logits(context)
        adversarial_B = jnp.mean(jnp.logaddexp(0, -logits_KB), axis=0)
        loss_B = jnp.where(context.step_B < self.early, matching_B, self.gan * adversarial_B)
        return loss_B, metrics | {"logit": jnp.mean(logits_KB)}

    def critic_loss(self, context: Context):
        """Denoising loss per sample [B] on the student's x0, as that of `dmd`."""
        return self.matching.critic_loss(context)
