"""FLUX.1's denoiser: blocks of two streams, image and text, then blocks that treat both alike.

Follows diffusers' FluxTransformer2DModel. Parameters are cast to the compute dtype at use. Both
streams stay apart to the end: what is one sequence there is two arrays here, with one attention.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.flux.config import PATCH, Config
from gadjax.models.mmdit.blocks import EPS, Block, Modulation, Stream, join_streams, modulate
from gadjax.models.mmdit.net import TIME_CHANNELS, TimeTextEmbedding
from gadjax.models.module import Keys, scan_stacks, stack
from gadjax.models.rotary import axis_rotation, grid_rotation
from gadjax.ops.attention import attention

THETA = 10_000.0
GUIDANCE_UNIT = 1000.0  # the guidance scale is embedded as a time of so many steps


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every block, see `checkpointed`.
    """
    return lambda rngs: Flux(config, dtype=dtype, remat=remat, rngs=rngs)


class Embedding(TimeTextEmbedding):
    """Embedding of time, pooled text and, in a guidance-distilled network, the guidance scale."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        super().__init__(c, dtype=dtype, rngs=rngs)
        if c.guidance_embeds:
            self.guidance_embedder = layers.Mlp(
                TIME_CHANNELS, c.dim, c.dim, jax.nn.silu, dtype=dtype, rngs=rngs
            )
        self.guidance_embeds = c.guidance_embeds

    def __call__(self, t_B, pooled_BP, guidance_B=None) -> jax.Array:
        emb_BD = super().__call__(t_B, pooled_BP)
        if not self.guidance_embeds:
            return emb_BD
        if guidance_B is None:
            raise InputError("guidance: found none; expected the scale, which the network embeds")
        features = layers.timestep_sinusoid(GUIDANCE_UNIT * guidance_B, TIME_CHANNELS)
        return emb_BD + self.guidance_embedder(features)


class ParallelFeedForward(nnx.Module):
    """Feed-forward beside an attention, with one output projection for both."""

    def __init__(self, dim: int, *, dtype, rngs: Keys):
        self.proj_mlp = layers.Linear(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.proj_out = layers.Linear(5 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, attended_BND: jax.Array, x_BND: jax.Array) -> jax.Array:
        hidden = layers.gelu_tanh(self.proj_mlp(x_BND))
        return self.proj_out(jnp.concatenate([attended_BND, hidden], axis=-1))


class SingleBlock(nnx.Module):
    """Attention and feed-forward side by side, of both streams with the same parameters."""

    def __init__(self, c: Config, *, dtype, rngs: Keys):
        self.norm = Modulation(c.dim, 3, dtype=dtype, rngs=rngs)
        self.attn = Stream(c, has_out=False, dtype=dtype, rngs=rngs)
        self.ff = ParallelFeedForward(c.dim, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND, text_BLD, emb_B1D, remat: bool, rotation) -> tuple:
        """Both streams after the block; arguments as of `Block`."""
        shift, scale, gate = self.norm(emb_B1D)
        streams = x_BND, text_BLD
        normed = [modulate(layers.layer_norm(a, EPS), shift, scale) for a in streams]
        q, *image_kv = self.attn(normed[0], rotation)
        q_text, *text_kv = self.attn(normed[1])
        k, v = join_streams(image_kv, text_kv)

        def after(x, queries, h):
            attended = attention(queries, k, v)
            return x + gate * self.ff(attended.reshape(*attended.shape[:2], -1), h)

        return tuple(map(after, streams, (q, q_text), normed))


class Flux(nnx.Module):
    """FLUX.1 denoiser; see `__call__`."""

    def __init__(self, config: Config, *, dtype, remat: bool, rngs: Keys):
        c, options = config, {"dtype": dtype, "rngs": rngs}
        self.time_text_embed = Embedding(c, **options)
        self.context_embedder = layers.Linear(c.joint_attention_dim, c.dim, **options)
        self.x_embedder = layers.Linear(c.in_channels, c.dim, **options)
        self.double_blocks = stack(
            lambda r: Block(c, dual=False, dtype=dtype, rngs=r), c.num_layers, rngs
        )
        self.single_blocks = stack(
            lambda r: SingleBlock(c, dtype=dtype, rngs=r), c.num_single_layers, rngs
        )
        self.norm_out = Modulation(c.dim, 2, **options)
        self.proj_out = layers.Linear(c.dim, c.in_channels, **options)
        self.depth, self.axes, self.remat = c.feature_blocks, c.axes_dims_rope, remat

    def __call__(
        self,
        x_BHWC: jax.Array,
        t_B: jax.Array,
        text_BLD: jax.Array,
        pooled_BP: jax.Array,
        guidance_B: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity for noisy latents.

        Args:
          x_BHWC: latents, not packed; H and W even.
          t_B: timesteps in [0, 1000], integer or fractional.
          text_BLD: prompt embeddings, all of which are attended to.
          pooled_BP: pooled embedding of the prompt.
          guidance_B: guidance scales, of networks with `guidance_embeds`.

        Returns: [B, H, W, C] in the compute dtype.
        Raises: InputError for an odd size, or without a needed guidance scale.
        """
        inputs = x_BHWC, t_B, text_BLD, pooled_BP, guidance_B
        ((x_BND, _),), emb_B1D = self._trunk((self.depth,), *inputs)
        scale, shift = self.norm_out(emb_B1D)
        x_BND = self.proj_out(modulate(layers.layer_norm(x_BND, EPS), shift, scale))
        return layers.unpatchify(x_BND, *x_BHWC.shape[1:3], PATCH, channels_first=True)

    def features(self, x_BHWC, t_B, text_BLD, pooled_BP, guidance_B=None, *, blocks=()):
        """Image tokens [B, N, D] after the first half of the blocks; arguments as `__call__`.

        blocks: rising block numbers from 0: a tuple of the tokens after each, in one pass.
        """
        counts = [block + 1 for block in blocks] or [(self.depth + 1) // 2]
        inputs = x_BHWC, t_B, text_BLD, pooled_BP, guidance_B
        streams, _ = self._trunk(counts, *inputs)
        return tuple(x_BND for x_BND, _ in streams) if blocks else streams[0][0]

    def _trunk(self, counts, x_BHWC, t_B, text_BLD, pooled_BP, guidance_B):
        """Both streams after each of `counts` blocks, and the embedding that modulates them."""
        emb_BD = self.time_text_embed(t_B, pooled_BP, guidance_B)
        emb_B1D = jax.nn.silu(emb_BD)[:, None]
        tokens = layers.patchify(x_BHWC, PATCH, channels_first=True)
        streams = self.x_embedder(tokens), self.context_embedder(text_BLD)
        rows, columns = (n // PATCH for n in x_BHWC.shape[1:3])
        # The text's tokens are all at the origin, where nothing is rotated.
        sides = zip((1, rows, columns), self.axes, strict=True)
        rotation = grid_rotation(*(axis_rotation(range(n), dim, THETA) for n, dim in sides))

        def call(block, both):
            return block(*both, emb_B1D, self.remat is True, rotation)

        stacks = self.double_blocks, self.single_blocks
        return scan_stacks(stacks, streams, counts, call, self.remat)[0], emb_B1D
