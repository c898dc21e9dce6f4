"""Latent U-Net with cross-attention to a prompt: Stable Diffusion 1.5, 2 and XL.

Rombach et al., arXiv:2112.10752; Podell et al., arXiv:2307.01952. Follows diffusers'
UNet2DConditionModel. Parameters are cast to the compute dtype at use.
"""

from collections.abc import Callable
from itertools import repeat

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.errors import InputError
from gadjax.models import layers
from gadjax.models.layers import numbered
from gadjax.models.module import Keys
from gadjax.models.unet.blocks import DownBlock, Maker, MidBlock, UpBlock
from gadjax.models.unet.config import TIME_IDS, Config
from gadjax.types import TextKV


def build(config: Config, *, dtype=jnp.float32, remat: bool = True) -> Callable:
    """Constructor of the network, called with Keys.

    Args:
      config: the network's options.
      dtype: of the computation; parameters are initialised in float32.
      remat: rematerialisation of every residual block and every transformer block.
    """
    return lambda rngs: UNet(config, dtype=dtype, remat=remat, rngs=rngs)


class UNet(nnx.Module):
    """U-Net denoiser; see `__call__`."""

    def __init__(self, config: Config, *, dtype, remat: bool, rngs: Keys):
        make = Maker(config, remat, {"dtype": dtype, "rngs": rngs})
        widths, count, time = config.block_out_channels, config.layers_per_block, make.time_dim

        def mlp(features):
            return layers.Mlp(features, time, time, jax.nn.silu, **make.options)

        self.conv_in = make.conv(config.in_channels, widths[0])
        self.time_embedding = mlp(widths[0])
        if config.pooled_dim is not None:
            self.add_embedding = mlp(config.projection_class_embeddings_input_dim)
        down, skips = [], [widths[0]]  # channels of the skip connections
        for level, width in enumerate(widths):
            down.append(DownBlock(level, skips[-1], make))
            skips += [width] * len(down[-1].resnets) + [width] * len(down[-1].downsamplers)
        self.down_blocks = numbered(down)
        self.mid_block = MidBlock(make)
        up, inputs = [], widths[-1]
        for level, kind in zip(reversed(range(len(widths))), config.up_block_types, strict=True):
            popped = [skips.pop() for _ in range(count + 1)]
            up.append(UpBlock(level, inputs, popped, kind.startswith("Cross"), make))
            inputs = widths[level]
        self.up_blocks = numbered(up)
        self.conv_norm_out = make.norm(widths[0])
        self.conv_out = make.conv(widths[0], config.out_channels)
        self.config = config

    def __call__(
        self,
        x_BHWC: jax.Array,
        t_B: jax.Array,
        text: jax.Array | list[TextKV],
        added_cond: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Raw output for noisy latents.

        Args:
          x_BHWC: latents; H and W multiples of `Config.multiple`, otherwise free.
          t_B: timesteps in [0, 1000), integer or fractional.
          text: prompt embeddings [B, L, D], padding included, or their KV cache from `text_kv`.
          added_cond: {"text_embeds": [B, Config.pooled_dim], "time_ids": [B, 6]};
            an input of networks with a `pooled_dim` (SDXL) alone, which need it.

        Returns: [B, H, W, out_channels] in the compute dtype.
        Raises: InputError for another size, or without a needed `added_cond`.
        """
        x_BHWC, skips, temb_BE, texts = self._down_path(x_BHWC, t_B, text, added_cond)
        for i in range(len(self.up_blocks)):
            block = self.up_blocks[str(i)]
            popped = [skips.pop() for _ in range(len(block.resnets))]
            x_BHWC = block(x_BHWC, popped, temb_BE, texts)
        return self.conv_out(nnx.silu(self.conv_norm_out(x_BHWC)))

    def features(self, x_BHWC, t_B, text, added_cond=None) -> jax.Array:
        """Middle block's output as tokens [B, N, D], row by row; arguments as `__call__`."""
        x_BHWC = self._down_path(x_BHWC, t_B, text, added_cond)[0]
        return x_BHWC.reshape(len(x_BHWC), -1, x_BHWC.shape[-1])

    def text_kv(self, text_BLD: jax.Array) -> list[TextKV]:
        """KV caches of a prompt, one for each transformer, in the order of evaluation."""
        down, up = (
            [blocks[str(i)] for i in range(len(blocks))]
            for blocks in (self.down_blocks, self.up_blocks)
        )
        return [
            layers.text_kv(block.attentions[str(i)].transformer_blocks, text_BLD)
            for block in (*down, self.mid_block, *up)
            for i in range(len(block.attentions))
        ]

    def _down_path(self, x_BHWC, t_B, text, added_cond):
        """Down path and middle block: (output, skip connections, timestep embedding, texts).

        `texts` iterates over the contexts of the transformers that are left, on the up path.
        """
        height, width = x_BHWC.shape[1:3]
        multiple = self.config.multiple
        if height % multiple or width % multiple:
            raise InputError(f"latents: found {height} x {width}; expected multiples of {multiple}")
        temb_BE = self._embed(t_B, added_cond)
        skips = [self.conv_in(x_BHWC)]
        texts = iter(text) if isinstance(text, list) else repeat(text)
        for i in range(len(self.down_blocks)):
            skips += self.down_blocks[str(i)](skips[-1], temb_BE, texts)
        return self.mid_block(skips[-1], temb_BE, texts), skips, temb_BE, texts

    def _embed(self, t_B, added_cond):
        """Timestep embedding [B, E], with SDXL's micro-conditioning and pooled prompt."""
        c = self.config
        temb_BE = self.time_embedding(layers.timestep_sinusoid(t_B, c.block_out_channels[0]))
        if c.pooled_dim is None:
            return temb_BE
        added_cond = added_cond or {}
        for name, count in (("text_embeds", c.pooled_dim), ("time_ids", TIME_IDS)):
            value, shape = added_cond.get(name), (t_B.shape[0], count)
            if value is None or value.shape != shape:
                given = "nothing" if value is None else f"shape {value.shape}"
                raise InputError(f"added_cond[{name!r}]: found {given}; expected an array {shape}")
        ids = layers.timestep_sinusoid(
            added_cond["time_ids"].reshape(-1), c.addition_time_embed_dim
        )
        both = jnp.concatenate([added_cond["text_embeds"], ids.reshape(len(t_B), -1)], axis=-1)
        return temb_BE + self.add_embedding(both)
