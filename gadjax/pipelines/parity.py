"""Parity checks against diffusers and transformers with the same weights.

torch and diffusers are optional and imported on use.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.errors import InputError, RunStopped
from gadjax.formats.diffusers_folder import Component, PipelineFolder
from gadjax.formats.sampling_config import read_sampling
from gadjax.io.untrusted import read_json
from gadjax.models.module import functional
from gadjax.pipelines.adapted import adapted_model
from gadjax.pipelines.diffusers_calls import (
    Variant,
    diffusers_errors,
    draw_in_diffusers,
    import_quietly,
    load_lora,
)
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import draw, initial_noise
from gadjax.types import Cond

NETWORK_BOUND = 1e-4  # relative to the largest value, in float32
PICTURE_BOUND = 2 / 255
PROMPTS = ("a red circle above a blue square", "a lighthouse at dawn, oil on canvas", "")
SIDE, TOKENS = 32, 12  # of random latents and prompt embeddings
_EXACT = partial(jax.default_matmul_precision, "highest")  # accelerators round float32 products


def missing(lora: bool = False) -> list[str]:
    """Names of the packages needed for a comparison that are not installed. lora: of a LoRA."""
    names = ("torch", "diffusers", *(("peft",) if lora else ()))
    return [name for name in names if find_spec(name) is None]


def require(flag: str) -> None:
    """Check that torch and diffusers are installed. Raises: InputError naming `flag`."""
    if absent := missing():
        raise InputError(
            f"{flag}: found no {' and no '.join(absent)}; expected them installed "
            "(pip install 'gadjax[torch]')"
        )


def compare_networks(ours: PipelineFolder, theirs: PipelineFolder, dtype=None) -> dict[str, float]:
    """Compare the outputs of gadjax's and torch's networks for random inputs, in float32.

    Args:
      ours: pipeline folder with parameters.
      theirs: diffusers folder, from which torch loads its weights.
      dtype: dtype that torch's weights are cast to before the comparison; None for none.

    Returns: max |ours - theirs| / max |theirs| by name of the output.
    Raises: RunStopped where diffusers or transformers cannot load or run the folder.
    """
    import torch

    errors = {}
    for name, part in ours.components.items():
        with diffusers_errors(), torch.no_grad(), _EXACT():
            network = _load(theirs, part)
            if dtype is not None:
                for value in network.state_dict().values():  # what files have
                    value.copy_(value.to(getattr(torch, np.dtype(dtype).name)))
            apply = jax.jit(
                functional(part.family.build(part.spec)).apply, static_argnames="method"
            )
            kind = name.rstrip("_0123456789")
            compare = {"text_encoder": _text_encoder, "vae": _vae}.get(kind, _denoiser)
            for label, mine, other in compare(part, apply, network):
                mine, other = np.asarray(mine), other.numpy()
                error = np.abs(mine - other).max() / np.abs(other).max()
                errors[label] = float(error) if np.isfinite(error) else np.inf
    return errors


def _load(folder: PipelineFolder, part: Component):
    import torch

    diffusers, transformers = import_quietly()
    library = {"diffusers": diffusers, "transformers": transformers}[part.library]
    network = getattr(library, folder.model_index[part.name][1]).from_pretrained(
        folder.path / part.name,
        local_files_only=True,
        dtype=torch.float32,
        variant=folder.components[part.name].weights.variant,
    )
    return network.eval()


def _normal(seed: int, *shape: int):
    """Standard normal array for JAX (NHWC) and the same for torch (NCHW)."""
    import torch

    value = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return value, torch.from_numpy(value if len(shape) != 4 else value.transpose(0, 3, 1, 2).copy())


def _nhwc(image):
    return image.permute(0, 2, 3, 1)


def _denoiser(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, ours, theirs): outputs of the denoisers for the same inputs."""
    import torch

    spec, family = part.spec, part.family
    side = min(spec.sample_size, SIDE)
    x, _ = _normal(0, 2, side, side, spec.latent_channels)
    text, _ = _normal(1, 2, TOKENS, spec.text_dim)
    mask = np.array([[1] * TOKENS, [1] * 5 + [0] * (TOKENS - 5)], np.int32)
    pooled = np.random.default_rng(5).standard_normal((2, spec.pooled_dim or 1), np.float32)
    times = np.array([0.999, 0.007], np.float32) * np.float32(spec.last_time)
    extras = family.extras(spec, 2, 8 * side, 8 * side, pooled)
    if spec.guidance_embeds:
        extras = (extras or {}) | {"guidance": np.array([4.5, 1], np.float32)}
    given = x, times, Cond(text, mask, extras)
    ours = family.predictor(apply, spec)(part.params, *given)
    as_torch = jax.tree.map(lambda value: torch.from_numpy(np.array(value)), given)
    theirs = family.call_torch(network, spec, *as_torch)
    yield part.name, ours, theirs[..., : spec.latent_channels]


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
    theirs = network.base_model(ids_torch, attention_mask=torch.from_numpy(mask))
    yield part.name, apply(part.params, ids, mask), theirs.last_hidden_state


def _vae(part: Component, apply, network) -> Iterator[tuple[str, Any, Any]]:
    network = part.family.torch_codec(network)
    latent, latent_torch = _normal(3, 1, 8, 12, part.spec.latent_channels)
    ours, theirs = apply(part.params, latent, method="decode"), network.decode(latent_torch).sample
    yield f"{part.name} decode", ours, _nhwc(theirs)
    image, image_torch = _normal(4, *ours.shape)
    ours, _ = apply(part.params, image, method="encode")
    theirs = network.encode(image_torch)
    theirs = theirs.latent_dist.mean if hasattr(theirs, "latent_dist") else theirs.latent
    yield f"{part.name} encode", ours, _nhwc(theirs)


def verify(folder: Path) -> dict[str, Any]:
    """Verify that diffusers and gadjax sample the same images with an exported folder.

    Returns: the entry "verified" of gadjax.json.
    Raises: RunStopped where the images differ, or diffusers cannot load or run the folder.
    """
    return _verified(compare_pictures(folder, PROMPTS))


def verify_lora(base: Path, lora: Path, pipeline: str) -> dict[str, Any]:
    """Verify that diffusers and gadjax sample the same images with an exported LoRA.

    Args:
      base: folder of the pipeline that is adapted.
      lora: exported folder of the LoRA, with its scheduler.
      pipeline: class in diffusers.

    Returns: the entry "verified" of gadjax.json.
    Raises: RunStopped where the images differ, or diffusers cannot load or run the two.
    """
    model = adapted_model(base, [(lora, 1.0)])
    return _verify_part(base, lora, pipeline, model, lambda pipe: load_lora(pipe, lora))


def verify_backbone(base: Path, file: Path, pipeline: str, model: Model) -> dict[str, Any]:
    """Verify that diffusers and gadjax sample the same images with an exported file of a backbone.

    Args:
      base: folder of the pipeline whose backbone it replaces.
      file: the file, in the exported folder with its scheduler.
      pipeline: class in diffusers.
      model: the pipeline with the backbone.

    Returns: the entry "verified" of gadjax.json.
    Raises: RunStopped where the images differ, or diffusers cannot load or run the file.
    """
    from safetensors.torch import load_file

    def load(pipe) -> None:
        getattr(pipe, model.pipeline.backbone).load_state_dict(load_file(file))

    return _verify_part(base, file.parent, pipeline, model, load)


def _verify_part(
    base: Path, folder: Path, pipeline: str, model: Model, load: Callable[[Any], None]
) -> dict[str, Any]:
    """Verify an exported part of a pipeline.

    Args:
      base: folder of the pipeline that it is loaded into.
      folder: exported folder, with a scheduler and gadjax.json.
      pipeline: class in diffusers.
      model: the pipeline with the part.
      load: function that loads the part into diffusers' pipeline.
    """
    sampling = read_sampling(folder, model.sampling)
    noise = initial_noise(0, len(PROMPTS), model.pipeline.latent)
    with _EXACT():
        ours = draw(model, PROMPTS, noise) / 2 + 0.5

    def prepare(pipe) -> None:
        diffusers, _ = import_quietly()
        path = folder / "scheduler"
        if path.is_dir():
            name = read_json(path / "scheduler_config.json")["_class_name"]
            pipe.scheduler = getattr(diffusers, name).from_pretrained(path)
        load(pipe)

    with diffusers_errors():
        theirs = draw_in_diffusers(base, sampling, PROMPTS, noise, Variant(pipeline, prepare))
        error = np.abs(ours - theirs).max()
    return _verified(float(error) if np.isfinite(error) else np.inf)


def _verified(difference: float) -> dict[str, Any]:
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
    """Largest difference between the images of diffusers and gadjax, with values in [0, 1].

    Both sample one image per prompt from the same initial latents, with a diffusers folder and
    its gadjax.json.
    Raises: RunStopped where diffusers cannot load or run the folder.
    """
    pipeline, params = load_pipeline(folder)
    sampling = read_sampling(folder, pipeline.sampling)
    noise = initial_noise(0, len(prompts), pipeline.latent)
    with _EXACT():
        ours = draw(Model(folder.name, pipeline, params, sampling), prompts, noise) / 2 + 0.5
    with diffusers_errors():
        error = np.abs(ours - draw_in_diffusers(folder, sampling, prompts, noise)).max()
    return float(error) if np.isfinite(error) else np.inf
