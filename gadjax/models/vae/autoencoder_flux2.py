"""FLUX.2's autoencoder (diffusers AutoencoderKLFlux2): AutoencoderKL with normalised patches.

Latents are those of FLUX.2's pipelines: patches of 2 x 2 raw ones, in the order (C, p, p), without
the mean and the deviation that the files have of each of their channels, as statistics of a batch
norm. They need no scale.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models.config import POSITIVE_NUMBER, is_positive, refuse
from gadjax.models.family import Autoencoder
from gadjax.models.ignored import IGNORED, IGNORED_TENSORS
from gadjax.models.keymap import KeyMap
from gadjax.models.layers import patchify, unpatchify
from gadjax.models.module import Keys
from gadjax.models.vae import autoencoder_kl as kl

CLASS_NAMES = ("AutoencoderKLFlux2",)
PATCH = 2
FIXED = {"patch_size": [PATCH, PATCH], "decoder_block_out_channels": None}
DEFAULTS = {  # where they are not AutoencoderKL's
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 32,
}


@dataclass(frozen=True)
class Config(kl.Config):
    """Options of the network, named as in config.json.

    latent_channels is the denoiser's, a patch's: four times that of config.json.
    """

    batch_norm_eps: float = 1e-4

    @property
    def upscale(self) -> int:
        """Downsampling factor: pixels per patch, per side."""
        return PATCH * super().upscale

    @property
    def raw(self) -> "Config":
        """Options of the network without patches."""
        return replace(self, latent_channels=self.latent_channels // PATCH**2)

    @classmethod
    def from_dict(cls, cfg: dict[str, Any]) -> "Config":
        """Read a config.json. Raises: InputError naming the key of an unsupported option."""
        given = {key: value for key, value in cfg.items() if value is not None}
        for key, value in FIXED.items():
            if (option := given.pop(key, value)) != value:
                refuse(key, option, repr(value))
        for key in given.keys() & {"scaling_factor", "shift_factor"}:
            refuse(key, given[key], "no such option")
        given = {key: given[key] for key in given if key not in IGNORED[CLASS_NAMES[0]]}
        config = super().from_dict(DEFAULTS | given)
        if not is_positive(config.batch_norm_eps, int, float):
            refuse("batch_norm_eps", config.batch_norm_eps, POSITIVE_NUMBER)
        return replace(config, latent_channels=PATCH**2 * config.latent_channels)


def build(
    config: Config, *, dtype: jnp.dtype = jnp.float32, remat: bool = True
) -> Callable[[Keys], nnx.Module]:
    """Constructor of the autoencoder, as `autoencoder_kl.build`."""
    network = kl.build(config.raw, dtype=dtype, remat=remat)
    return lambda rngs: AutoencoderKLFlux2(config, network(rngs))


class Statistics(nnx.Module):
    """Mean and variance of the channels of a patch, which the files hold and nothing trains."""

    def __init__(self, channels: int):
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))


class AutoencoderKLFlux2(nnx.Module):
    """AutoencoderKL and the statistics of its patches.

    Source: diffusers, pipelines/flux2/pipeline_flux2_klein.py.
    """

    def __init__(self, config: Config, network: kl.AutoencoderKL):
        self.network, self.bn = network, Statistics(config.latent_channels)
        self.eps = config.batch_norm_eps

    def _variance(self, dtype) -> jax.Array:
        """Variance [C] of a patch's channels, in at least float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return self.bn.running_var[...].astype(wide) + self.eps

    def encode(self, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode an image [B, H, W, in]: mean and log-variance of the latents, both [B, h, w, C].

        Raises: InputError for an image that has no whole patches.
        """
        mean_BHWC, logvar_BHWC = (_patches(a) for a in self.network.encode(image_BHWC))
        dtype, variance = mean_BHWC.dtype, self._variance(mean_BHWC.dtype)
        centred = mean_BHWC.astype(variance.dtype) - self.bn.running_mean[...]
        scaled = centred / jnp.sqrt(variance), logvar_BHWC - jnp.log(variance)
        return tuple(array.astype(dtype) for array in scaled)

    def decode(self, latent_BHWC: jax.Array) -> jax.Array:
        """Decode latents [B, h, w, C]: image [B, H, W, out], not clipped."""
        b, h, w, c = latent_BHWC.shape
        deviation = jnp.sqrt(self._variance(latent_BHWC.dtype))
        raw = latent_BHWC * deviation + self.bn.running_mean[...]
        raw = raw.astype(latent_BHWC.dtype).reshape(b, h * w, c)
        raw_BHWC = unpatchify(raw, PATCH * h, PATCH * w, PATCH, channels_first=True)
        return self.network.decode(raw_BHWC)


def _patches(raw_BHWC: jax.Array) -> jax.Array:
    """Raw latents [B, H, W, C] as patches [B, H / p, W / p, C p p]."""
    b, h, w, _ = raw_BHWC.shape
    patches = patchify(raw_BHWC, PATCH, channels_first=True)
    return patches.reshape(b, h // PATCH, w // PATCH, -1)


def torch_codec(network: Any) -> Any:
    """diffusers' network as one whose `encode` and `decode` have the latents of its pipeline."""
    mean = network.bn.running_mean[:, None, None]
    deviation = (network.bn.running_var + network.config.batch_norm_eps).sqrt()[:, None, None]

    def encode(image):
        raw = network.encode(image).latent_dist.mean
        b, c, h, w = raw.shape
        patches = raw.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 1, 3, 5, 2, 4)
        latent = (patches.reshape(b, -1, h // PATCH, w // PATCH) - mean) / deviation
        return SimpleNamespace(latent=latent)

    def decode(latent):
        b, c, h, w = latent.shape
        patches = (latent * deviation + mean).reshape(b, -1, PATCH, PATCH, h, w)
        return network.decode(
            patches.permute(0, 1, 4, 2, 5, 3).reshape(b, -1, PATCH * h, PATCH * w)
        )

    return SimpleNamespace(encode=encode, decode=decode)


FAMILY = Autoencoder(
    class_names=CLASS_NAMES,
    config=Config,
    build=build,
    keymap=KeyMap(
        renames=((r"^network/", ""), *kl.FAMILY.keymap.renames),
        ignored=tuple(IGNORED_TENSORS[CLASS_NAMES[0]]),
    ),
    rules=kl.FAMILY.rules,
    frozen=(r"^bn/",),
    scale=lambda latent_BHWC, config: latent_BHWC,
    unscale=lambda latent_BHWC, config: latent_BHWC,
    torch_codec=torch_codec,
)
