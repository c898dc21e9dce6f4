"""Calls of diffusers' pipelines: their arguments, what they are given, and the pictures they draw.

torch and diffusers are optional and imported on use.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gadjax.diffusion.samplers import keys_from_noise, step_noise
from gadjax.diffusion.schedules import Flow
from gadjax.errors import RunStopped
from gadjax.formats.diffusers_folder import INDEX, PipelineFolder
from gadjax.formats.pipeline_classes import FLUX, KLEIN, PACKED, PASSES_SIGMAS, SD3, Z_IMAGE
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.io.untrusted import read_json

# Prefix of the pipeline's class -> additional arguments.
_UNCHANGED_INPUTS = {"use_resolution_binning": False, "clean_caption": False}
_FAMILY_ARGUMENTS = {"PixArt": _UNCHANGED_INPUTS, "Sana": _UNCHANGED_INPUTS}
# Those that take max_sequence_length.
_WITH_LENGTH = ("PixArt", "Sana", "StableDiffusion3", *PASSES_SIGMAS)


def diffusers_arguments(
    pipeline: str, sampling: SamplingConfig, *, embedded: bool = False
) -> dict[str, Any]:
    """Keyword arguments of a diffusers pipeline call for given sampling settings.

    Args:
      pipeline: diffusers class.
      sampling: the settings.
      embedded: whether the guidance scale is an input of the network.

    Returns: the arguments, without prompt and latents.
    """
    if sampling.timesteps is None:
        arguments = {"num_inference_steps": sampling.steps}
        if pipeline.startswith("SanaSprint") and sampling.steps != 2:
            arguments["intermediate_timesteps"] = None
    elif pipeline in (SD3, *PASSES_SIGMAS):  # they take no timesteps
        sigmas = [t / Flow().steps for t in sampling.timesteps]
        arguments = {"sigmas": sigmas, "num_inference_steps": sampling.steps}
    else:
        timesteps = (int(t) if t == int(t) else t for t in sampling.timesteps)
        arguments = {"timesteps": list(timesteps), "num_inference_steps": sampling.steps}
        if pipeline.startswith("PixArt"):  # counts them itself
            del arguments["num_inference_steps"]
    arguments["guidance_scale"] = sampling.guidance
    if sampling.eta:
        arguments["eta"] = sampling.eta
    if pipeline == FLUX and not embedded and sampling.guidance > 1:
        # guidance_scale is the network's input alone; this one needs a negative prompt.
        arguments |= {"true_cfg_scale": sampling.guidance, "negative_prompt": ""}
    if pipeline == Z_IMAGE:  # its guidance is cond + s (cond - null)
        arguments["guidance_scale"] = max(sampling.guidance, 1) - 1
    if sampling.negative is not None:
        arguments["negative_prompt"] = sampling.negative
    if pipeline.startswith(_WITH_LENGTH):
        arguments["max_sequence_length"] = sampling.length
    return arguments | next(
        (extra for name, extra in _FAMILY_ARGUMENTS.items() if pipeline.startswith(name)), {}
    )


def call_arguments(
    folder: PipelineFolder, pipeline: str, sampling: SamplingConfig
) -> dict[str, Any]:
    """`diffusers_arguments` for a folder's networks, with the size where the class has another.

    Args:
      folder: pipeline whose network is drawn with.
      pipeline: diffusers class.
      sampling: the settings.
    """
    spec = folder.components[folder.backbone].spec
    arguments = diffusers_arguments(pipeline, sampling, embedded=spec.guidance_embeds)
    if pipeline in PASSES_SIGMAS:
        side = spec.sample_size * folder.components["vae"].spec.upscale
        arguments |= {"height": side, "width": side}
    return arguments


class Variant(NamedTuple):
    """Another class for a folder's pipeline, and what is done with the pipeline once loaded."""

    pipeline: str
    prepare: Callable[[Any], None]


def draw_in_diffusers(
    folder: Path,
    sampling: SamplingConfig,
    prompts: Sequence[str],
    noise_BHWC: np.ndarray,
    variant: Variant | None = None,
) -> np.ndarray:
    """Images from diffusers; its stochastic schedulers add gadjax's noise.

    Args:
      folder: diffusers folder.
      sampling: sampling settings.
      prompts: N prompts.
      noise_BHWC: initial noise of each.
      variant: class to draw with in place of the folder's.

    Returns: [N, H, W, 3] in [0, 1].
    """
    import torch

    diffusers, _ = import_quietly()
    # Some pipelines require omitted parts to be passed as None.
    absent = {name: None for name, part in read_json(folder / INDEX).items() if part == [None] * 2}
    kind = getattr(diffusers, variant.pipeline) if variant else diffusers.DiffusionPipeline
    pipeline = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **absent)
    if variant:
        variant.prepare(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.components.get("transformer")
    embedded = bool(network and network.config.get("guidance_embeds"))
    arguments = diffusers_arguments(type(pipeline).__name__, sampling, embedded=embedded)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    noise_BHWC = sampling.scale * noise_BHWC
    kind = type(pipeline)
    if kind.__name__ in PASSES_SIGMAS:  # whose default size is not the network's
        factor = pipeline.vae_scale_factor * (2 if kind.__name__ == KLEIN else 1)  # of patches
        height, width = (side * factor for side in noise_BHWC.shape[1:3])
        arguments |= {"height": height, "width": width}

    def as_latents(x_BHWC):
        x = torch.from_numpy(np.asarray(x_BHWC).transpose(0, 3, 1, 2).copy())
        return kind._pack_latents(x, *x.shape) if kind.__name__ in PACKED else x

    with same_noise(pipeline.scheduler, noise_BHWC, as_latents):
        arguments |= {"latents": as_latents(noise_BHWC), "output_type": "np"}
        return pipeline(prompt=list(prompts), **arguments).images


@contextmanager
def same_noise(scheduler, noise_BHWC: np.ndarray, as_latents: Callable) -> Iterator[None]:
    """Patch the scheduler's randn_tensor to return the noise that gadjax adds at each step.

    Args:
      scheduler: of diffusers.
      noise_BHWC: initial noise.
      as_latents: array [B, H, W, C] -> latents as the pipeline has them.
    """
    module, step = importlib.import_module(type(scheduler).__module__), itertools.count()
    if not hasattr(module, "randn_tensor"):
        yield
        return
    x = jax.numpy.asarray(noise_BHWC)

    def draw(shape, **ignored):
        return as_latents(step_noise(keys_from_noise(x), next(step), x))

    before, module.randn_tensor = module.randn_tensor, draw
    try:
        yield
    finally:
        module.randn_tensor = before


def load_lora(pipe, lora: Path) -> None:
    """Load an exported LoRA into a pipeline of diffusers by its loader, or by PEFT without one."""
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(lora)
        return
    from peft import PeftModel

    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, lora).merge_and_unload()


def import_quietly():
    """Import diffusers and transformers, with their warnings and progress bars off."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers, transformers


@contextmanager
def diffusers_errors() -> Iterator[None]:
    """Turn any exception of diffusers, transformers or torch into RunStopped."""
    try:
        yield
    except Exception as error:  # of any kind
        reason = " ".join(str(error).split())[:300]
        raise RunStopped(f"diffusers: {type(error).__name__}: {reason}") from error
