"""AutoencoderDC, the deep-compression autoencoder of Sana (diffusers' class of that name).

Images are NHWC in [-1, 1]; latents are NHWC, 2^(stages - 1) times smaller per side (32 in the
published ones). Same interface as autoencoder_kl, but deterministic: `encode` gives one latent.
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
from gadjax.models.keymap import KeyMap
from gadjax.models.layers import numbered
from gadjax.models.module import Keys
from gadjax.models.sana.blocks import RMSNorm
from gadjax.models.vae.dc_blocks import (
    Downsample,
    EfficientViTBlock,
    ResBlock,
    Stage,
    Upsample,
    average_channels,
    conv,
    numbered_values,
    repeat_channels,
)

CLASS_NAMES = ("AutoencoderDC",)

BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")

# Option -> (its one supported value, diffusers' default).
FIXED = {
    "downsample_block_type": ("Conv", "pixel_unshuffle"),
    "upsample_block_type": ("interpolate", "pixel_shuffle"),
    "encoder_out_shortcut": (True, True),
    "decoder_in_shortcut": (True, True),
    "decoder_conv_act_fn": ("relu", "relu"),
}
STAGED_FIXED = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}


@dataclass(frozen=True)
class Config:
    """Options of the network and the scale of its latents, named as in config.json."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] | str = "ResBlock"
    decoder_block_types: tuple[str, ...] | str = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    scaling_factor: float = 1.0

    @property
    def upscale(self) -> int:
        """Downsampling factor of the autoencoder: pixels per latent, per side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @classmethod
    def from_dict(cls, cfg: dict[str, Any]) -> "Config":
        """Read a config.json. Raises: InputError naming the key of an unsupported option."""
        cfg = {k: v for k, v in cfg.items() if v is not None}
        for key, (supported, absent) in FIXED.items():
            if (value := cfg.get(key, absent)) != supported:
                refuse(key, value, repr(supported))
        for key, supported in STAGED_FIXED.items():
            values = cfg.get(key, supported)
            if set([values] if isinstance(values, str) else values) != {supported}:
                refuse(key, values, repr(supported))
        given = read_options(cls, cfg, "no such option", others={*FIXED, *STAGED_FIXED})
        config = cls(**{k: _frozen(v) for k, v in given.items()})
        for side in ("encoder", "decoder"):
            config.stages(side)
        if len(config.encoder_block_out_channels) != len(config.decoder_block_out_channels):
            raise InputError(
                f"decoder_block_out_channels: found {len(config.decoder_block_out_channels)} "
                f"stages; expected {len(config.encoder_block_out_channels)}, as in the encoder"
            )
        return config

    def stages(self, side: str) -> list[Stage]:
        """Stages of the "encoder" or "decoder", from the highest resolution to the latent.

        Raises: InputError naming a key for another number of stages, or for an impossible one.
        """
        prefix = f"{side}_block"
        widths = getattr(self, f"{prefix}_out_channels")
        types = getattr(self, f"{prefix}_types")
        rows = {
            f"{prefix}_types": (types,) * len(widths) if isinstance(types, str) else types,
            f"{prefix}_out_channels": widths,
            f"{side}_layers_per_block": getattr(self, f"{side}_layers_per_block"),
            f"{side}_qkv_multiscales": getattr(self, f"{side}_qkv_multiscales"),
        }
        for key, row in rows.items():
            if len(row) != len(widths):
                raise InputError(f"{key}: found {list(row)}; expected {len(widths)} stages")
        stages = [Stage(*row) for row in zip(*rows.values(), strict=True)]
        for stage in stages:
            if stage.type not in BLOCK_TYPES:
                raise InputError(
                    f"{prefix}_types: found {stage.type!r}; expected {' or '.join(BLOCK_TYPES)}"
                )
            if stage.layers < 1:
                raise InputError(
                    f"{side}_layers_per_block: found {stage.layers}; expected at least 1 per stage"
                )
        # The shortcuts average or repeat a whole number of channels; 4 pixels become 1.
        steps = [(4 * a, b) for a, b in zip(widths, widths[1:], strict=False)]
        if any(many % few for many, few in [*steps, (widths[-1], self.latent_channels)]):
            raise InputError(
                f"{prefix}_out_channels: found {list(widths)}; expected each to divide four times "
                f"the one before, and latent_channels {self.latent_channels} to divide the last"
            )
        return stages


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def scale(latent_BHWC: jax.Array, config: Config) -> jax.Array:
    """Scale raw latents [..., C] to those of the denoiser."""
    return latent_BHWC * config.scaling_factor


def unscale(latent_BHWC: jax.Array, config: Config) -> jax.Array:
    """Undo `scale`: the denoiser's latents [..., C] -> raw ones, which `decode` takes."""
    return latent_BHWC / config.scaling_factor


def build(
    config: Config, *, dtype: jnp.dtype = jnp.float32, remat: bool = True
) -> Callable[[Keys], nnx.Module]:
    """Constructor of the autoencoder, for `functional`; its methods are "encode" and "decode".

    Args:
      config: the network's options.
      dtype: of the convolutions' computation.
      remat: rematerialisation of every block.
    """
    return lambda rngs: AutoencoderDC(config, remat, {"dtype": dtype, "rngs": rngs})


def _blocks(stage: Stage, head_dim: int, options: dict[str, Any]) -> list[nnx.Module]:
    if stage.type == "ResBlock":
        return [ResBlock(stage, options) for _ in range(stage.layers)]
    return [EfficientViTBlock(stage, head_dim, options) for _ in range(stage.layers)]


def _run(stage: nnx.Dict, x_BHWC, remat: bool):
    for module in numbered_values(stage):
        call = type(module).__call__
        x_BHWC = (jax.checkpoint(call) if remat else call)(module, x_BHWC)
    return x_BHWC


class Encoder(nnx.Module):
    """Encoder: image [B, H, W, in] -> latent [B, h, w, latent]."""

    def __init__(self, config: Config, remat: bool, options: dict[str, Any]):
        stages = config.stages("encoder")
        blocks = [_blocks(stage, config.attention_head_dim, options) for stage in stages]
        for level, fine, coarse in zip(blocks, stages, stages[1:], strict=False):
            level.append(Downsample(fine.width, coarse.width, options))
        self.conv_in = conv(config.in_channels, stages[0].width, **options)
        self.down_blocks = numbered(map(numbered, blocks))
        self.conv_out = conv(stages[-1].width, config.latent_channels, **options)
        self.remat = remat

    def __call__(self, x_BHWC):
        x_BHWC = self.conv_in(x_BHWC)
        for stage in numbered_values(self.down_blocks):
            x_BHWC = _run(stage, x_BHWC, self.remat)
        out_BHWC = self.conv_out(x_BHWC)
        return out_BHWC + average_channels(x_BHWC, out_BHWC.shape[-1])


class Decoder(nnx.Module):
    """Decoder: latent [B, h, w, latent] -> image [B, H, W, in]."""

    def __init__(self, config: Config, remat: bool, options: dict[str, Any]):
        stages = config.stages("decoder")
        blocks = [_blocks(stage, config.attention_head_dim, options) for stage in stages]
        for level, fine, coarse in zip(blocks, stages, stages[1:], strict=False):
            level.insert(0, Upsample(coarse.width, fine.width, options))
        self.conv_in = conv(config.latent_channels, stages[-1].width, **options)
        self.up_blocks = numbered(map(numbered, blocks))
        self.norm_out = RMSNorm(stages[0].width, use_bias=True)
        self.conv_out = conv(stages[0].width, config.in_channels, **options)
        self.remat = remat

    def __call__(self, x_BHWC):
        wide_BHWC = self.conv_in(x_BHWC)
        x_BHWC = wide_BHWC + repeat_channels(x_BHWC, wide_BHWC.shape[-1])
        for stage in reversed(numbered_values(self.up_blocks)):
            x_BHWC = _run(stage, x_BHWC, self.remat)
        return self.conv_out(jax.nn.relu(self.norm_out(x_BHWC)))


class AutoencoderDC(nnx.Module):
    """Encoder and decoder. Source: diffusers, models/autoencoders/autoencoder_dc.py."""

    def __init__(self, config: Config, remat: bool, options: dict[str, Any]):
        self.encoder = Encoder(config, remat, options)
        self.decoder = Decoder(config, remat, options)
        self.upscale = config.upscale

    def encode(self, image_BHWC: jax.Array) -> tuple[jax.Array, None]:
        """Encode an image [B, H, W, in]: raw latent [B, h, w, latent], None for its log-variance.

        Raises: InputError for sides that are not multiples of `Config.upscale`.
        """
        height, width = image_BHWC.shape[1:3]
        if height % self.upscale or width % self.upscale:
            raise InputError(
                f"image: found {height} x {width}; expected multiples of {self.upscale}"
            )
        return self.encoder(image_BHWC), None

    def decode(self, latent_BHWC: jax.Array) -> jax.Array:
        """Decode a raw latent [B, h, w, latent]: image [B, H, W, in], not clipped."""
        return self.decoder(latent_BHWC)


FAMILY = Autoencoder(
    class_names=CLASS_NAMES,
    config=Config,
    build=build,
    keymap=KeyMap(),
    # The last convolution of each half is sharded along its inputs, since its outputs are few.
    rules=(
        (
            r"/(conv_in|conv|conv1|conv2|conv_inverted|conv_depth)/kernel$",
            P(None, None, None, "fsdp"),
        ),
        (r"/(conv_out|conv_point)/kernel$", P(None, None, "fsdp", None)),
        (r"/proj_(in|out)/kernel$", P(None, None, None, "fsdp")),
        (r"/to_(q|k|v|out)/kernel$", P("fsdp", None)),
    ),
    scale=scale,
    unscale=unscale,
)
