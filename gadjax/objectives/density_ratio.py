"""Density ratio r = p_T / p_S from a discriminator, and f-divergences as functions of it."""

from collections.abc import Callable

import jax.numpy as jnp

from gadjax.errors import InputError, check_choice
from gadjax.objectives.adversarial import Adversarial, logits
from gadjax.objectives.base import Context
from gadjax.objectives.common import sg

# Divergence E_S f(r) -> h(r) = r^2 f''(r), its weight in the gradient of the samples, without
# constant factors.
DIVERGENCES: dict[str, Callable] = {
    "rkl": jnp.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "hellinger": jnp.sqrt,
    "jeffreys": lambda r: 1 + r,
}
MAX_LOGIT, RATIO_RANGE = 10.0, (0.1, 20.0)  # of f-distill's code


def density_ratio(context: Context, features: str, x_t, t_B):
    """Density ratio r [B] of the data, in place of the teacher, and the student at time t.

    A discriminator that minimises softplus(D(student)) + softplus(-D(data)) has D = log r.

    Args:
      context: networks and discriminator.
      features: network of the discriminator's features, critic or teacher.
      x_t, t_B: noised samples and their times.
    """
    params = getattr(context, f"{features}_params")
    hidden = context.denoiser.features(params, sg(x_t), t_B, context.batch.cond)
    logit_B = jnp.clip(logits(context.discriminator_params, hidden), -MAX_LOGIT, MAX_LOGIT)
    return sg(jnp.clip(jnp.exp(logit_B), *RATIO_RANGE))


def check_ratio_options(name: str, term) -> None:
    """Check a term's options `divergence`, `features`, `gan` and `hidden`. Raises: InputError."""
    check_choice(f"objective.{name}.divergence", term.divergence, DIVERGENCES)
    check_discriminator_options(name, term)


def check_discriminator_options(name: str, term) -> None:
    """Check a term's options `features`, `gan` and `hidden`. Raises: InputError."""
    check_choice(f"objective.{name}.features", term.features, ("critic", "teacher"))
    if not term.gan >= 0:
        raise InputError(f"objective.{name}.gan: found {term.gan}; expected 0 or more")
    if term.hidden < 1:
        raise InputError(f"objective.{name}.hidden: found {term.hidden}; expected 1 or more")


class DiscriminatorTerm:
    """Discriminator of a term whose options are `features`, `gan` and `hidden`: the student's
    opponent, with the weight `gan`, and in some terms an estimate of the density ratio."""

    features: str
    gan: float
    hidden: int

    @property
    def adversarial(self) -> Adversarial:
        return Adversarial(self.features, hidden=self.hidden)

    def adversarial_loss(self, context: Context):
        """gan softplus(-D) of the student per sample [B], with draws of its own."""
        return self.gan * self.adversarial(context.with_stream("gan"))[0] if self.gan else 0.0

    def discriminator_loss(self, context: Context):
        """Loss per sample [B] of the discriminator, as the term `adversarial` has it."""
        return self.adversarial.discriminator_loss(context)

    def init_discriminator(self, key, width: int):
        """Initial parameters of the head, for features of `width`."""
        return self.adversarial.init_discriminator(key, width)
