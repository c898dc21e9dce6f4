"""What diffusers and transformers make of the same weights. Needs torch, imported when asked."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax import __version__
from gadjax.convert.folder import Component, PipelineFolder
from gadjax.convert.recipe import Sampling, read_sampling
from gadjax.errors import InputError, RunStopped
from gadjax.models.module import functional
from gadjax.pipeline import load_pipeline
from gadjax.sampling import draw, initial_noise

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

    cases = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae}
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
            for label, mine, other in cases[name](part, apply, network):
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


def _transformer(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    import torch

    spec, side = part.spec, min(part.spec.sample_size, SIDE)
    x, x_torch = _normal(0, 2, side, side, spec.in_channels)
    text, text_torch = _normal(1, 2, TOKENS, spec.caption_channels)
    mask = np.array([[1] * TOKENS, [1] * 5 + [0] * (TOKENS - 5)], np.int32)
    times = np.array([999, 7])
    extras = part.module.extras(spec, 2, 8 * side, 8 * side)
    told = {"resolution": None, "aspect_ratio": None}
    if extras is not None:
        told = {name: torch.from_numpy(np.array(value)) for name, value in extras.items()}
    theirs = network(
        x_torch,
        encoder_hidden_states=text_torch,
        timestep=torch.from_numpy(times),
        added_cond_kwargs=told,
        encoder_attention_mask=torch.from_numpy(mask),
    ).sample
    ours = apply(part.params, x, times.astype(np.float32), text, mask, extras)
    yield part.name, ours, _nhwc(theirs)


def _text_encoder(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    import torch

    ids = np.random.default_rng(2).integers(0, part.spec.vocab_size, (2, TOKENS), np.int32)
    mask = np.array([[1] * TOKENS, [1] * 5 + [0] * (TOKENS - 5)], np.int32)
    theirs = network(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    yield part.name, apply(part.params, ids, mask), theirs.last_hidden_state


def _vae(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    latent, latent_torch = _normal(3, 1, 8, 12, part.spec.latent_channels)
    ours, theirs = apply(part.params, latent, method="decode"), network.decode(latent_torch).sample
    yield f"{part.name} decode", ours, _nhwc(theirs)
    image, image_torch = _normal(4, *ours.shape)
    ours, _ = apply(part.params, image, method="encode")
    yield f"{part.name} encode", ours, _nhwc(network.encode(image_torch).latent_dist.mean)


def diffusers_arguments(sampling: Sampling) -> dict[str, Any]:
    """PixArtAlphaPipeline's arguments, beside prompt and latents, with which it draws the same."""
    if sampling.timesteps is None:
        steps = {"num_inference_steps": sampling.steps}
    else:
        whole = (int(t) if t == int(t) else t for t in sampling.timesteps)
        steps = {"timesteps": list(whole)}
    return {
        **steps,
        "guidance_scale": sampling.guidance,
        "max_sequence_length": sampling.length,
        "use_resolution_binning": False,
        "clean_caption": False,
    }


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
        "gadjax": __version__,
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
    folder: Path, sampling: Sampling, prompts: Sequence[str], noise_BHWC: np.ndarray
) -> np.ndarray:
    import torch

    diffusers, _ = _quiet()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(prompts),
        latents=torch.from_numpy(noise_BHWC.transpose(0, 3, 1, 2).copy()),
        output_type="np",
        **diffusers_arguments(sampling),
    ).images


@contextmanager
def _blamed() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # theirs, of any kind
        reason = " ".join(str(error).split())[:300]
        raise RunStopped(f"diffusers: {type(error).__name__}: {reason}") from error
