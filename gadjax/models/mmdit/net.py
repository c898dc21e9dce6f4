"""MMDiT, SD3's denoiser: one transformer over the patches of the image and the text's tokens.

Follows diffusers' SD3Transformer2DModel; Esser et al., arXiv:2403.03206. Parameters are cast to
the compute dtype at use.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.mmdit.blocks import EPS, Block, Modulation, modulate
from gadjax.models.mmdit.config import Config
from gadjax.models.module import Keys, checkpointed, scan_stacks, stack

TIME_CHANNELS = 256


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: MMDiT(config, dtype=dtype, remat=remat, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Patch tokens of latents, with position embeddings from the middle of a stored table."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        side = c.pos_embed_max_size
        self.proj = layers.PatchProjection(
            c.in_channels, c.dim, c.patch_size, dtype=dtype, rngs=rngs
        )
        table = layers.sincos_positions(side, side, c.dim, c.sample_size // c.patch_size, 1)
        self.pos_embed = nnx.Param(table[None])
        self.side = side

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        tokens_BND = self.proj(x_BHWC)
        h, w = (n // self.proj.patch for n in x_BHWC.shape[1:3])
        if max(h, w) > self.side:
            most = self.side * self.proj.patch
            raise InputError(
                f"latents: found {x_BHWC.shape[1]} x {x_BHWC.shape[2]}; expected at most "
                f"{most} x {most}, as many as pos_embed_max_size {self.side} has positions for"
            )
        top, left = (self.side - h) // 2, (self.side - w) // 2
        table = jax.lax.stop_gradient(self.pos_embed[...]).reshape(self.side, self.side, -1)
        table = table[top : top + h, left : left + w].reshape(h * w, -1)
        # The sum is in float32 and then rounded once.
        wide = jnp.promote_types(tokens_BND.dtype, jnp.float32)
        return (tokens_BND + table.astype(wide)).astype(tokens_BND.dtype)


class TimeTextEmbedding(nnx.Module):
    """Embedding of the timestep plus that of the pooled text: [B, D]."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        def mlp(features):
            return layers.Mlp(features, c.dim, c.dim, jax.nn.silu, dtype=dtype, rngs=rngs)

        self.timestep_embedder = mlp(TIME_CHANNELS)
        self.text_embedder = mlp(c.pooled_projection_dim)

    def __call__(self, t_B: jax.Array, pooled_BP: jax.Array) -> jax.Array:
        time_BD = self.timestep_embedder(layers.timestep_sinusoid(t_B, TIME_CHANNELS))
        return time_BD + self.text_embedder(pooled_BP)


class MMDiT(nnx.Module):
    """MMDiT denoiser of SD3 and SD3.5; see `__call__`."""

    def __init__(self, config: Config, *, dtype, remat: bool, rngs: Keys):
        c, dim = config, config.dim
        self.pos_embed = PatchEmbed(c, dtype=dtype, rngs=rngs)
        self.time_text_embed = TimeTextEmbedding(c, dtype=dtype, rngs=rngs)
        self.context_embedder = layers.Linear(c.joint_attention_dim, dim, dtype=dtype, rngs=rngs)
        # The last block differs in its parameters, and so do those with a second attention.
        dual = min(c.dual_layers, c.num_layers - 1)
        if dual:
            self.dual_blocks = stack(lambda r: Block(c, dual=True, dtype=dtype, rngs=r), dual, rngs)
        if plain := c.num_layers - 1 - dual:
            self.blocks = stack(lambda r: Block(c, dual=False, dtype=dtype, rngs=r), plain, rngs)
        self.last_block = Block(
            c, dual=c.dual_layers == c.num_layers, last=True, dtype=dtype, rngs=rngs
        )
        self.norm_out = Modulation(dim, 2, dtype=dtype, rngs=rngs)
        self.proj_out = layers.Linear(dim, c.patch_size**2 * c.in_channels, dtype=dtype, rngs=rngs)
        self.stacks = (("dual_blocks", dual), ("blocks", plain))
        self.depth, self.patch, self.remat = c.num_layers, c.patch_size, remat

    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, text_BLD: jax.Array, pooled_BP: jax.Array
    ) -> jax.Array:
        """Raw output for noisy latents.

        Args:
          x_BHWC: latents; H and W multiples of the patch size, at most as large as the table of
            positions.
          t_B: timesteps in [0, 1000], integer or fractional.
          text_BLD: prompt embeddings, all of which are attended to.
          pooled_BP: pooled embedding of the prompt.

        Returns: [B, H, W, in_channels] in the compute dtype.
        Raises: InputError for a size that the patch does not divide or the table does not hold.
        """
        ((x_BND, _),), emb_B1D = self._trunk((self.depth,), x_BHWC, t_B, text_BLD, pooled_BP)
        scale, shift = self.norm_out(emb_B1D)
        x_BND = self.proj_out(modulate(layers.layer_norm(x_BND, EPS), shift, scale))
        return layers.unpatchify(x_BND, *x_BHWC.shape[1:3], self.patch)

    def features(self, x_BHWC, t_B, text_BLD, pooled_BP, *, blocks=()):
        """Image tokens [B, N, D] after the first half of the blocks; arguments as `__call__`.

        blocks: rising block numbers from 0: a tuple of the tokens after each, in one pass.
        """
        counts = [block + 1 for block in blocks] or [(self.depth + 1) // 2]
        streams, _ = self._trunk(counts, x_BHWC, t_B, text_BLD, pooled_BP)
        return tuple(x_BND for x_BND, _ in streams) if blocks else streams[0][0]

    def _trunk(self, counts, x_BHWC, t_B, text_BLD, pooled_BP):
        """Both streams after each of `counts` blocks, and the embedding that modulates them."""
        emb_B1D = jax.nn.silu(self.time_text_embed(t_B, pooled_BP))[:, None]
        streams = self.pos_embed(x_BHWC), self.context_embedder(text_BLD)

        def call(block, both):
            return block(*both, emb_B1D, self.remat is True)

        stacks = [getattr(self, name) for name, size in self.stacks if size]
        outputs, streams = scan_stacks(stacks, streams, counts, call, self.remat)
        if counts[-1] == self.depth:
            outputs.append(checkpointed(call, self.remat)(self.last_block, streams))
        return outputs, emb_B1D
