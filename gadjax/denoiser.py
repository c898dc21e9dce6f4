"""A network, its schedule and its parameterization as one thing; guidance in one place."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gadjax.parameterization import from_prediction, to_prediction
from gadjax.schedules import NoiseSchedule, expand
from gadjax.types import Cond, Params, Prediction


@dataclass(frozen=True)
class Denoiser:
    """Teacher, student and critic are one Denoiser with three sets of parameters.

    apply: (params, x_BHWC, t_B, cond) -> raw_BHWC, in any compute dtype; what leaves here is
      float32 (float64 where x is), because x0 = (x - sigma eps) / alpha magnifies rounding.
    features: the same arguments -> [B, N, D], what the network makes of them half-way: what a
      discriminator reads. None where the family has none.
    embedded: whether guidance is told to the network, as cond.extras["guidance"], and not applied
      to what it says.
    """

    apply: Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]
    schedule: NoiseSchedule
    parameterization: str
    features: Callable[[Params, jax.Array, jax.Array, Cond], jax.Array] | None = None
    embedded: bool = False

    def raw(self, params: Params, x_BHWC, t_B, cond: Cond):
        """The network's own output, float32. t_B: [B] or a scalar, in the network's units."""
        t_B = jnp.broadcast_to(jnp.asarray(t_B, x_BHWC.dtype), x_BHWC.shape[:1])
        if self.embedded and "guidance" not in (cond.extras or {}):
            cond = self._told(cond, 1.0, t_B)
        return self.apply(params, x_BHWC, t_B, cond).astype(x_BHWC.dtype)

    def read(self, raw_BHWC, x_BHWC, t_B) -> Prediction:
        """A raw output as x0 and eps."""
        t_B = jnp.asarray(t_B, x_BHWC.dtype)
        return to_prediction(
            self.parameterization, raw_BHWC, x_BHWC, *self.schedule.alpha_sigma(t_B)
        )

    def __call__(self, params: Params, x_BHWC, t_B, cond: Cond) -> Prediction:
        return self.read(self.raw(params, x_BHWC, t_B, cond), x_BHWC, t_B)

    def guided_raw(self, params: Params, x_BHWC, t_B, cond: Cond, null: Cond, scale):
        """Classifier-free guidance null + scale (cond - null), both in one call of the network.

        scale: a float or [B]. The Python numbers 1 and 0 leave the other half out. Where guidance
        is embedded the network is told the scale, and the other half is not there.
        """
        if self.embedded:
            return self.raw(params, x_BHWC, t_B, self._told(cond, scale, x_BHWC[:, 0, 0, 0]))
        if isinstance(scale, int | float) and scale in (0, 1):
            return self.raw(params, x_BHWC, t_B, cond if scale else null)
        t_B = jnp.broadcast_to(jnp.asarray(t_B, x_BHWC.dtype), x_BHWC.shape[:1])
        # Side by side, so that both of a sample are where the sample is.
        pairs = (x_BHWC, t_B, cond), (x_BHWC, t_B, null)
        twice, t_2B, both = jax.tree.map(
            lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), *pairs
        )
        raw_BPHWC = self.raw(params, twice, t_2B, both).reshape(-1, 2, *x_BHWC.shape[1:])
        told, untold = raw_BPHWC[:, 0], raw_BPHWC[:, 1]
        scale = expand(jnp.asarray(scale, x_BHWC.dtype), x_BHWC)
        return untold + scale * (told - untold)

    def _told(self, cond: Cond, scale, like_B: jax.Array) -> Cond:
        scale_B = jnp.broadcast_to(jnp.asarray(scale, like_B.dtype), like_B.shape)
        return cond._replace(extras={**(cond.extras or {}), "guidance": scale_B})

    def guided(self, params: Params, x_BHWC, t_B, cond: Cond, null: Cond, scale) -> Prediction:
        """guided_raw as x0 and eps."""
        return self.read(self.guided_raw(params, x_BHWC, t_B, cond, null, scale), x_BHWC, t_B)

    def denoising_loss(
        self, params: Params, x0_BHWC, eps_BHWC, t_B, cond: Cond, null: Cond | None = None, scale=1
    ):
        """Mean squared error of the raw output at x_t = alpha x0 + sigma eps, per sample [B].

        null, scale: where the network is trained with guidance.
        """
        alpha, sigma = self.schedule.alpha_sigma(t_B)
        x_t = expand(alpha, x0_BHWC) * x0_BHWC + expand(sigma, x0_BHWC) * eps_BHWC
        target = from_prediction(self.parameterization, Prediction(x0_BHWC, eps_BHWC), alpha, sigma)
        error = self.guided_raw(params, x_t, t_B, cond, null, scale) - target
        return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
