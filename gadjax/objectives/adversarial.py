"""A discriminator on what a network makes of noised pictures, half-way."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.diffusion.schedules import add_noise
from gadjax.errors import InputError
from gadjax.objectives.base import Context, Needs
from gadjax.objectives.common import check_span_fractions, sg, uniform_timesteps
from gadjax.objectives.compose import Addable
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
SHARE = 0.01  # of the discriminator's gradient that the critic takes, beside its own of weight 1


@dataclass(frozen=True)
class Adversarial(Addable):
    """softplus(-D(x_t)) for the student, softplus(D(x_t)) + softplus(-D(y_t)) for D.

    x_t = alpha x0 + sigma eps of the student's x0 at its drawn step, y_t the same of the data's
    clean latents, with one t, eps and text for both: D's two halves then differ by the pictures
    alone. t is uniform between `low` and `high` of the schedule's span. D(x_t) is a head on the
    features of x_t: a normalisation, an MLP of one layer of `hidden`, the mean over tokens.
    features: "critic", as DMD2 has it beside DMD with a weight of 0.001 to 0.005 (arXiv
      2405.14867): the critic learns to tell pictures apart as well, with a hundredth of D's
      gradient; "teacher", which is frozen. LADD (arXiv 2403.12015) has the teacher's too, but heads
      on several blocks and an R1 penalty; here it is one head on one block half-way, without.
    loss: "softplus", or "hinge": -D for the student, max(0, 1 + D(x_t)) + max(0, 1 - D(y_t)) for D.
    The student's gradient passes the features' input and nothing else; D's is cut at x0.
    Cost: half an evaluation and its reverse pass beside the student; two halves for D, and with the
    critic's features their reverse passes.
    """

    features: str = "critic"
    loss: str = "softplus"
    low: float = 0.0
    high: float = 1.0
    hidden: int = 256

    def __post_init__(self):
        for name, known in (("features", ("critic", "teacher")), ("loss", tuple(LOSSES))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"objective.adversarial.{name}: found {getattr(self, name)!r}; expected "
                    + " or ".join(map(repr, known))
                )
        check_span_fractions("adversarial", self.low, self.high)
        if self.hidden < 1:
            raise InputError(
                f"objective.adversarial.hidden: found {self.hidden}; expected 1 or more"
            )

    @property
    def needs(self) -> Needs:
        return Needs(
            student=True, critic=self.features == "critic", discriminator=True, images=True
        )

    def __call__(self, context: Context):
        seen = self.seen(context, context.student[0].x0)
        fake_B = logits(context.discriminator_params, seen)
        return LOSSES[self.loss][0](fake_B) * context.base_weight_B, {"logit": jnp.mean(fake_B)}

    def discriminator_loss(self, context: Context):
        def judged(x0):
            seen = self.seen(context, sg(x0))
            return logits(context.discriminator_params, sg(seen) + SHARE * (seen - sg(seen)))

        fake_B, real_B = judged(context.student[0].x0), judged(context.batch.x0)
        return LOSSES[self.loss][1](fake_B, real_B) * context.base_weight_B

    def seen(self, context: Context, x0):
        """The features [B, N, D] of x0, noised."""
        t_B = uniform_timesteps(context, self.low, self.high)
        x_t = add_noise(context.schedule, x0, context.normal("eps"), t_B)
        params = getattr(context, f"{self.features}_params")
        return context.denoiser.features(params, x_t, t_B, context.batch.cond)

    def init_discriminator(self, key, width: int) -> Params:
        """The head for features of `width`; it starts at logits of zero, without an opinion."""
        kernel = jax.random.normal(key, (width, self.hidden)) / width**0.5
        return {
            "linear_1": {"kernel": kernel, "bias": jnp.zeros(self.hidden)},
            "linear_2": {"kernel": jnp.zeros((self.hidden, 1)), "bias": jnp.zeros(1)},
        }


def logits(params: Params, seen_BND):
    """The head: [B], in at least float32."""
    x = seen_BND.astype(jnp.promote_types(seen_BND.dtype, jnp.float32))
    # The 1 leaves small features their size, which may be all that tells two pictures apart.
    x = (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1)
    first, second = params["linear_1"], params["linear_2"]
    x = jax.nn.gelu(x @ first["kernel"] + first["bias"])
    return jnp.mean(x @ second["kernel"] + second["bias"], axis=(1, 2))
