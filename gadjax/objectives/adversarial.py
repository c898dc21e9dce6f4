"""Adversarial loss: a discriminator on network features of noised latents."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import check_count, sg
from gadjax.objectives.compose import Addable
from gadjax.objectives.time_laws import check_span_fractions, uniform_timesteps
from gadjax.types import Params

# Name -> loss of the student, and of the discriminator, from its logits.
LOSSES = {
    "softplus": (
        lambda fake: jax.nn.softplus(-fake),
        lambda fake, real: jax.nn.softplus(fake) + jax.nn.softplus(-real),
    ),
    "hinge": (
        lambda fake: -fake,
        lambda fake, real: jax.nn.relu(1 + fake) + jax.nn.relu(1 - real),
    ),
}
CRITIC_GRADIENT_SCALE = 0.01  # of the discriminator's gradient to the critic, whose own is 1


@dataclass(frozen=True)
class Adversarial(Addable):
    """softplus(-D(x_t)) for the student, softplus(D(x_t)) + softplus(-D(y_t)) for D.

    x_t = alpha x0 + sigma eps of the student's x0 at its drawn step, y_t the same of the data's
    clean latents, with one t, eps and text for both: D's two halves then differ by the pictures
    alone. t is uniform between `low` and `high` of the schedule's span. D(x_t) is a head on the
    features of x_t: a normalisation, an MLP with one hidden layer of `hidden` units, the mean over
    tokens.
    features: "critic", as in DMD2 with a weight of 0.001 to 0.005 relative to DMD (arXiv
      2405.14867): the critic is trained to discriminate too, with a hundredth of D's gradient;
      "teacher", which is frozen. `ladd` has heads on several of its blocks.
    loss: "softplus", or "hinge": -D for the student, max(0, 1 + D(x_t)) + max(0, 1 - D(y_t)) for D.
    clamp: bound of the logits in both losses, beyond which neither has a gradient; 0 for
      none. SiD-DiT's GAN variant (half of it, beside half of `sid`) has 10.
    The student's gradient flows through the features' input and nothing else; D's stops at x0.
    Cost: beside the student half an evaluation and its reverse pass; two halves for D, and their
    reverse passes with the critic's features.
    """

    features: str = "critic"
    loss: str = "softplus"
    low: float = 0.0
    high: float = 1.0
    hidden: int = 256
    clamp: float = 0.0

    def __post_init__(self):
        for name, known in (("features", ("critic", "teacher")), ("loss", tuple(LOSSES))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"objective.adversarial.{name}: found {getattr(self, name)!r}; expected "
                    + " or ".join(map(repr, known))
                )
        check_span_fractions("adversarial", self.low, self.high)
        check_count("adversarial", "hidden", self.hidden, 1)
        if not 0 <= self.clamp < math.inf:
            raise InputError(f"objective.adversarial.clamp: found {self.clamp}; expected 0 or more")

    @property
    def needs(self) -> Needs:
        return Needs(
            student=True, critic=self.features == "critic", discriminator=True, images=True
        )

    def __call__(self, context: Context):
        features = self.noised_features(context, context.student[0].x0)
        fake_B = self.bounded(logits(context.discriminator_params, features))
        return LOSSES[self.loss][0](fake_B), {"logit": jnp.mean(fake_B)}

    def discriminator_loss(self, context: Context):
        def logits_of(x0):
            x = self.noised_features(context, sg(x0))
            scaled = sg(x) + CRITIC_GRADIENT_SCALE * (x - sg(x))
            return self.bounded(logits(context.discriminator_params, scaled))

        fake_B, real_B = logits_of(context.student[0].x0), logits_of(context.batch.x0)
        return LOSSES[self.loss][1](fake_B, real_B)

    def bounded(self, logits_B):
        """Logits [B] within the bound `clamp`."""
        return jnp.clip(logits_B, -self.clamp, self.clamp) if self.clamp else logits_B

    def noised_features(self, context: Context, x0):
        """Features [B, N, D] of x0 with noise added."""
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = add_noise(context.schedule, x0, context.normal("eps"), t_B)
        params = getattr(context, f"{self.features}_params")
        return context.denoiser.features(params, x_t, t_B, context.batch.cond)

    def init_discriminator(self, key, width: int) -> Params:
        """Initial parameters of the head, for features of `width`; its logits start at zero."""
        kernel = jax.random.normal(key, (width, self.hidden)) / width**0.5
        return {
            "linear_1": {"kernel": kernel, "bias": jnp.zeros(self.hidden)},
            "linear_2": {"kernel": jnp.zeros((self.hidden, 1)), "bias": jnp.zeros(1)},
        }


def logits(params: Params, features_BND):
    """The discriminator's head: logits [B], in at least float32."""
    x = features_BND.astype(jnp.promote_types(features_BND.dtype, jnp.float32))
    # The 1 keeps the scale of small features, which may be all that separates two pictures.
    x = (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1)
    first, second = params["linear_1"], params["linear_2"]
    x = jax.nn.gelu(x @ first["kernel"] + first["bias"])
    return jnp.mean(x @ second["kernel"] + second["bias"], axis=(1, 2))
