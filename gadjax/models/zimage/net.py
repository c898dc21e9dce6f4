"""Z-Image's denoiser: one stream of image and caption tokens.

Follows diffusers' ZImageTransformer2DModel and its pipeline; Z-Image Team, arXiv:2511.22699. Time
and sign are those of the other flows here: t is 1000 at noise, and the output is the velocity
noise - x0. Parameters are cast to the compute dtype at use.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.module import Keys, scan_blocks, scan_through, stack
from gadjax.models.zimage.blocks import Block
from gadjax.models.zimage.config import PATCH, STEPS, Config
from gadjax.models.zimage.rotary import (
    caption_rotation,
    check_lengths,
    image_rotation,
)
from gadjax.ops.attention import tangent_pass

TIME_CHANNELS = 256
OUT_EPS = 1e-6  # the last norm does not follow norm_eps


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: ZImage(config, dtype=dtype, remat=remat, rngs=rngs)


class FinalLayer(nnx.Module):
    """Modulated norm and projection to patches."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.linear = layers.Linear(c.dim, PATCH**2 * c.in_channels, dtype=dtype, rngs=rngs)
        self.adaLN_modulation = layers.Linear(c.time_dim, c.dim, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: jax.Array, time_B1T: jax.Array) -> jax.Array:
        scale = 1 + self.adaLN_modulation(jax.nn.silu(time_B1T))
        return self.linear(layers.layer_norm(x_BND, OUT_EPS) * scale)


class ZImage(nnx.Module):
    """Z-Image denoiser; see `__call__`."""

    def __init__(self, config: Config, *, dtype, remat: bool, rngs: Keys):
        c, options = config, {"dtype": dtype, "rngs": rngs}

        def blocks(count, **more):
            return stack(lambda r: Block(c, dtype=dtype, rngs=r, **more), count, rngs)

        self.x_embedder = layers.Linear(PATCH**2 * c.in_channels, c.dim, **options)
        self.t_embedder = layers.Mlp(
            TIME_CHANNELS, c.time_hidden, c.time_dim, jax.nn.silu, **options
        )
        self.cap_embedder = layers.numbered(
            [
                nnx.RMSNorm(c.cap_feat_dim, epsilon=c.norm_eps, **options),
                layers.Linear(c.cap_feat_dim, c.dim, **options),
            ]
        )
        if c.multiple > 1:
            self.x_pad_token = nnx.Param(jnp.zeros((1, c.dim)))
            self.cap_pad_token = nnx.Param(jnp.zeros((1, c.dim)))
        self.noise_refiner = blocks(c.n_refiner_layers)
        self.context_refiner = blocks(c.n_refiner_layers, modulated=False)
        self.layers = blocks(c.n_layers)
        self.final_layer = FinalLayer(c, **options)
        self.config, self.dtype, self.remat = c, dtype, remat

    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, text_BLD: jax.Array, mask_BL: jax.Array
    ) -> jax.Array:
        """Velocity of noisy latents.

        Args:
          x_BHWC: latents; H and W even, otherwise free.
          t_B: timesteps in [0, 1000], integer or fractional; 1000 is noise.
          text_BLD: prompt embeddings.
          mask_BL: attention mask, 1 for the tokens of the prompt, which come first.

        Returns: [B, H, W, in_channels] in the compute dtype.
        Raises: InputError for an odd size, or one or a prompt beyond axes_lens.
        """
        counts = (self.config.n_layers,)
        (x_BND,), time_B1T = self._trunk(counts, x_BHWC, t_B, text_BLD, mask_BL)
        patches = self.final_layer(x_BND, time_B1T)
        return -layers.unpatchify(patches, *x_BHWC.shape[1:3], PATCH)

    def features(self, x_BHWC, t_B, text_BLD, mask_BL, *, blocks=()):
        """Image tokens [B, N, D] after the first half of `layers`; arguments as `__call__`.

        blocks: rising block numbers from 0: a tuple of the tokens after each, in one pass.
        """
        counts = [block + 1 for block in blocks] or [(self.config.n_layers + 1) // 2]
        tokens, _ = self._trunk(counts, x_BHWC, t_B, text_BLD, mask_BL)
        return tuple(tokens) if blocks else tokens[0]

    def _padded(self, count):
        """Number of tokens with their learned padding."""
        return -(-count // self.config.multiple) * self.config.multiple

    def _trunk(self, counts, x_BHWC, t_B, text_BLD, mask_BL):
        """Image tokens after each of `counts` blocks, and the time embedding [B, 1, T]."""
        time_B1T = self._time(t_B)
        into_blocks = jax.nn.silu(time_B1T) if self.config.activates_time else time_B1T
        patches = layers.patchify(x_BHWC.astype(self.dtype), PATCH)
        rows, columns, tokens = (
            *(n // PATCH for n in x_BHWC.shape[1:3]),
            self._padded(mask_BL.shape[1]),
        )
        check_lengths(self.config, rows, columns, tokens)
        count_B = self._padded((mask_BL > 0).sum(1))
        attended_BM = jnp.arange(tokens) < count_B[:, None]
        caption_BMD = self._caption(text_BLD, mask_BL, attended_BM)

        x_BND, images = self.x_embedder(patches), patches.shape[1]
        if missing := self._padded(images) - images:
            pads = jnp.repeat(self.x_pad_token[...][None], missing, axis=1).astype(self.dtype)
            pads = jnp.broadcast_to(pads, (len(patches), *pads.shape[1:]))
            x_BND = jnp.concatenate([x_BND, pads], axis=1)
        rotation = image_rotation(self.config, (rows, columns, missing), tokens, count_B)
        x_BND = scan_blocks(
            self.noise_refiner,
            x_BND,
            lambda block, x: block(x, rotation, None, into_blocks),
            self.remat,
        )

        x_BND = jnp.concatenate([x_BND, caption_BMD], axis=1)
        of_caption = jnp.repeat(caption_rotation(self.config, tokens), len(patches), axis=1)
        joined = jnp.concatenate([rotation, of_caption], axis=2)
        bias = layers.mask_bias(
            jnp.pad(attended_BM, ((0, 0), (images + missing, 0)), constant_values=True)
        )
        outputs = scan_through(
            self.layers,
            x_BND,
            counts,
            lambda block, x: block(x, joined, bias, into_blocks),
            self.remat,
        )
        return [x_BND[:, :images] for x_BND in outputs], time_B1T

    def _time(self, t_B: jax.Array) -> jax.Array:
        """Time embedding [B, 1, T]. It counts from noise: 0 at t = 1000, t_scale at t = 0."""
        # In diffusers' order of operations: an ulp shows in the sinusoid. By a constant XLA would
        # multiply, with its rounded reciprocal or its ratio to the scale, depending on the version.
        scaled_B = (STEPS - t_B) / (STEPS + 0 * t_B) * self.config.t_scale
        return self.t_embedder(layers.timestep_sinusoid(scaled_B, TIME_CHANNELS))[:, None]

    def _caption(self, text_BLD, mask_BL, attended_BM):
        """Refined tokens of the caption [B, M, D], M with padding.

        The last tokens up to a multiple of 32 are the learned one, which takes part in attention.
        """
        tokens = attended_BM.shape[1]
        padding = (0, 0), (0, tokens - mask_BL.shape[1])
        norm, linear = (self.cap_embedder[name] for name in "01")
        x_BMD = jnp.pad(linear(norm(text_BLD)), (*padding, (0, 0)))
        real_BM = jnp.pad(mask_BL, padding) > 0
        if self.config.multiple > 1:
            pad = self.cap_pad_token[...].astype(x_BMD.dtype)
            x_BMD = jnp.where(real_BM[..., None], x_BMD, pad)
        rotation, bias = caption_rotation(self.config, tokens), layers.mask_bias(attended_BM)
        with tangent_pass(False):  # the caption has none, in latents or time
            return scan_blocks(
                self.context_refiner, x_BMD, lambda block, x: block(x, rotation, bias), self.remat
            )
