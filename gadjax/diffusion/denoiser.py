"""Denoiser: a network with its noise schedule and parameterization; classifier-free guidance."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from gadjax.diffusion.experts import Experts, by_time
from gadjax.diffusion.parameterization import from_prediction, to_prediction
from gadjax.diffusion.schedules import NoiseSchedule
from gadjax.types import Cond, Params, Prediction, expand


@dataclass(frozen=True)
class Denoiser:
    """Denoising network of teacher, student and critic alike; they differ in their parameters.

    Args:
      apply: (params, x_BHWC, t_B, cond) -> raw_BHWC, in any compute dtype. The methods here return
        float32 (float64 where x is), because x0 = (x - sigma eps) / alpha magnifies rounding.
      schedule: noise schedule, which defines the unit of t.
      parameterization: of the raw output, "eps", "v", "x0" or "flow".
      features: the same arguments -> hidden features [B, N, D] half-way through the network, the
        input of a discriminator; with `blocks`, rising block numbers from 0, a tuple of the
        features after each block, in one pass. None where the family has none.
      feature_blocks: number of blocks that `features` may name; 0 where it names none.
      guidance_embedded: the guidance scale is a network input, cond.extras["guidance"]
        (guidance-distilled model), and is not applied to outputs.
      guided_norm: axis of the raw output along which guidance keeps the norm of the conditional
        output (Lumina 2); None: none.
      text_kv: (params, text_BLD) -> the cross-attention KV cache of the prompt embeddings, which
        `apply` and `features` accept in their place. None where a family has no such cache.
      default_guidance: embedded scale where an evaluation names none: the student's and critic's.
    """

    apply: Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]
    schedule: NoiseSchedule
    parameterization: str
    features: Callable[..., Any] | None = None
    feature_blocks: int = 0
    guidance_embedded: bool = False
    guided_norm: int | None = None
    text_kv: Callable[[Params, jax.Array], Any] | None = None
    default_guidance: float = 1.0

    def with_default_guidance(self, scale: float) -> "Denoiser":
        """The denoiser with an embedded scale where an evaluation, or `features`, names none."""
        if not self.guidance_embedded:
            return self
        given = self.features

        def features(params, x_BHWC, t_B, cond: Cond, **options):
            if "guidance" not in (cond.extras or {}):
                cond = self._embed_guidance(cond, scale, x_BHWC[:, 0, 0, 0])
            return given(params, x_BHWC, t_B, cond, **options)

        return replace(self, default_guidance=scale, features=features if given else None)

    def cache_text(self, params: Params, cond: Cond) -> Cond:
        """`cond` with its prompt embeddings replaced by their KV cache, for many evaluations.

        As it is where a family has none, and for experts, each of which would have its own.
        """
        if self.text_kv is None or isinstance(params, Experts):
            return cond
        return cond._replace(text=self.text_kv(params, cond.text))

    def raw(self, params: Params, x_BHWC, t_B, cond: Cond):
        """Raw network output in float32.

        Args:
          params: of the network, or `Experts`.
          x_BHWC: noisy latents.
          t_B: timesteps, [B] or a scalar, in the units of the schedule.
          cond: conditioning.
        """
        t_B = jnp.broadcast_to(jnp.asarray(t_B, x_BHWC.dtype), x_BHWC.shape[:1])
        if self.guidance_embedded and "guidance" not in (cond.extras or {}):
            cond = self._embed_guidance(cond, self.default_guidance, t_B)
        return by_time(self.apply, params, x_BHWC, t_B, cond).astype(x_BHWC.dtype)

    def to_prediction(self, raw_BHWC, x_BHWC, t_B) -> Prediction:
        """Convert a raw output to x0 and eps.

        Args:
          raw_BHWC: of `raw`.
          x_BHWC, t_B: its inputs.
        """
        t_B = jnp.asarray(t_B, x_BHWC.dtype)
        return to_prediction(
            self.parameterization, raw_BHWC, x_BHWC, *self.schedule.alpha_sigma(t_B)
        )

    def __call__(self, params: Params, x_BHWC, t_B, cond: Cond) -> Prediction:
        return self.to_prediction(self.raw(params, x_BHWC, t_B, cond), x_BHWC, t_B)

    def guidance_scale(self, guidance: float) -> float:
        """Guidance scale for a user's `guidance`. As in diffusers, numbers up to 1 disable
        guidance (scale 1: the conditional output alone). An embedded guidance stays as it is."""
        return guidance if self.guidance_embedded or guidance > 1 else 1.0

    def guided_raw(self, params: Params, x_BHWC, t_B, cond: Cond, null: Cond, scale):
        """Raw output under classifier-free guidance: null + scale (cond - null), both halves in
        one evaluation.

        Args:
          params: of the network.
          x_BHWC, t_B: noisy latents and their timesteps, [B] or a scalar.
          cond, null: conditioning of the prompts and of the negative prompt.
          scale: a float or [B]. The Python numbers 1 and 0 evaluate one half only. Where guidance
            is embedded, the scale is a network input and `null` is not evaluated. None for no
            guidance: 1, or where it is embedded the default scale.
        """
        return self._guide(params, cond, null, scale)(x_BHWC, t_B)

    def guided_fn(self, params: Params, cond: Cond, null: Cond, scale) -> Callable[..., Prediction]:
        """`guided` as a function of (x_BHWC, t_B), for many evaluations on one KV cache.

        Args:
          params, cond, null, scale: as for `guided_raw`.
        """
        raw = self._guide(params, cond, null, scale, self.cache_text)
        return lambda x_BHWC, t_B: self.to_prediction(raw(x_BHWC, t_B), x_BHWC, t_B)

    def _guide(self, params, cond, null, scale, cache_text=lambda _, cond: cond):
        if scale is None:
            scale = self.default_guidance if self.guidance_embedded else 1
        one_half = isinstance(scale, int | float) and scale in (0, 1)
        if self.guidance_embedded or one_half:
            cached = cache_text(params, cond if self.guidance_embedded or scale else null)

            def evaluate(x_BHWC, t_B):
                inputs = (
                    self._embed_guidance(cached, scale, x_BHWC[:, 0, 0, 0])
                    if self.guidance_embedded
                    else cached
                )
                return self.raw(params, x_BHWC, t_B, inputs)

            return evaluate

        both = cache_text(params, jax.tree.map(_interleave, cond, null))

        def evaluate_both(x_BHWC, t_B):
            t_B = jnp.broadcast_to(jnp.asarray(t_B, x_BHWC.dtype), x_BHWC.shape[:1])
            raw = self.raw(params, _interleave(x_BHWC, x_BHWC), _interleave(t_B, t_B), both)
            cond_out, uncond_out = raw.reshape(-1, 2, *x_BHWC.shape[1:]).swapaxes(0, 1)
            guided = uncond_out + expand(jnp.asarray(scale, x_BHWC.dtype), x_BHWC) * (
                cond_out - uncond_out
            )
            return guided if self.guided_norm is None else self._renormed(guided, cond_out)

        return evaluate_both

    def _renormed(self, guided_BHWC, cond_BHWC):
        """Guided output with the norms of the conditional one along an axis."""
        one, other = (
            jnp.square(x).sum(self.guided_norm, keepdims=True) for x in (cond_BHWC, guided_BHWC)
        )
        return guided_BHWC * jnp.sqrt(one / jnp.where(other > 0, other, 1))

    def _embed_guidance(self, cond: Cond, scale, like_B: jax.Array) -> Cond:
        scale_B = jnp.broadcast_to(jnp.asarray(scale, like_B.dtype), like_B.shape)
        return cond._replace(extras={**(cond.extras or {}), "guidance": scale_B})

    def guided(self, params: Params, x_BHWC, t_B, cond: Cond, null: Cond, scale) -> Prediction:
        """Prediction (x0, eps) under classifier-free guidance.

        Args:
          params, x_BHWC, t_B, cond, null, scale: as for `guided_raw`.
        """
        return self.to_prediction(
            self.guided_raw(params, x_BHWC, t_B, cond, null, scale), x_BHWC, t_B
        )

    def denoising_loss(
        self,
        params: Params,
        target: Prediction,
        t_B,
        cond: Cond,
        null: Cond | None = None,
        scale=None,
    ):
        """Denoising loss: mean squared error of the raw output at x_t = alpha x0 + sigma eps.

        Args:
          params: of the network.
          target: clean latents and the noise that is added to them.
          t_B: timesteps.
          cond: conditioning.
          null, scale: conditioning of the negative prompt and guidance scale, where the network is
            trained under guidance; None as for `guided_raw`.

        Returns: the loss per sample [B].
        """
        alpha, sigma = self.schedule.alpha_sigma(t_B)
        x_t = expand(alpha, target.x0) * target.x0 + expand(sigma, target.x0) * target.eps
        raw_target = from_prediction(self.parameterization, target, alpha, sigma)
        error = self.guided_raw(params, x_t, t_B, cond, null, scale) - raw_target
        return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def _interleave(a, b):
    """Interleave arrays [B, ...] to [2 B, ...]: both halves of a sample stay on its devices."""
    return jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])
