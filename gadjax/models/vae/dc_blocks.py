"""Blocks of AutoencoderDC; source: diffusers, models/autoencoders/autoencoder_dc.py."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models.layers import Conv, Linear, numbered
from gadjax.models.sana.blocks import GLUMBConv, RMSNorm, relu_linear_attention

EXPANSION = 4  # of the gated convolutions


@dataclass(frozen=True)
class Stage:
    """Blocks of one resolution: type, width, number, and kernel sizes of multiscale attention."""

    type: str
    width: int
    layers: int
    kernels: tuple[int, ...]


def conv(inputs: int, outputs: int, size: int = 3, **options) -> nnx.Conv:
    """Convolution with same padding: it keeps the resolution, if its stride is 1."""
    pad = (size // 2, size // 2)
    return Conv(inputs, outputs, (size, size), padding=(pad, pad), **options)


def numbered_values(modules: nnx.Dict) -> list[nnx.Module]:
    """Modules of a dict by number, in order; the inverse of `numbered`."""
    return [modules[str(i)] for i in range(len(modules))]


def pixel_unshuffle(x_BHWC: jax.Array) -> jax.Array:
    """[B, 2h, 2w, C] -> [B, h, w, 4C]; channel c's four pixels become 4c .. 4c + 3, row by row."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def pixel_shuffle(x_BHWC: jax.Array) -> jax.Array:
    """The inverse of `pixel_unshuffle`."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


def average_channels(x_BHWC: jax.Array, channels: int) -> jax.Array:
    """Average groups of neighbouring channels down to `channels`."""
    return x_BHWC.reshape(*x_BHWC.shape[:-1], channels, -1).mean(-1)


def repeat_channels(x_BHWC: jax.Array, channels: int) -> jax.Array:
    """Repeat every channel, next to itself, up to `channels`."""
    return jnp.repeat(x_BHWC, channels // x_BHWC.shape[-1], axis=-1)


class ResBlock(nnx.Module):
    """Residual block: convolution, SiLU, convolution, norm, plus the input."""

    def __init__(self, stage: Stage, options: dict[str, Any]):
        self.conv1 = conv(stage.width, stage.width, **options)
        self.conv2 = conv(stage.width, stage.width, use_bias=False, **options)
        self.norm = RMSNorm(stage.width, use_bias=True)

    def __call__(self, x_BHWC):
        return x_BHWC + self.norm(self.conv2(jax.nn.silu(self.conv1(x_BHWC))))


class MultiscaleProjection(nnx.Module):
    """Multiscale queries, keys and values: a depthwise convolution, then 1x1 ones in groups."""

    def __init__(self, channels: int, groups: int, size: int, options: dict[str, Any]):
        unbiased = {"use_bias": False, **options}
        self.proj_in = conv(channels, channels, size, feature_group_count=channels, **unbiased)
        self.proj_out = conv(channels, channels, 1, feature_group_count=groups, **unbiased)

    def __call__(self, x_BHWC):
        return self.proj_out(self.proj_in(x_BHWC))


class MultiscaleAttention(nnx.Module):
    """ReLU linear attention among all positions, once per scale, then a norm.

    diffusers computes the same weights explicitly if there are at most head_dim positions.
    """

    def __init__(self, stage: Stage, head_dim: int, options: dict[str, Any]):
        heads = stage.width // head_dim
        inner = heads * head_dim
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, Linear(stage.width, inner, use_bias=False, **options))
        self.to_qkv_multiscale = numbered(
            MultiscaleProjection(3 * inner, 3 * heads, size, options) for size in stage.kernels
        )
        merged = inner * (1 + len(stage.kernels))
        self.to_out = Linear(merged, stage.width, use_bias=False, **options)
        self.norm_out = RMSNorm(stage.width, use_bias=True)
        self.head_dim = head_dim

    def __call__(self, x_BHWC):
        qkv = jnp.concatenate([self.to_q(x_BHWC), self.to_k(x_BHWC), self.to_v(x_BHWC)], -1)
        scales = [qkv, *(project(qkv) for project in numbered_values(self.to_qkv_multiscale))]
        # A head takes neighbouring channels of all this, not a third of each projection: the
        # weights were trained so.
        b, h, w, _ = x_BHWC.shape
        qkv_BNH3K = jnp.concatenate(scales, -1).reshape(b, h * w, -1, 3, self.head_dim)
        out_BNHK = relu_linear_attention(*(qkv_BNH3K[..., i, :] for i in range(3)))
        return self.norm_out(self.to_out(out_BNHK.reshape(b, h, w, -1)))


class EfficientViTBlock(nnx.Module):
    """Multiscale attention and gated convolutions, both residual."""

    def __init__(self, stage: Stage, head_dim: int, options: dict[str, Any]):
        self.attn = MultiscaleAttention(stage, head_dim, options)
        self.conv_out = GLUMBConv(stage.width, EXPANSION * stage.width, use_norm=True, **options)

    def __call__(self, x_BHWC):
        x_BHWC = x_BHWC + self.attn(x_BHWC)
        return x_BHWC + self.conv_out(x_BHWC)


class Downsample(nnx.Module):
    """Downsample by 2: a strided convolution, plus a shortcut of averaged pixels."""

    def __init__(self, inputs: int, outputs: int, options: dict[str, Any]):
        self.conv = conv(inputs, outputs, strides=2, **options)

    def __call__(self, x_BHWC):
        out_BHWC = self.conv(x_BHWC)
        return out_BHWC + average_channels(pixel_unshuffle(x_BHWC), out_BHWC.shape[-1])


class Upsample(nnx.Module):
    """Upsample by 2: nearest neighbour and a convolution, plus a shortcut of shuffled channels."""

    def __init__(self, inputs: int, outputs: int, options: dict[str, Any]):
        self.conv = conv(inputs, outputs, **options)

    def __call__(self, x_BHWC):
        out_BHWC = self.conv(jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2))
        return out_BHWC + pixel_shuffle(repeat_channels(x_BHWC, 4 * out_BHWC.shape[-1]))
