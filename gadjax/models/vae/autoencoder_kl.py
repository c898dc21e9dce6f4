"""AutoencoderKL, the VAE of SD, SDXL, PixArt, SD3 and FLUX (diffusers' class of that name).

Images are NHWC in [-1, 1]; latents are NHWC, 2^(blocks - 1) times smaller per side. `encode` and
`decode` use raw latents: `scale` and `unscale` convert to and from those of the denoiser.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gadjax.errors import InputError
from gadjax.models.config import read_options, refuse
from gadjax.models.family import Autoencoder
from gadjax.models.ignored import IGNORED
from gadjax.models.keymap import KeyMap
from gadjax.models.layers import Conv, Linear, numbered
from gadjax.models.module import Keys
from gadjax.ops.attention import attention

CLASS_NAMES = ("AutoencoderKL",)

EPSILON = 1e-6
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True)
class Config:
    """Options of the network and the scale of its latents, named as in config.json."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def upscale(self) -> int:
        """Downsampling factor of the VAE: pixels per latent, per side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, cfg: dict[str, Any]) -> "Config":
        """Read a config.json. Raises: InputError naming the key of an unsupported option."""
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        others = {*IGNORED[CLASS_NAMES[0]], *kinds, "act_fn"}
        # null means absent, as shift_factor and latents_mean of most.
        given = read_options(cls, cfg, "no such option", others=others)
        blocks = given["block_out_channels"] = tuple(given.get("block_out_channels", (64,)))
        for key, kind in kinds.items():
            value = list([kind] if cfg.get(key) is None else cfg[key])
            if value != (expected := [kind] * len(blocks)):
                refuse(key, value, str(expected))
        if cfg.get("act_fn") not in (None, "silu", "swish"):
            refuse("act_fn", cfg["act_fn"], "'silu'")
        config = cls(**given)
        if any(channels % config.norm_num_groups for channels in blocks):
            raise InputError(
                f"norm_num_groups: found {config.norm_num_groups}; "
                f"expected a divisor of every one of block_out_channels {list(blocks)}"
            )
        return config


def scale(latent_BHWC: jax.Array, config: Config) -> jax.Array:
    """Scale raw latents [..., C] to those of the denoiser."""
    return (latent_BHWC - config.shift_factor) * config.scaling_factor


def unscale(latent_BHWC: jax.Array, config: Config) -> jax.Array:
    """Undo `scale`: the denoiser's latents [..., C] -> raw ones, which `decode` takes."""
    return latent_BHWC / config.scaling_factor + config.shift_factor


def build(
    config: Config, *, dtype: jnp.dtype = jnp.float32, remat: bool = True
) -> Callable[[Keys], nnx.Module]:
    """Constructor of the VAE, for `functional`; its methods are "encode" and "decode".

    Args:
      config: the network's options.
      dtype: of the convolutions' computation.
      remat: rematerialisation of every residual block and of the attention, so that only their
        inputs are stored.
    """
    return lambda rngs: AutoencoderKL(
        config, _Layers(config.norm_num_groups, remat, {"dtype": dtype, "rngs": rngs})
    )


@dataclass(frozen=True)
class _Layers:
    """Layer factory with the settings that all layers of the network share."""

    groups: int
    remat: bool
    options: dict[str, Any]  # of every layer: dtype and rngs

    def conv(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nnx.Conv:
        # A stride of 2 pads below and to the right only.
        pad = (0, 1) if stride == 2 else (size // 2, size // 2)
        return Conv(inputs, outputs, (size, size), stride, padding=(pad, pad), **self.options)

    def norm(self, channels: int) -> nnx.GroupNorm:
        # Statistics are in float32 at least; the fast variance would lose digits.
        return nnx.GroupNorm(
            channels, self.groups, epsilon=EPSILON, use_fast_variance=False, **self.options
        )


def _run(modules: nnx.Dict, x_BHWC):
    for i in range(len(modules)):
        x_BHWC = modules[str(i)](x_BHWC)
    return x_BHWC


class _Checkpointed(nnx.Module):
    """Module with rematerialisation: reverse mode recomputes `body(x)` if `remat` is set."""

    def __call__(self, x_BHWC):
        body = type(self).body
        return (jax.checkpoint(body) if self.remat else body)(self, x_BHWC)


class ResnetBlock2D(_Checkpointed):
    """Residual block: two (norm, SiLU, convolution); a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, layers: _Layers):
        self.norm1 = layers.norm(inputs)
        self.conv1 = layers.conv(inputs, outputs)
        self.norm2 = layers.norm(outputs)
        self.conv2 = layers.conv(outputs, outputs)
        self.conv_shortcut = layers.conv(inputs, outputs, 1) if inputs != outputs else None
        self.remat = layers.remat

    def body(self, x_BHWC):
        h_BHWC = self.conv1(nnx.silu(self.norm1(x_BHWC)))
        h_BHWC = self.conv2(nnx.silu(self.norm2(h_BHWC)))
        return h_BHWC + (x_BHWC if self.conv_shortcut is None else self.conv_shortcut(x_BHWC))


class Attention(_Checkpointed):
    """Residual self-attention of all positions, with one head and a group norm before it."""

    def __init__(self, channels: int, layers: _Layers):
        self.group_norm = layers.norm(channels)
        for name in ("to_q", "to_k", "to_v", "to_out"):
            setattr(self, name, Linear(channels, channels, **layers.options))
        self.remat = layers.remat

    def body(self, x_BHWC):
        h_BL1C = self.group_norm(x_BHWC).reshape(len(x_BHWC), -1, 1, x_BHWC.shape[-1])
        h_BL1C = attention(self.to_q(h_BL1C), self.to_k(h_BL1C), self.to_v(h_BL1C))
        return x_BHWC + self.to_out(h_BL1C).reshape(x_BHWC.shape)


class MidBlock(nnx.Module):
    """Middle block: residual block, attention (optional), residual block."""

    def __init__(self, channels: int, attention: bool, layers: _Layers):
        self.resnets = numbered(ResnetBlock2D(channels, channels, layers) for _ in range(2))
        self.attentions = numbered([Attention(channels, layers)] if attention else [])

    def __call__(self, x_BHWC):
        x_BHWC = self.resnets["0"](x_BHWC)
        return self.resnets["1"](_run(self.attentions, x_BHWC))


class Downsample2D(nnx.Module):
    """Downsample by 2 with a strided convolution."""

    def __init__(self, channels: int, layers: _Layers):
        self.conv = layers.conv(channels, channels, stride=2)

    def __call__(self, x_BHWC):
        return self.conv(x_BHWC)


class Upsample2D(nnx.Module):
    """Upsample by 2: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, layers: _Layers):
        self.conv = layers.conv(channels, channels)

    def __call__(self, x_BHWC):
        return self.conv(jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2))


def _resnets(inputs: int, outputs: int, count: int, layers: _Layers) -> nnx.Dict:
    return numbered(ResnetBlock2D(outputs if i else inputs, outputs, layers) for i in range(count))


class DownBlock(nnx.Module):
    """Residual blocks, then Downsample2D in all blocks but the last."""

    def __init__(self, inputs: int, outputs: int, count: int, last: bool, layers: _Layers):
        self.resnets = _resnets(inputs, outputs, count, layers)
        self.downsamplers = numbered([] if last else [Downsample2D(outputs, layers)])

    def __call__(self, x_BHWC):
        return _run(self.downsamplers, _run(self.resnets, x_BHWC))


class UpBlock(nnx.Module):
    """Residual blocks, then Upsample2D in all blocks but the last."""

    def __init__(self, inputs: int, outputs: int, count: int, last: bool, layers: _Layers):
        self.resnets = _resnets(inputs, outputs, count, layers)
        self.upsamplers = numbered([] if last else [Upsample2D(outputs, layers)])

    def __call__(self, x_BHWC):
        return _run(self.upsamplers, _run(self.resnets, x_BHWC))


def _blocks(make, widths: tuple[int, ...], count: int, layers: _Layers) -> nnx.Dict:
    return numbered(
        make(widths[max(i - 1, 0)], width, count, i == len(widths) - 1, layers)
        for i, width in enumerate(widths)
    )


class Encoder(nnx.Module):
    """Encoder: image [B, H, W, in] -> mean and log-variance [B, h, w, 2 latent]."""

    def __init__(self, config: Config, layers: _Layers):
        widths = config.block_out_channels
        self.conv_in = layers.conv(config.in_channels, widths[0])
        self.down_blocks = _blocks(DownBlock, widths, config.layers_per_block, layers)
        self.mid_block = MidBlock(widths[-1], config.mid_block_add_attention, layers)
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, x_BHWC):
        x_BHWC = self.mid_block(_run(self.down_blocks, self.conv_in(x_BHWC)))
        return self.conv_out(nnx.silu(self.conv_norm_out(x_BHWC)))


class Decoder(nnx.Module):
    """Decoder: latent [B, h, w, latent] -> image [B, H, W, out].

    It has one more residual block per stage than the encoder.
    """

    def __init__(self, config: Config, layers: _Layers):
        widths = config.block_out_channels[::-1]
        self.conv_in = layers.conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], config.mid_block_add_attention, layers)
        self.up_blocks = _blocks(UpBlock, widths, config.layers_per_block + 1, layers)
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], config.out_channels)

    def __call__(self, x_BHWC):
        x_BHWC = _run(self.up_blocks, self.mid_block(self.conv_in(x_BHWC)))
        return self.conv_out(nnx.silu(self.conv_norm_out(x_BHWC)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder. Source: diffusers, models/autoencoders/autoencoder_kl.py."""

    def __init__(self, config: Config, layers: _Layers):
        latent = config.latent_channels
        self.encoder = Encoder(config, layers)
        self.decoder = Decoder(config, layers)
        self.quant_conv = layers.conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = (
            layers.conv(latent, latent, 1) if config.use_post_quant_conv else None
        )

    def encode(self, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode an image [B, H, W, in]: mean and clamped log-variance, both [B, h, w, latent]."""
        moments_BHWC = self.encoder(image_BHWC)
        if self.quant_conv is not None:
            moments_BHWC = self.quant_conv(moments_BHWC)
        mean_BHWC, logvar_BHWC = jnp.split(moments_BHWC, 2, axis=-1)
        return mean_BHWC, jnp.clip(logvar_BHWC, LOGVAR_MIN, LOGVAR_MAX)

    def decode(self, latent_BHWC: jax.Array) -> jax.Array:
        """Decode a raw latent [B, h, w, latent]: image [B, H, W, out], not clipped."""
        if self.post_quant_conv is not None:
            latent_BHWC = self.post_quant_conv(latent_BHWC)
        return self.decoder(latent_BHWC)


FAMILY = Autoencoder(
    class_names=CLASS_NAMES,
    config=Config,
    build=build,
    keymap=KeyMap(
        renames=((r"to_out/", "to_out/0/"),),
        # Keys of the middle block's attention in the first Stable Diffusion releases.
        aliases=(
            (r"(mid_block\.attentions\.\d+\.)query\.", r"\1to_q."),
            (r"(mid_block\.attentions\.\d+\.)key\.", r"\1to_k."),
            (r"(mid_block\.attentions\.\d+\.)value\.", r"\1to_v."),
            (r"(mid_block\.attentions\.\d+\.)proj_attn\.", r"\1to_out.0."),
        ),
    ),
    # conv_out is sharded along its inputs, since its outputs are a handful of channels.
    rules=(
        (r"/(conv_in|conv|conv1|conv2|conv_shortcut)/kernel$", P(None, None, None, "fsdp")),
        (r"/conv_out/kernel$", P(None, None, "fsdp", None)),
        (r"/to_(q|k|v|out)/kernel$", P("fsdp", None)),
    ),
    scale=scale,
    unscale=unscale,
)
