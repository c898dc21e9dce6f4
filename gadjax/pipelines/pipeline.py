"""A diffusers pipeline folder as functions of parameters: text -> cond, latents <-> pictures."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.diffusion.denoiser import Denoiser
from gadjax.diffusion.samplers import Sampler
from gadjax.diffusion.schedules import TrigFlow
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import INDEX, PipelineFolder
from gadjax.formats.orbax_folder import abstract_folder, open_folder
from gadjax.formats.pipeline_classes import check_classes
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.formats.scheduler_config import (
    floors_timesteps,
    parameterization_from_config,
    schedule_from_config,
)
from gadjax.formats.schedulers import sampler_from_config
from gadjax.models.module import Functional, functional
from gadjax.models.text.prompts import PromptEncoder, TextComponents
from gadjax.seeds import make_key
from gadjax.types import Cond, Params, expand

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The networks of one folder without their parameters, and what goes between them.

    latent: (H, W, C) of the denoiser, of the size it was trained for unless another is asked for.
    """

    folder: PipelineFolder
    networks: dict[str, Functional]
    denoiser: Denoiser
    sampler: Sampler
    prompts: PromptEncoder
    latent: tuple[int, int, int]

    @property
    def backbone(self) -> str:
        """The name of the denoiser's network: "transformer" or "unet"."""
        return self.folder.backbone

    @property
    def sampling(self) -> SamplingConfig:
        """What the family's pipeline in diffusers draws with unless it is told."""
        return SamplingConfig(self.prompts.steps, None, self.prompts.guidance, self.prompts.length)

    def encode_text(self, params: dict[str, Params], ids_BL, mask_BL) -> Cond:
        """Token ids to what the denoiser is told. params: by network."""
        return self.cond(*self.prompts.encode(params, ids_BL, mask_BL))

    def cond(self, text_BLD, mask_BL, pooled_BP=None) -> Cond:
        """Text embeddings and the size that the pictures will have."""
        part = self.folder.components[self.backbone]
        height, width = (side * self.upscale for side in self.latent[:2])
        extras = part.module.extras(part.spec, text_BLD.shape[0], height, width, pooled_BP)
        return Cond(text_BLD, mask_BL, extras)

    @property
    def upscale(self) -> int:
        return self.folder.components["vae"].spec.upscale

    def encode_image(self, params: Params, image_BHWC):
        """Pictures in [-1, 1] to the denoiser's latents (the posterior's mean)."""
        vae = self.folder.components["vae"]
        mean, _ = self.networks["vae"].apply(params, image_BHWC, method="encode")
        return vae.module.scale(mean.astype(jnp.float32), vae.spec)

    def decode(self, params: Params, latent_BHWC):
        """The denoiser's latents to pictures in [-1, 1], clipped."""
        vae = self.folder.components["vae"]
        raw = vae.module.unscale(latent_BHWC, vae.spec)
        image = self.networks["vae"].apply(params, raw, method="decode")
        return jnp.clip(image.astype(jnp.float32), -1, 1)

    def tokens(self, prompts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """ids_BL, mask_BL. None for what guidance leads away from by default: not every family's is
        the empty prompt."""
        ids, mask = self.prompts.tokens([prompt or "" for prompt in prompts], length)
        if gone := [i for i, prompt in enumerate(prompts) if prompt is None]:
            ids[gone], mask[gone] = self.prompts.negative_tokens(None, length)
        return ids, mask


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
    mixed = variant and any(not part.weights.variant for part in folder.components.values())
    if folder.unused_files or mixed:
        beside = f" (and not {', '.join(folder.unused_files)})" if folder.unused_files else ""
        log.warning("%s: read %s%s", folder.path, folder.files, beside)
    pipeline = make_pipeline(folder, dtype=dtype, remat=remat)
    return pipeline, {name: part.params for name, part in folder.components.items()}


def abstract_pipeline(
    path: Path, *, dtype=jnp.float32, remat: bool = False
) -> tuple[Pipeline, dict[str, Params]]:
    """load_pipeline from configurations alone: the parameters are shapes."""
    pipeline = make_pipeline(abstract_folder(path), dtype=dtype, remat=remat)
    return pipeline, {name: network.abstract for name, network in pipeline.networks.items()}


def make_pipeline(folder: PipelineFolder, *, dtype=jnp.float32, remat: bool = False) -> Pipeline:
    """The functions of a folder that was read, or only checked.

    Raises: InputError for a folder without a denoiser, its text encoders or an autoencoder, or
    whose parts do not go together.
    """
    for name in (folder.backbone, "vae"):
        if name not in folder.components:
            raise InputError(f"{folder.path}: found no {name}; expected a text-to-image pipeline")
    check_classes(folder.path / INDEX, folder.model_index)
    networks = {
        name: functional(part.module.build(part.spec, dtype=dtype, remat=remat))
        for name, part in folder.components.items()
    }
    part, vae = folder.components[folder.backbone], folder.components["vae"]
    if part.spec.in_channels != vae.spec.latent_channels:
        raise InputError(
            f"{folder.path}: found a vae of {vae.spec.latent_channels} latent channels; expected "
            f"{part.spec.in_channels}, as its {folder.backbone} takes"
        )
    side = part.spec.sample_size
    return Pipeline(
        folder=folder,
        networks=networks,
        denoiser=_denoiser(folder, networks[folder.backbone]),
        sampler=sampler_from_config(folder.scheduler),
        prompts=part.module.prompts(_text_parts(folder, networks), part.spec),
        latent=(side, side, part.spec.in_channels),
    )


def resized(pipeline: Pipeline, size: tuple[int, int]) -> Pipeline:
    """The pipeline for pictures of another size (height, width) in pixels.

    Raises: InputError for a size that the networks cannot take.
    """
    height, width = size
    if min(size) < 1 or height % pipeline.upscale or width % pipeline.upscale:
        raise InputError(
            f"size: found {height}x{width}; expected multiples of {pipeline.upscale} pixels"
        )
    latent = (height // pipeline.upscale, width // pipeline.upscale, pipeline.latent[2])
    pipeline = replace(pipeline, latent=latent)
    text = jax.eval_shape(
        pipeline.encode_text,
        {name: network.abstract for name, network in pipeline.networks.items()},
        *pipeline.prompts.negative_tokens(None, pipeline.prompts.length),
    )
    network = pipeline.networks[pipeline.backbone]
    try:
        jax.eval_shape(pipeline.denoiser.raw, network.abstract, jnp.zeros((1, *latent)), 1.0, text)
    except InputError as error:
        raise InputError(f"size: found {height}x{width} pixels; {error}") from None
    return pipeline


def with_scheduler(pipeline: Pipeline, scheduler: dict[str, Any]) -> Pipeline:
    """The same networks under another scheduler_config.json."""
    folder = replace(pipeline.folder, scheduler=scheduler)
    denoiser = _denoiser(folder, pipeline.networks[folder.backbone])
    sampler = sampler_from_config(scheduler)
    return replace(pipeline, folder=folder, denoiser=denoiser, sampler=sampler)


def _denoiser(folder: PipelineFolder, network: Functional) -> Denoiser:
    part = folder.components[folder.backbone]
    schedule = schedule_from_config(folder.scheduler)
    predictor = part.module.predictor(network.apply, part.spec)
    features = part.module.features(network.apply)
    if floors_timesteps(folder.scheduler):
        predictor, features = floor_timesteps(predictor), floor_timesteps(features)
    if isinstance(schedule, TrigFlow):
        predictor, features = trigflow(predictor), None
    text_kv = getattr(part.module, "TEXT_KV", None)
    return Denoiser(
        predictor,
        schedule,
        parameterization_from_config(folder.scheduler),
        features,
        guidance_embedded=getattr(part.spec, "guidance_embeds", False),
        text_kv=text_kv and partial(network.apply, method=text_kv),
    )


def _text_parts(folder: PipelineFolder, networks: dict[str, Functional]) -> TextComponents:
    return TextComponents(
        folder.path,
        folder.model_index,
        {name: network.apply for name, network in networks.items()},
        {name: part.spec for name, part in folder.components.items()},
    )


def floor_timesteps(network: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A network told the whole part of t, as diffusers tells it; the schedule keeps t itself.

    A derivative in t is the network's own at that whole time, not the zero of a rounded one.
    """

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        return network(params, x_BHWC, t_B + jax.lax.stop_gradient(jnp.floor(t_B) - t_B), cond)

    return call


def trigflow(network: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A flow network that is asked in TrigFlow's terms, of unit variance.

    SANA-Sprint (Chen et al., arXiv:2503.09641, section 3.1): a flow's time s = sin t / (sin t +
    cos t), its x scaled to the flow's variance, and v in place of its velocity.
    """

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        s = jnp.sin(t_B) / (jnp.sin(t_B) + jnp.cos(t_B))
        wide = expand(s, x_BHWC)
        size = jnp.sqrt(wide**2 + (1 - wide) ** 2)
        said = network(params, x_BHWC * size, s, cond)
        return ((1 - 2 * wide) * (x_BHWC * size) + size**2 * said) / size

    return call


def random_params(network: Functional, seed: int) -> Params:
    """Fresh parameters of a network."""
    return jax.jit(network.init)(make_key(seed))
