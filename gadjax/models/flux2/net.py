"""FLUX.2-klein's denoiser: double blocks, then single ones, all modulated by the same arrays.

Follows diffusers' Flux2Transformer2DModel. Parameters are cast to the compute dtype at use. Both
streams stay apart to the end: what is one sequence there is two arrays here, with one attention.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.flux2.blocks import (
    DoubleBlock,
    Modulation,
    Modulations,
    Rotations,
    SingleBlock,
    linear,
)
from gadjax.models.flux2.config import Config
from gadjax.models.mmdit.blocks import modulate
from gadjax.models.module import Keys, scan_stacks, stack
from gadjax.models.rotary import axis_rotation, grid_rotation


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: Flux2(config, dtype=dtype, remat=remat, rngs=rngs)


class TimestepEmbedding(nnx.Module):
    """Two layers over the sinusoid of the time."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.linear_1 = linear(c.timestep_guidance_channels, c.dim, dtype, rngs)
        self.linear_2 = linear(c.dim, c.dim, dtype, rngs)
        self.channels = c.timestep_guidance_channels

    def __call__(self, t_B: jax.Array) -> jax.Array:
        sinusoid = layers.timestep_sinusoid(t_B, self.channels)
        return self.linear_2(jax.nn.silu(self.linear_1(sinusoid)))


class Flux2(nnx.Module):
    """FLUX.2-klein denoiser; see `__call__`."""

    def __init__(self, config: Config, *, dtype, remat: bool, rngs: Keys):
        c, options = config, {"dtype": dtype, "rngs": rngs}
        self.time_guidance_embed = nnx.Dict({"timestep_embedder": TimestepEmbedding(c, **options)})
        self.double_stream_modulation_img = Modulation(c.dim, 6, **options)
        self.double_stream_modulation_txt = Modulation(c.dim, 6, **options)
        self.single_stream_modulation = Modulation(c.dim, 3, **options)
        self.x_embedder = linear(c.in_channels, c.dim, dtype, rngs)
        self.context_embedder = linear(c.joint_attention_dim, c.dim, dtype, rngs)
        self.double_blocks = stack(
            lambda r: DoubleBlock(c, dtype=dtype, rngs=r), c.num_layers, rngs
        )
        self.single_blocks = stack(
            lambda r: SingleBlock(c, dtype=dtype, rngs=r), c.num_single_layers, rngs
        )
        self.norm_out = Modulation(c.dim, 2, **options)
        self.proj_out = linear(c.dim, c.in_channels, dtype, rngs)
        self.config, self.remat = c, remat

    def __call__(self, x_BHWC: jax.Array, t_B: jax.Array, text_BLD: jax.Array) -> jax.Array:
        """Velocity for noisy latents.

        Args:
          x_BHWC: latents, a token each; of any size.
          t_B: timesteps in [0, 1000], integer or fractional.
          text_BLD: prompt embeddings, all of which are attended to.

        Returns: [B, H, W, C] in the compute dtype.
        """
        counts = (self.config.feature_blocks,)
        ((x_BND, _),), emb_B1D = self._trunk(counts, x_BHWC, t_B, text_BLD)
        scale, shift = self.norm_out(emb_B1D)
        normed = modulate(layers.layer_norm(x_BND, self.config.eps), shift, scale)
        return self.proj_out(normed).reshape(*x_BHWC.shape[:3], -1)

    def features(self, x_BHWC, t_B, text_BLD, *, blocks=()):
        """Image tokens [B, N, D] after the first half of the blocks; arguments as `__call__`.

        blocks: rising block numbers from 0: a tuple of the tokens after each, in one pass.
        """
        counts = [block + 1 for block in blocks] or [(self.config.feature_blocks + 1) // 2]
        streams, _ = self._trunk(counts, x_BHWC, t_B, text_BLD)
        return tuple(x_BND for x_BND, _ in streams) if blocks else streams[0][0]

    def _trunk(self, counts, x_BHWC, t_B, text_BLD):
        """Both streams after each of `counts` blocks, and the embedding that modulates them."""
        emb_BD = self.time_guidance_embed["timestep_embedder"](t_B)
        emb_B1D = jax.nn.silu(emb_BD)[:, None]
        modulations = Modulations(
            self.double_stream_modulation_img(emb_B1D),
            self.double_stream_modulation_txt(emb_B1D),
            self.single_stream_modulation(emb_B1D),
        )
        b, height, width, channels = x_BHWC.shape
        tokens = x_BHWC.reshape(b, height * width, channels)
        streams = self.x_embedder(tokens), self.context_embedder(text_BLD)
        rotations = Rotations(
            self._rotation(1, height, width, 1), self._rotation(1, 1, 1, text_BLD.shape[1])
        )

        def call(block, both):
            return block(*both, modulations, rotations)

        stacks = self.double_blocks, self.single_blocks
        return scan_stacks(stacks, streams, counts, call, self.remat)[0], emb_B1D

    def _rotation(self, *sides: int) -> jax.Array:
        """Rotation [2, N, K / 2] of a grid with so many positions along each axis."""
        c = self.config
        axes = zip(sides, c.axes_dims_rope, strict=True)
        return grid_rotation(*(axis_rotation(range(n), dim, c.rope_theta) for n, dim in axes))
