"""What diffusers and transformers make of the same weights. Needs torch, imported when asked."""

import importlib
import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.diffusion.samplers import keys_from_noise, step_noise
from gadjax.diffusion.schedules import Flow
from gadjax.errors import InputError, RunStopped
from gadjax.formats.diffusers_folder import INDEX, Component, PipelineFolder
from gadjax.formats.sampling_config import SamplingConfig, read_sampling
from gadjax.io.untrusted import read_json
from gadjax.models.module import functional
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import draw, initial_noise
from gadjax.types import Cond

NETWORK_BOUND = 1e-4  # of the largest value, in float32
PICTURE_BOUND = 2 / 255
PROMPTS = ("a red circle above a blue square", "a lighthouse at dawn, oil on canvas", "")
SIDE, TOKENS = 32, 12  # of random latents and texts
_EXACT = partial(jax.default_matmul_precision, "highest")  # accelerators round products of float32


def missing() -> list[str]:
    """Which of the packages that a comparison needs are not installed."""
    return [name for name in ("torch", "diffusers") if find_spec(name) is None]


def require(flag: str) -> None:
    if absent := missing():
        raise InputError(
            f"{flag}: found no {' and no '.join(absent)}; expected them installed "
            "(pip install 'gadjax[torch]')"
        )


def compare_networks(ours: PipelineFolder, theirs: PipelineFolder, dtype=None) -> dict[str, float]:
    """max |difference| / max |theirs| of what networks say in float32 to random inputs.

    ours: with parameters. theirs: a diffusers folder, from which torch reads its own; cast to
      `dtype` first unless that is None.
    Raises: RunStopped where diffusers or transformers cannot use the folder.
    """
    import torch

    found = {}
    for name, part in ours.components.items():
        with _blamed(), torch.no_grad(), _EXACT():
            network = _load(theirs, part)
            if dtype is not None:
                for value in network.parameters():  # and no tables, which are of no file
                    value.copy_(value.to(getattr(torch, np.dtype(dtype).name)))
            apply = jax.jit(
                functional(part.module.build(part.spec)).apply, static_argnames="method"
            )
            kind = name.rstrip("_0123456789")
            compare = {"text_encoder": _text_encoder, "vae": _vae}.get(kind, _denoiser)
            for label, mine, other in compare(part, apply, network):
                mine, other = np.asarray(mine), other.numpy()
                error = np.abs(mine - other).max() / np.abs(other).max()
                found[label] = float(error) if np.isfinite(error) else np.inf
    return found


def _load(folder: PipelineFolder, part: Component):
    import torch

    diffusers, transformers = _quiet()
    library = {"diffusers": diffusers, "transformers": transformers}[part.library]
    network = getattr(library, folder.model_index[part.name][1]).from_pretrained(
        folder.path / part.name,
        local_files_only=True,
        dtype=torch.float32,
        variant=folder.components[part.name].weights.variant,
    )
    return network.eval()


def _quiet():
    """diffusers and transformers without warnings and bars of their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers, transformers


def _normal(seed: int, *shape: int):
    """The same numbers for JAX as NHWC, and for torch as NCHW."""
    import torch

    value = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return value, torch.from_numpy(value if len(shape) != 4 else value.transpose(0, 3, 1, 2).copy())


def _nhwc(image):
    return image.permute(0, 2, 3, 1)


def _denoiser(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    """Both are told the same by the names of their own arguments."""
    import torch

    spec, kind = part.spec, type(network).__name__
    side = min(spec.sample_size, SIDE)
    x, x_torch = _normal(0, 2, side, side, spec.in_channels)
    widths = ("caption_channels", "cross_attention_dim", "joint_attention_dim")
    width = next(getattr(spec, name) for name in widths if hasattr(spec, name))
    text, text_torch = _normal(1, 2, TOKENS, width)
    mask = np.array([[1] * TOKENS, [1] * 5 + [0] * (TOKENS - 5)], np.int32)
    pooled = getattr(spec, "pooled_dim", None) or getattr(spec, "pooled_projection_dim", None)
    pooled = np.random.default_rng(5).standard_normal((2, pooled or 1), np.float32)
    # Sprint's times are from 0 to 1.
    embedded = getattr(spec, "guidance_embeds", False)
    times = np.array([0.9, 0.2] if embedded else [999, 7], np.float32)
    extras = {"guidance": np.array([4.5, 1], np.float32)} if embedded else None
    extras = extras or part.module.extras(spec, 2, 8 * side, 8 * side, pooled)
    told = {name: torch.from_numpy(np.array(value)) for name, value in (extras or {}).items()}
    arguments = {"encoder_hidden_states": text_torch, "timestep": torch.from_numpy(times)}
    if kind == "SD3Transformer2DModel":
        arguments["pooled_projections"] = told["pooled"]
    elif kind == "UNet2DConditionModel":
        arguments["added_cond_kwargs"] = told
    else:
        arguments["encoder_attention_mask"] = torch.from_numpy(mask)
    if kind == "PixArtTransformer2DModel":
        names = ("resolution", "aspect_ratio")
        arguments["added_cond_kwargs"] = {name: told.get(name) for name in names}
    if embedded:
        arguments["guidance"] = told["guidance"] * spec.guidance_embeds_scale
    theirs = network(x_torch, **arguments).sample[:, : spec.in_channels]
    ours = part.module.predictor(apply, spec)(part.params, x, times, Cond(text, mask, extras))
    yield part.name, ours, _nhwc(theirs)


def _text_encoder(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    import torch

    ids = np.random.default_rng(2).integers(0, part.spec.vocab_size, (2, TOKENS), np.int32)
    ids_torch = torch.from_numpy(ids).long()
    if type(network).__name__.startswith("CLIP"):
        theirs = network(ids_torch, output_hidden_states=True)
        ours = apply(part.params, ids)
        yield f"{part.name} last", ours.last, theirs.last_hidden_state
        yield f"{part.name} last but one", ours.penultimate, theirs.hidden_states[-2]
        pooled = theirs.text_embeds if part.spec.projected else theirs.pooler_output
        yield f"{part.name} pooled", ours.pooled, pooled
        return
    mask = np.array([[1] * TOKENS, [1] * 5 + [0] * (TOKENS - 5)], np.int32)
    theirs = network(ids_torch, attention_mask=torch.from_numpy(mask))
    yield part.name, apply(part.params, ids, mask), theirs.last_hidden_state


def _vae(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    latent, latent_torch = _normal(3, 1, 8, 12, part.spec.latent_channels)
    ours, theirs = apply(part.params, latent, method="decode"), network.decode(latent_torch).sample
    yield f"{part.name} decode", ours, _nhwc(theirs)
    image, image_torch = _normal(4, *ours.shape)
    ours, _ = apply(part.params, image, method="encode")
    theirs = network.encode(image_torch)
    theirs = theirs.latent_dist.mean if hasattr(theirs, "latent_dist") else theirs.latent
    yield f"{part.name} encode", ours, _nhwc(theirs)


# Class of the pipeline, up to its number -> what it is told beside what all are.
_CLEANED = {"use_resolution_binning": False, "clean_caption": False}
_OWN = {"PixArt": _CLEANED, "Sana": _CLEANED}
_LENGTH = ("PixArt", "Sana", "StableDiffusion3")


def diffusers_arguments(pipeline: str, sampling: SamplingConfig) -> dict[str, Any]:
    """Arguments of a pipeline's class, beside prompt and latents, with which it draws the same."""
    if sampling.timesteps is None:
        found = {"num_inference_steps": sampling.steps}
        if pipeline.startswith("SanaSprint") and sampling.steps != 2:
            found["intermediate_timesteps"] = None
    elif pipeline.startswith("StableDiffusion3"):  # which takes no timesteps
        sigmas = [t / Flow().steps for t in sampling.timesteps]
        found = {"sigmas": sigmas, "num_inference_steps": sampling.steps}
    else:
        whole = (int(t) if t == int(t) else t for t in sampling.timesteps)
        found = {"timesteps": list(whole), "num_inference_steps": sampling.steps}
        if pipeline.startswith("PixArt"):  # which counts them itself
            del found["num_inference_steps"]
    found["guidance_scale"] = sampling.guidance
    if sampling.negative is not None:
        found["negative_prompt"] = sampling.negative
    if pipeline.startswith(_LENGTH):
        found["max_sequence_length"] = sampling.length
    return found | next((own for name, own in _OWN.items() if pipeline.startswith(name)), {})


def verify(folder: Path) -> dict[str, Any]:
    """Compare what diffusers and gadjax draw with a folder: what its gadjax.json keeps.

    Raises: RunStopped where they differ, or diffusers cannot use the folder.
    """
    difference = compare_pictures(folder, PROMPTS)
    if difference > PICTURE_BOUND:
        raise RunStopped(
            f"verification: found a difference of {difference:.1e} between diffusers' pictures and "
            f"gadjax's; expected at most {PICTURE_BOUND:.1e}"
        )
    return {
        "max_difference": difference,
        "allowed": PICTURE_BOUND,
        "prompts": len(PROMPTS),
        "gadjax": importlib.metadata.version("gadjax"),
        **{name: importlib.metadata.version(name) for name in ("diffusers", "torch")},
    }


def compare_pictures(folder: Path, prompts: Sequence[str]) -> float:
    """The largest difference between what diffusers and gadjax draw with a diffusers folder and
    its gadjax.json, from the same latents, one for each prompt; pictures from 0 to 1.

    Raises: RunStopped where diffusers cannot use the folder.
    """
    pipeline, params = load_pipeline(folder)
    sampling = read_sampling(folder, pipeline.sampling)
    noise = initial_noise(0, len(prompts), pipeline.latent)
    with _EXACT():
        ours = draw(pipeline, params, sampling, prompts, noise) / 2 + 0.5
    with _blamed():
        error = np.abs(ours - _pictures(folder, sampling, prompts, noise)).max()
    return float(error) if np.isfinite(error) else np.inf


def _pictures(
    folder: Path, sampling: SamplingConfig, prompts: Sequence[str], noise_BHWC: np.ndarray
) -> np.ndarray:
    """What diffusers draws. Schedulers that add noise are given the one that gadjax adds."""
    import torch

    diffusers, _ = _quiet()
    # Of parts that a folder goes without some pipelines want to be told again.
    absent = {name: None for name, part in read_json(folder / INDEX).items() if part == [None] * 2}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = diffusers_arguments(type(pipeline).__name__, sampling)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [sampling.negative] * len(prompts)
    noise_BHWC = sampling.scale * noise_BHWC
    latents = torch.from_numpy(noise_BHWC.transpose(0, 3, 1, 2).copy())
    with _same_noise(pipeline.scheduler, noise_BHWC):
        return pipeline(list(prompts), latents=latents, output_type="np", **arguments).images


@contextmanager
def _same_noise(scheduler, noise_BHWC: np.ndarray) -> Iterator[None]:
    module, step = importlib.import_module(type(scheduler).__module__), itertools.count()
    if not hasattr(module, "randn_tensor"):
        yield
        return
    import torch

    x = jax.numpy.asarray(noise_BHWC)

    def draw(shape, **ignored):
        noise = np.asarray(step_noise(keys_from_noise(x), next(step), x))
        return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())

    before, module.randn_tensor = module.randn_tensor, draw
    try:
        yield
    finally:
        module.randn_tensor = before


@contextmanager
def _blamed() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # theirs, of any kind
        reason = " ".join(str(error).split())[:300]
        raise RunStopped(f"diffusers: {type(error).__name__}: {reason}") from error
