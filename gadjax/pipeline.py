"""A diffusers pipeline folder as functions of parameters: text -> cond, latents <-> pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.convert.folder import PipelineFolder
from gadjax.convert.orbax_folder import open_folder
from gadjax.denoiser import Denoiser
from gadjax.errors import InputError
from gadjax.models.module import Functional, functional
from gadjax.models.text.tokenizer import Tokenizer, load_tokenizer
from gadjax.models.vae import autoencoder_kl
from gadjax.samplers import (
    Sampler,
    parameterization_from_config,
    sampler_from_config,
    schedule_from_config,
    tells_whole_times,
)
from gadjax.types import Cond, Params

NETWORKS = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The networks of one folder without their parameters, and what goes between them.

    latent: (H, W, C) of the denoiser at the size it was trained for.
    """

    folder: PipelineFolder
    networks: dict[str, Functional]
    denoiser: Denoiser
    sampler: Sampler
    tokenizer: Tokenizer
    latent: tuple[int, int, int]

    def encode_text(self, params: Params, ids_BL, mask_BL) -> Cond:
        """Token ids to what the denoiser is told. params: of the text encoder."""
        text = self.networks["text_encoder"].apply(params, ids_BL, mask_BL)
        return self.cond(text, mask_BL)

    def cond(self, text_BLD, mask_BL) -> Cond:
        """Text embeddings and the size that the pictures will have."""
        part = self.folder.components["transformer"]
        height, width = (side * self.upscale for side in self.latent[:2])
        extras = part.module.extras(part.spec, text_BLD.shape[0], height, width)
        return Cond(text_BLD, mask_BL, extras)

    @property
    def vae(self) -> autoencoder_kl.Config:
        return self.folder.components["vae"].spec

    @property
    def upscale(self) -> int:
        return 2 ** (len(self.vae.block_out_channels) - 1)

    def encode_image(self, params: Params, image_BHWC):
        """Pictures in [-1, 1] to the denoiser's latents (the posterior's mean)."""
        mean, _ = self.networks["vae"].apply(params, image_BHWC, method="encode")
        return autoencoder_kl.scale(mean.astype(jnp.float32), self.vae)

    def decode(self, params: Params, latent_BHWC):
        """The denoiser's latents to pictures in [-1, 1], clipped."""
        raw = autoencoder_kl.unscale(latent_BHWC, self.vae)
        image = self.networks["vae"].apply(params, raw, method="decode")
        return jnp.clip(image.astype(jnp.float32), -1, 1)

    def tokens(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenizer(list(prompts), length)


def load_pipeline(
    path: Path,
    *,
    dtype=jnp.float32,
    remat: bool = False,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> tuple[Pipeline, dict[str, Params]]:
    """Read a folder, diffusers' or gadjax's own: the functions, and the parameters by component.

    The parameters are host arrays in the file's dtype.
    Raises: InputError for whatever is wrong with the folder.
    """
    folder = open_folder(path, variant=variant, allow_pickle=allow_pickle)
    for name in NETWORKS:
        if name not in folder.components:
            raise InputError(f"{path}: found no {name}; expected {', '.join(NETWORKS)}")
    params = {name: folder.components[name].params for name in NETWORKS}
    return make_pipeline(folder, dtype=dtype, remat=remat), params


def make_pipeline(folder: PipelineFolder, *, dtype=jnp.float32, remat: bool = False) -> Pipeline:
    """The functions of a folder that was read, or only checked."""
    networks = {
        name: functional(part.module.build(part.spec, dtype=dtype, remat=remat))
        for name, part in folder.components.items()
    }
    part = folder.components["transformer"]
    tell = told_whole if tells_whole_times(folder.scheduler) else lambda network: network
    denoiser = Denoiser(
        tell(part.module.predictor(networks["transformer"].apply, part.spec)),
        schedule_from_config(folder.scheduler),
        parameterization_from_config(folder.scheduler),
        tell(part.module.features(networks["transformer"].apply)),
    )
    side = part.spec.sample_size
    return Pipeline(
        folder=folder,
        networks=networks,
        denoiser=denoiser,
        sampler=sampler_from_config(folder.scheduler),
        tokenizer=load_tokenizer(folder.path / "tokenizer"),
        latent=(side, side, part.spec.in_channels),
    )


def told_whole(network: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A network told the whole part of t, as diffusers tells it; the schedule keeps t itself.

    A derivative in t is the network's own at that whole time, not the zero of a rounded one.
    """

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return network(params, x_BHWC, t_B + jax.lax.stop_gradient(jnp.floor(t_B) - t_B), cond)

    return call


def random_like(network: Functional, seed: int) -> Params:
    """Fresh parameters of a network."""
    return jax.jit(network.init)(jax.random.key(seed))
