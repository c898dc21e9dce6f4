"""Text-to-image pipeline as pure functions of parameters: prompts -> cond, latents <-> images."""

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
from gadjax.formats.sampling_config import SamplingConfig, read_sampling
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
    """The networks of a pipeline folder without their parameters, and the functions between them.

    Attributes:
      folder: configurations and components.
      networks: pure functions of the networks, by name.
      denoiser: the backbone with its noise schedule and parameterization.
      sampler: the folder's scheduler.
      prompts: prompt encoder of the family.
      latent: (H, W, C) of the latents; the size of training unless `resized`.
    """

    folder: PipelineFolder
    networks: dict[str, Functional]
    denoiser: Denoiser
    sampler: Sampler
    prompts: PromptEncoder
    latent: tuple[int, int, int]

    @property
    def backbone(self) -> str:
        """Name of the denoiser's network: "transformer" or "unet"."""
        return self.folder.backbone

    @property
    def sampling(self) -> SamplingConfig:
        """Default sampling settings of the family's pipeline in diffusers."""
        return SamplingConfig(self.prompts.steps, None, self.prompts.guidance, self.prompts.length)

    @property
    def folder_guidance(self) -> float:
        """Guidance scale of the folder, else of the family's pipeline, as the denoiser takes it."""
        return self.denoiser.guidance_scale(read_sampling(self.folder.path, self.sampling).guidance)

    def guided(self, guidance: float) -> bool:
        """True if a guidance is classifier-free guidance, which an embedded one is not."""
        denoiser = self.denoiser
        return not denoiser.guidance_embedded and denoiser.guidance_scale(guidance) != 1

    def encode_text(self, params: dict[str, Params], ids_BL, mask_BL) -> Cond:
        """Encode token ids to the denoiser's conditioning. params: by network."""
        return self.cond(*self.prompts.encode(params, ids_BL, mask_BL))

    def cond(self, text_BLD, mask_BL, pooled_BP=None) -> Cond:
        """Conditioning from prompt embeddings, with the micro-conditioning of the image size."""
        part = self.folder.components[self.backbone]
        height, width = (side * self.upscale for side in self.latent[:2])
        extras = part.family.extras(part.spec, text_BLD.shape[0], height, width, pooled_BP)
        return Cond(text_BLD, mask_BL, extras)

    @property
    def upscale(self) -> int:
        return self.folder.components["vae"].spec.upscale

    def encode_image(self, params: Params, image_BHWC):
        """Encode images in [-1, 1] to latents in the denoiser's scale: the posterior's mean."""
        vae = self.folder.components["vae"]
        mean, _ = self.networks["vae"].apply(params, image_BHWC, method="encode")
        return vae.family.scale(mean.astype(jnp.float32), vae.spec)

    def decode(self, params: Params, latent_BHWC):
        """Decode latents in the denoiser's scale to images, clipped to [-1, 1]."""
        return jnp.clip(self.decode_unclipped(params, latent_BHWC), -1, 1)

    def decode_unclipped(self, params: Params, latent_BHWC):
        """Decode latents in the denoiser's scale to images, with a gradient beyond [-1, 1] too."""
        vae = self.folder.components["vae"]
        raw = vae.family.unscale(latent_BHWC, vae.spec)
        image = self.networks["vae"].apply(params, raw, method="decode")
        return image.astype(jnp.float32)

    def tokens(self, prompts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [B, L] and attention masks [B, L] of prompts.

        None stands for the family's default negative prompt, which is not always the empty prompt.
        """
        ids, mask = self.prompts.tokens([prompt or "" for prompt in prompts], length)
        if default := [i for i, prompt in enumerate(prompts) if prompt is None]:
            ids[default], mask[default] = self.prompts.negative_tokens(None, length)
        return ids, mask


def load_pipeline(
    path: Path,
    *,
    dtype=jnp.float32,
    remat: bool = False,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> tuple[Pipeline, dict[str, Params]]:
    """Read a pipeline folder in diffusers' or gadjax's format.

    Args:
      path: the folder.
      dtype: compute dtype of the networks.
      remat: rematerialise activations in reverse mode.
      variant: variant of the weight files, such as "fp16".
      allow_pickle: also read torch's .bin.

    Returns: the pipeline, and the parameters by component: host arrays in the file's dtype.
    Raises: InputError for an invalid folder.
    """
    folder = open_folder(path, variant=variant, allow_pickle=allow_pickle)
    mixed = variant and any(not part.weights.variant for part in folder.components.values())
    if folder.unused_files or mixed:
        unused = f" (and not {', '.join(folder.unused_files)})" if folder.unused_files else ""
        log.warning("%s: read %s%s", folder.path, folder.files, unused)
    pipeline = make_pipeline(folder, dtype=dtype, remat=remat)
    return pipeline, {name: part.params for name, part in folder.components.items()}


def abstract_pipeline(
    path: Path, *, dtype=jnp.float32, remat: bool = False
) -> tuple[Pipeline, dict[str, Params]]:
    """Pipeline from configurations alone, as `load_pipeline` with abstract parameters (shapes)."""
    pipeline = make_pipeline(abstract_folder(path), dtype=dtype, remat=remat)
    return pipeline, {name: network.abstract for name, network in pipeline.networks.items()}


def make_pipeline(folder: PipelineFolder, *, dtype=jnp.float32, remat: bool = False) -> Pipeline:
    """Build the pipeline of a folder that was read or checked.

    Args:
      folder: configurations and components; parameters are not needed.
      dtype: compute dtype of the networks.
      remat: rematerialise activations in reverse mode.

    Raises: InputError for a folder without a denoiser, its text encoders or an autoencoder, or
      with incompatible parts.
    """
    for name in (folder.backbone, "vae"):
        if name not in folder.components:
            raise InputError(f"{folder.path}: found no {name}; expected a text-to-image pipeline")
    check_classes(folder.path / INDEX, folder.model_index)
    networks = {
        name: functional(part.family.build(part.spec, dtype=dtype, remat=remat))
        for name, part in folder.components.items()
    }
    part, vae = folder.components[folder.backbone], folder.components["vae"]
    if part.spec.latent_channels != vae.spec.latent_channels:
        raise InputError(
            f"{folder.path}: found a vae of {vae.spec.latent_channels} latent channels; expected "
            f"{part.spec.latent_channels}, as its {folder.backbone} takes"
        )
    latent = part.spec.sample_size, part.spec.sample_size, part.spec.latent_channels
    return Pipeline(
        folder=folder,
        networks=networks,
        denoiser=_denoiser(folder, networks[folder.backbone]),
        sampler=_sampler(folder, latent),
        prompts=part.family.prompts(_text_parts(folder, networks), part.spec),
        latent=latent,
    )


def _sampler(folder: PipelineFolder, latent: tuple[int, int, int]) -> Sampler:
    """The folder's sampler for latents of this size."""
    side = folder.components[folder.backbone].spec.token_side
    tokens = (latent[0] // side) * (latent[1] // side)
    return sampler_from_config(folder.scheduler, folder.pipeline, tokens)


def resized(pipeline: Pipeline, size: tuple[int, int], length: int | None = None) -> Pipeline:
    """The pipeline for another image size.

    Args:
      pipeline: not changed.
      size: (height, width) in pixels.
      length: of the prompts in tokens; None: the family's default.

    Raises: InputError for a size that the networks do not support.
    """
    height, width = size
    if min(size) < 1 or height % pipeline.upscale or width % pipeline.upscale:
        raise InputError(
            f"size: found {height}x{width}; expected multiples of {pipeline.upscale} pixels"
        )
    latent = (height // pipeline.upscale, width // pipeline.upscale, pipeline.latent[2])
    pipeline = replace(pipeline, latent=latent, sampler=_sampler(pipeline.folder, latent))
    text = jax.eval_shape(
        pipeline.encode_text,
        {name: network.abstract for name, network in pipeline.networks.items()},
        *pipeline.prompts.negative_tokens(None, length or pipeline.prompts.length),
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
    sampler = _sampler(folder, pipeline.latent)
    return replace(pipeline, folder=folder, denoiser=denoiser, sampler=sampler)


def _denoiser(folder: PipelineFolder, network: Functional) -> Denoiser:
    part = folder.components[folder.backbone]
    schedule = schedule_from_config(folder.scheduler)
    predictor = part.family.predictor(network.apply, part.spec)
    features, blocks = part.family.features(network.apply), part.spec.feature_blocks
    if floors_timesteps(folder.scheduler):
        predictor, features = floor_timesteps(predictor), floor_timesteps(features)
    if isinstance(schedule, TrigFlow):
        predictor, features, blocks = trigflow(predictor), None, 0
    text_kv = part.family.text_kv
    denoiser = Denoiser(
        predictor,
        schedule,
        parameterization_from_config(folder.scheduler),
        features,
        blocks,
        guidance_embedded=part.spec.guidance_embeds,
        guided_norm=part.family.guided_norm,
        text_kv=text_kv and partial(network.apply, method=text_kv),
    )
    return denoiser.with_default_guidance(1.0)


def _text_parts(folder: PipelineFolder, networks: dict[str, Functional]) -> TextComponents:
    return TextComponents(
        folder.path,
        folder.model_index,
        {name: network.apply for name, network in networks.items()},
        {name: part.spec for name, part in folder.components.items()},
    )


def floor_timesteps(network: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Floor the timesteps that a network gets, as diffusers does; the schedule keeps t itself.

    The derivative in t is the network's derivative at the floored time, not the zero of floor.
    """

    def call(params: Params, x_BHWC, t_B, cond: Cond, **options):
        floored_B = t_B + jax.lax.stop_gradient(jnp.floor(t_B) - t_B)
        return network(params, x_BHWC, floored_B, cond, **options)

    return call


def trigflow(network: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wrap a flow network as one in TrigFlow's parameterization, with inputs of unit variance.

    SANA-Sprint (Chen et al., arXiv:2503.09641, section 3.1): the flow's time is s = sin t /
    (sin t + cos t), x is scaled to the flow's variance, and the output is v, not the velocity.
    """

    def call(params: Params, x_BHWC, t_B, cond: Cond):
        s = jnp.sin(t_B) / (jnp.sin(t_B) + jnp.cos(t_B))
        wide = expand(s, x_BHWC)
        size = jnp.sqrt(wide**2 + (1 - wide) ** 2)
        velocity = network(params, x_BHWC * size, s, cond)
        return ((1 - 2 * wide) * (x_BHWC * size) + size**2 * velocity) / size

    return call


def random_params(network: Functional, seed: int) -> Params:
    """Randomly initialised parameters of a network."""
    return jax.jit(network.init)(make_key(seed))
