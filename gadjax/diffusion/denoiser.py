"""A network, its schedule and its parameterization as one thing; guidance in one place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.diffusion.parameterization import from_prediction, to_prediction
from gadjax.diffusion.schedules import NoiseSchedule
from gadjax.types import Cond, Params, Prediction, expand


@dataclass(frozen=True)
class Denoiser:
    """Teacher, student and critic are one Denoiser with three sets of parameters.

    apply: (params, x_BHWC, t_B, cond) -> raw_BHWC, in any compute dtype; what leaves here is
      float32 (float64 where x is), because x0 = (x - sigma eps) / alpha magnifies rounding.
    features: the same arguments -> [B, N, D], what the network makes of them half-way: what a
      discriminator reads. None where the family has none.
    guidance_embedded: whether guidance is told to the network, as cond.extras["guidance"], and not applied
      to what it says.
    text_kv: (params, text_BLD) -> what the network makes of a text whatever x and t are, in which
      form `apply` and `features` take it too. None where there is no such thing.
    """

    apply: Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]
    schedule: NoiseSchedule
    parameterization: str
    features: Callable[[Params, jax.Array, jax.Array, Cond], jax.Array] | None = None
    guidance_embedded: bool = False
    text_kv: Callable[[Params, jax.Array], Any] | None = None

    def cache_text(self, params: Params, cond: Cond) -> Cond:
        """The same, the text's keys and values in the text's place: once for many evaluations."""
        if self.text_kv is None:
            return cond
        return cond._replace(text=self.text_kv(params, cond.text))

    def raw(self, params: Params, x_BHWC, t_B, cond: Cond):
        """The network's own output, float32. t_B: [B] or a scalar, in the network's units."""
        t_B = jnp.broadcast_to(jnp.asarray(t_B, x_BHWC.dtype), x_BHWC.shape[:1])
        if self.guidance_embedded and "guidance" not in (cond.extras or {}):
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

    def guidance_scale(self, guidance: float) -> float:
        """What a user's guidance is as a scale: every number up to 1 asks for none, as in
        diffusers, so that the prompt alone is told. A network that is told its guidance is told
        the number itself."""
        return guidance if self.guidance_embedded or guidance > 1 else 1.0

    def guided_raw(self, params: Params, x_BHWC, t_B, cond: Cond, null: Cond, scale):
        """Classifier-free guidance null + scale (cond - null), both in one call of the network.

        scale: a float or [B]. The Python numbers 1 and 0 leave the other half out. Where guidance
        is guidance_embedded the network is told the scale, and the other half is not there.
        """
        return self._guide(params, cond, null, scale)(x_BHWC, t_B)

    def guided_fn(self, params: Params, cond: Cond, null: Cond, scale) -> Callable[..., Prediction]:
        """guided as a function of (x_BHWC, t_B), for many evaluations: it reads the text once."""
        raw = self._guide(params, cond, null, scale, self.cache_text)
        return lambda x_BHWC, t_B: self.read(raw(x_BHWC, t_B), x_BHWC, t_B)

    def _guide(self, params, cond, null, scale, cache_text=lambda _, cond: cond):
        alone = isinstance(scale, int | float) and scale in (0, 1)
        if self.guidance_embedded or alone:
            told = cache_text(params, cond if self.guidance_embedded or scale else null)

            def once(x_BHWC, t_B):
                at = self._told(told, scale, x_BHWC[:, 0, 0, 0]) if self.guidance_embedded else told
                return self.raw(params, x_BHWC, t_B, at)

            return once

        both = cache_text(params, jax.tree.map(_beside, cond, null))

        def twice(x_BHWC, t_B):
            t_B = jnp.broadcast_to(jnp.asarray(t_B, x_BHWC.dtype), x_BHWC.shape[:1])
            raw = self.raw(params, _beside(x_BHWC, x_BHWC), _beside(t_B, t_B), both)
            told, untold = raw.reshape(-1, 2, *x_BHWC.shape[1:]).swapaxes(0, 1)
            return untold + expand(jnp.asarray(scale, x_BHWC.dtype), x_BHWC) * (told - untold)

        return twice

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


def _beside(a, b):
    """[2 B, ...], both of a sample where the sample is."""
    return jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])
