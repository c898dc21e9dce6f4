"""U-Net blocks: residual blocks, transformers over positions, down- and upsampling.

Shapes: x_BHWC feature maps, x_BND tokens (positions row by row), temb_BE timestep embedding;
`texts` iterates over the transformers' contexts: prompt embeddings, or their KV caches. Modules
that a file numbers are in an nnx.Dict under those numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.layers import numbered
from gadjax.models.module import Keys, scan_blocks, stack
from gadjax.models.unet.config import Config
from gadjax.parallel.placement import constrain_batch

TRANSFORMER_NORM_EPS = 1e-6  # of the group norm, which does not follow norm_eps
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Maker:
    """Layer factory with the settings that all layers of the network share."""

    config: Config
    remat: bool
    options: dict[str, Any]  # of every layer: dtype, and Keys as rngs

    @property
    def time_dim(self) -> int:
        return 4 * self.config.block_out_channels[0]

    def conv(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nnx.Conv:
        pad = (size // 2, size // 2)
        return layers.Conv(
            inputs, outputs, (size, size), stride, padding=(pad, pad), **self.options
        )

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        return layers.Linear(inputs, outputs, **self.options)

    def norm(self, channels: int, eps: float | None = None) -> nnx.GroupNorm:
        # Statistics are in float32 at least; the fast variance would lose digits.
        return nnx.GroupNorm(
            channels,
            self.config.norm_num_groups,
            epsilon=self.config.norm_eps if eps is None else eps,
            use_fast_variance=False,
            **self.options,
        )


class ResnetBlock2D(nnx.Module):
    """Residual block: two (norm, SiLU, convolution) with the timestep embedding added between."""

    def __init__(self, inputs: int, outputs: int, make: Maker):
        self.norm1 = make.norm(inputs)
        self.conv1 = make.conv(inputs, outputs)
        self.time_emb_proj = make.linear(make.time_dim, outputs)
        self.norm2 = make.norm(outputs)
        self.conv2 = make.conv(outputs, outputs)
        self.conv_shortcut = make.conv(inputs, outputs, 1) if inputs != outputs else None
        self.remat = make.remat

    def __call__(self, x_BHWC, temb_BE):
        body = type(self).body
        body = jax.checkpoint(body) if self.remat else body
        return constrain_batch(body(self, constrain_batch(x_BHWC), temb_BE))

    def body(self, x_BHWC, temb_BE):
        h_BHWC = self.conv1(nnx.silu(self.norm1(x_BHWC)))
        h_BHWC = h_BHWC + self.time_emb_proj(nnx.silu(temb_BE))[:, None, None]
        h_BHWC = self.conv2(nnx.silu(self.norm2(h_BHWC)))
        return h_BHWC + (x_BHWC if self.conv_shortcut is None else self.conv_shortcut(x_BHWC))


class GatedMlp(nnx.Module):
    """GEGLU feed-forward: linear, value * gelu(gate), linear. Shazeer, arXiv:2002.05202."""

    def __init__(self, dim: int, hidden: int, *, dtype, rngs: Keys):
        self.linear_1 = layers.Linear(dim, 2 * hidden, dtype=dtype, rngs=rngs)
        self.linear_2 = layers.Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND):
        value, gate = jnp.split(self.linear_1(x_BND), 2, axis=-1)
        return self.linear_2(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and feed-forward."""

    def __init__(self, dim: int, heads: int, text_dim: int, *, dtype, rngs: Keys):
        def norm():
            return nnx.LayerNorm(
                dim, epsilon=LAYER_NORM_EPS, use_fast_variance=False, dtype=dtype, rngs=rngs
            )

        def attn(context_dim):
            return layers.Attention(
                dim,
                heads,
                dim // heads,
                context_dim=context_dim,
                bias=False,
                dtype=dtype,
                rngs=rngs,
            )

        self.norm1, self.attn1 = norm(), attn(dim)
        self.norm2, self.attn2 = norm(), attn(text_dim)
        self.norm3, self.ff = norm(), GatedMlp(dim, 4 * dim, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND, text):
        x_BND = x_BND + self.attn1(self.norm1(x_BND))
        x_BND = x_BND + self.attn2(self.norm2(x_BND), text)
        return x_BND + self.ff(self.norm3(x_BND))


class Transformer2D(nnx.Module):
    """Stack of transformer blocks over the positions of a feature map, with a residual."""

    def __init__(self, channels: int, heads: int, depth: int, make: Maker):
        text_dim, dtype = make.config.cross_attention_dim, make.options["dtype"]
        self.norm = make.norm(channels, TRANSFORMER_NORM_EPS)
        # The same product either way; in some files its kernel is a 1x1 convolution's.
        self.linear = make.config.use_linear_projection
        if self.linear:
            self.proj_in = make.linear(channels, channels)
            self.proj_out = make.linear(channels, channels)
        else:
            self.proj_in_1x1 = make.conv(channels, channels, 1)
            self.proj_out_1x1 = make.conv(channels, channels, 1)
        self.transformer_blocks = stack(
            lambda r: TransformerBlock(channels, heads, text_dim, dtype=dtype, rngs=r),
            depth,
            make.options["rngs"],
        )
        self.remat = make.remat

    def __call__(self, x_BHWC, text):
        enter = self.proj_in if self.linear else self.proj_in_1x1
        leave = self.proj_out if self.linear else self.proj_out_1x1
        h_BHWC = enter(self.norm(x_BHWC))
        h_BND = scan_blocks(
            self.transformer_blocks,
            h_BHWC.reshape(len(h_BHWC), -1, h_BHWC.shape[-1]),
            lambda block, h_BND, text: block(h_BND, text),
            self.remat,
            context=text,
        )
        return x_BHWC + leave(h_BND.reshape(x_BHWC.shape))


def _transformers(count: int, channels: int, level: int, make: Maker) -> nnx.Dict:
    heads = make.config.attention_head_dim[level]
    depth = make.config.transformer_layers_per_block[level]
    return numbered(Transformer2D(channels, heads, depth, make) for _ in range(count))


class Downsample2D(nnx.Module):
    """Downsample by 2 with a strided convolution."""

    def __init__(self, channels: int, make: Maker):
        self.conv = make.conv(channels, channels, stride=2)

    def __call__(self, x_BHWC):
        return self.conv(x_BHWC)


class Upsample2D(nnx.Module):
    """Upsample by 2: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, make: Maker):
        self.conv = make.conv(channels, channels)

    def __call__(self, x_BHWC):
        return self.conv(jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2))


class DownBlock(nnx.Module):
    """Residual blocks, each followed by a transformer if `cross`; downsamples unless last."""

    def __init__(self, level: int, inputs: int, make: Maker):
        c = make.config
        width, count = c.block_out_channels[level], c.layers_per_block
        self.cross = c.down_block_types[level].startswith("Cross")
        self.resnets = numbered(
            ResnetBlock2D(width if i else inputs, width, make) for i in range(count)
        )
        self.attentions = _transformers(count if self.cross else 0, width, level, make)
        last = level == len(c.block_out_channels) - 1
        self.downsamplers = numbered([] if last else [Downsample2D(width, make)])

    def __call__(self, x_BHWC, temb_BE, texts: Iterator) -> list[jax.Array]:
        """Skip connections: the result of every layer, the output last."""
        states = []
        for i in range(len(self.resnets)):
            x_BHWC = self.resnets[str(i)](x_BHWC, temb_BE)
            if self.cross:
                x_BHWC = self.attentions[str(i)](x_BHWC, next(texts))
            states.append(x_BHWC)
        if self.downsamplers:
            states.append(self.downsamplers["0"](x_BHWC))
        return states


class MidBlock(nnx.Module):
    """Residual block, transformer, residual block."""

    def __init__(self, make: Maker):
        width = make.config.block_out_channels[-1]
        self.resnets = numbered(ResnetBlock2D(width, width, make) for _ in range(2))
        self.attentions = _transformers(1, width, -1, make)

    def __call__(self, x_BHWC, temb_BE, texts: Iterator):
        x_BHWC = self.attentions["0"](self.resnets["0"](x_BHWC, temb_BE), next(texts))
        return self.resnets["1"](x_BHWC, temb_BE)


class UpBlock(nnx.Module):
    """Mirror of DownBlock: every residual block also reads a skip connection; then upsamples.

    Args:
      level: index in the configuration, from the largest feature maps; level 0 does not upsample.
      inputs: channels of the input.
      skips: channels of the skip connections, one for each residual block.
      cross: whether every residual block is followed by a transformer.
      make: layer factory.
    """

    def __init__(self, level: int, inputs: int, skips: list[int], cross: bool, make: Maker):
        width = make.config.block_out_channels[level]
        self.cross = cross
        self.resnets = numbered(
            ResnetBlock2D((width if i else inputs) + skip, width, make)
            for i, skip in enumerate(skips)
        )
        self.attentions = _transformers(len(skips) if cross else 0, width, level, make)
        self.upsamplers = numbered([Upsample2D(width, make)] if level else [])

    def __call__(self, x_BHWC, skips: list[jax.Array], temb_BE, texts: Iterator):
        """Output of the block; `skips`: one skip connection for each residual block, in order."""
        for i, skip_BHWC in enumerate(skips):
            both = jnp.concatenate([x_BHWC, skip_BHWC], axis=-1)
            x_BHWC = self.resnets[str(i)](both, temb_BE)
            if self.cross:
                x_BHWC = self.attentions[str(i)](x_BHWC, next(texts))
        return self.upsamplers["0"](x_BHWC) if self.upsamplers else x_BHWC
