"""Networks of random configurations, from random folders, against the classes themselves."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from random_configs import MAKERS, check_options, class_of, random_config
from random_folders import age, randomise, save
from sweeping import Case, Choice, Outputs, sweep

from gadjax.formats.diffusers_folder import INDEX, Component, read_pipeline
from gadjax.models import flux, flux2, lumina2, zimage
from gadjax.models.module import functional
from gadjax.models.vae import autoencoder_flux2
from gadjax.types import Cond

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

NEWER = {  # which the package itself knows how to call
    "FluxTransformer2DModel": flux,
    "Flux2Transformer2DModel": flux2,
    "ZImageTransformer2DModel": zimage,
    "Lumina2Transformer2DModel": lumina2,
}
# The words by which what is no key of the case's own is refused.
WORDS = {"latents", "picture", "ids", "architectures", "model_type", "rope_theta", "rope_scaling"}
WORDS |= {"_class_name", "dense_act_fn", "is_gated_act", "hidden_act"}


def part_of(name: str) -> str:
    if hasattr(class_of(name), "config_class"):
        return "text_encoder"
    return {"Un": "unet", "UN": "unet", "Au": "vae"}.get(name[:2], "transformer")


@pytest.mark.parametrize("name", MAKERS)
def test_networks(name, tmp_path):
    check_options(name)
    component = part_of(name)
    classes = sum(part_of(other) == component for other in MAKERS)
    sweep(name, partial(draw, name), tmp_path, classes)


def draw(name: str, rng: np.random.Generator, root: Path) -> Case:
    pick = Choice(rng)
    options = random_config(name, pick)
    kind, part = class_of(name), part_of(name)
    generator = torch.Generator().manual_seed(pick.rng.integers(1 << 31).item())
    torch.manual_seed(generator.initial_seed())
    config_class = getattr(kind, "config_class", None)
    model = kind(config_class(**options)) if config_class else kind(**options)
    randomise(model, generator)
    variant, alone = save(model, root / part, pick, generator)
    age(name, root / part, pick)
    library = "transformers" if config_class else "diffusers"
    (root / INDEX).write_text(json.dumps({part: [library, name]}))
    written = json.loads((root / part / "config.json").read_text())
    files = {path.name for path in (root / part).iterdir()}

    loaded = getattr(diffusers if library == "diffusers" else transformers, name).from_pretrained(
        root / part, local_files_only=True, dtype=torch.float32, variant=variant
    )
    loaded.eval()
    if name == "Qwen3Model":  # its default gives padding on the left states that nothing reads
        loaded.set_attn_implementation("eager")
    compare = {"text_encoder": text_inputs, "vae": vae_inputs}.get(part, denoiser_inputs)
    inputs = compare(loaded, pick)

    def theirs(model, dtype=torch.float32) -> Outputs:
        def changed(value):
            tensor = torch.from_numpy(np.array(value))
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        with torch.no_grad():
            given = jax.tree.map(changed, inputs, is_leaf=lambda x: isinstance(x, np.ndarray))
            return {k: v.numpy() for k, v in RUN[part](model, given).items()}

    def ours() -> Outputs:
        asked = None if alone and pick.chance(0.5) else variant
        folder = read_pipeline(root, dtype=np.float32, variant=asked)
        return OURS[part](folder.components[part], inputs)

    def wide() -> Outputs:
        with jax.enable_x64(True):
            component = read_pipeline(root, dtype=np.float32, variant=variant).components[part]
            params = jax.tree.map(lambda x: x.astype(np.float64), component.params)
            return our_denoiser(replace(component, params=params), inputs, np.float64)

    return Case(
        {"options": options, "config.json": written, "inputs": jax.tree.map(np.shape, inputs)},
        frozenset({*options, *written, *files, *WORDS}),
        lambda: theirs(loaded),
        ours,
        lambda: theirs(loaded.double(), torch.float64),
        wide if part == "transformer" else None,
    )


def normal(pick: Choice, *shape: int) -> np.ndarray:
    return pick.rng.standard_normal(shape, np.float32)


def random_mask(pick: Choice, rows: int, length: int) -> np.ndarray:
    """Padded on either side; the last row whole."""
    mask = np.arange(length) < pick.rng.integers(1, length + 1, rows)[:, None]
    mask[-1] = True
    return (mask[:, ::-1] if pick.chance(0.3) else mask).astype(np.int64)


def text_inputs(model, pick: Choice) -> Outputs:
    config = model.config
    clip = type(model).__name__.startswith("CLIP")
    length = pick.rng.integers(2, config.max_position_embeddings + 1 if clip else 24).item()
    ids = pick.rng.integers(0, config.vocab_size, (3, length))
    if clip and type(config.eos_token_id) is int and config.eos_token_id < config.vocab_size:
        ids[0, pick.rng.integers(length)] = config.eos_token_id
        ids[1, length // 2 :] = config.eos_token_id
    return {"ids": ids, "mask": random_mask(pick, 3, length)}


def run_text(model, given) -> Outputs:
    if not type(model).__name__.startswith("CLIP"):
        out = model(given["ids"], attention_mask=given["mask"])
        return {"last": out.last_hidden_state}
    outputs = {}
    for label, mask in (("", None), ("masked ", given["mask"])):
        out = model(given["ids"], attention_mask=mask, output_hidden_states=True)
        projected = "Projection" in type(model).__name__
        outputs[f"{label}last"] = out.last_hidden_state
        outputs[f"{label}penultimate"] = out.hidden_states[-2]
        outputs[f"{label}pooled"] = out.text_embeds if projected else out.pooler_output
    return outputs


def our_text(part: Component, given) -> Outputs:
    apply = functional(part.family.build(part.spec, remat=False)).apply
    ids, mask = given["ids"].astype(np.int32), given["mask"].astype(np.int32)
    if "CLIPTextModel" not in part.family.class_names:
        return {"last": jax.jit(apply)(part.params, ids, mask)}
    outputs = {}
    for label, masks in (("", ()), ("masked ", (mask,))):
        for name, value in jax.jit(apply)(part.params, ids, *masks)._asdict().items():
            outputs[label + name] = value
    return outputs


def vae_inputs(model, pick: Choice) -> Outputs:
    config = model.config
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    patch = config.get("patch_size", [1])[0]
    up = patch * 2 ** (len(widths) - 1)
    height, width = pick(1, 2, 3, 4), pick(1, 2, 5)
    return {
        "image": normal(pick, 2, height * up, width * up, config.in_channels),
        "latent": normal(pick, 2, height, width, patch**2 * config.latent_channels),
    }


def run_vae(model, given) -> Outputs:
    image, latent = (x.permute(0, 3, 1, 2).contiguous() for x in (given["image"], given["latent"]))
    encoded = model.encode(image)
    if isinstance(model, diffusers.AutoencoderKLFlux2):
        codec = autoencoder_flux2.torch_codec(model)
        logvar = diffusers.Flux2KleinPipeline._patchify_latents(encoded.latent_dist.logvar)
        variance = (model.bn.running_var + model.config.batch_norm_eps)[:, None, None]
        return {
            "decode": nhwc(codec.decode(latent).sample),
            "encode": nhwc(codec.encode(image).latent),
            "logvar": nhwc(logvar - variance.log()),
        }
    outputs = {"decode": nhwc(model.decode(latent).sample)}
    if not hasattr(encoded, "latent_dist"):
        return outputs | {"encode": nhwc(encoded.latent)}
    outputs["encode"] = nhwc(encoded.latent_dist.mean)
    return outputs | {"logvar": nhwc(encoded.latent_dist.logvar)}


def our_vae(part: Component, given) -> Outputs:
    apply = functional(part.family.build(part.spec, remat=False)).apply
    mean, logvar = jax.jit(partial(apply, method="encode"))(part.params, given["image"])
    decoded = jax.jit(partial(apply, method="decode"))(part.params, given["latent"])
    outputs = {"decode": decoded, "encode": mean}
    return outputs if logvar is None else outputs | {"logvar": logvar}


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def denoiser_inputs(model, pick: Choice) -> Outputs:
    """Named as the class names them; pictures as NHWC."""
    config, kind = model.config, type(model).__name__
    unit = config.get("patch_size") or 2 ** (len(config.get("block_out_channels") or [0]) - 1)
    unit = config.get("all_patch_size", [unit])[0]
    packed = 2 if kind == "FluxTransformer2DModel" else 1
    height, width = (packed * unit * pick(*sizes) for sizes in ((1, 2, 3, 4), (2, 3, 5)))
    length = pick(1, 7, 12)
    widths = ("caption_channels", "joint_attention_dim", "cross_attention_dim", "cap_feat_dim")
    text = next(config[key] for key in widths if config.get(key))
    text = text[0] if isinstance(text, list | tuple) else text
    given = {
        "x": normal(pick, 2, height, width, config.in_channels // packed**2),
        "text": normal(pick, 2, length, text),
        "t": np.float32([pick(999, 500.25, 0), pick(1, 333)]),
    }
    if kind in ("PixArtTransformer2DModel", "SanaTransformer2DModel"):
        given["mask"] = random_mask(pick, 2, length)
    if kind in ("ZImageTransformer2DModel", "Lumina2Transformer2DModel"):  # padded on the right
        lengths = np.array([pick(1, length), length])
        given["mask"] = (np.arange(length) < lengths[:, None]).astype(np.int64)
    if kind in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        given["extras"] = {"pooled": normal(pick, 2, config.pooled_projection_dim)}
    if kind == "FluxTransformer2DModel" and config.guidance_embeds:
        given["extras"]["guidance"] = np.float32([1.0, pick(0, 1, 1.5)])
    if kind == "SanaTransformer2DModel" and config.guidance_embeds:
        given["t"] = np.float32([0.9, 0.2])
        given["extras"] = {"guidance": np.float32([4.5, pick(0, 1, 7.25)])}
    elif kind == "SanaTransformer2DModel":  # far beyond 1000 an ulp of a frequency is a radian
        given["t"] /= np.float32(max(config.timestep_scale, 1))
    if kind == "PixArtTransformer2DModel" and getattr(model, "use_additional_conditions", False):
        sizes = np.float32([[8 * height, 8 * width]] * 2)
        given["extras"] = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
    if kind == "UNet2DConditionModel" and config.addition_embed_type == "text_time":
        ids = np.float32([[64, 48, 0, 0, 64, 48], [512, 1024, 3, 5, 512, 1024]])
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["extras"] = {"text_embeds": normal(pick, 2, pooled), "time_ids": ids}
    return given


def run_denoiser(model, given) -> Outputs:
    kind, config = type(model).__name__, model.config
    if kind in NEWER:
        cond = Cond(given["text"], given.get("mask"), given.get("extras"))
        with mock.patch.object(torch, "exp", rounded_exp):
            out = NEWER[kind].FAMILY.call_torch(model, None, given["x"], given["t"], cond)
        return {"out": out}
    x = given["x"].permute(0, 3, 1, 2).contiguous()
    t, extras = given["t"], given.get("extras", {})
    arguments = {"encoder_hidden_states": given["text"]}
    if "mask" in given:
        arguments["encoder_attention_mask"] = given["mask"]
    if kind == "UNet2DConditionModel":
        arguments["added_cond_kwargs"] = extras
    elif kind == "PixArtTransformer2DModel":
        absent = {"resolution": None, "aspect_ratio": None}
        arguments["added_cond_kwargs"] = absent | extras
    elif kind == "SD3Transformer2DModel":
        arguments["pooled_projections"] = extras["pooled"]
    elif "guidance" in extras:  # scaled as in its pipelines
        arguments["guidance"] = extras["guidance"] * config.guidance_embeds_scale
    else:
        t = t * config.timestep_scale
    out = model(x, timestep=t, **arguments).sample
    return {"out": nhwc(out)[..., : config.in_channels]}


def rounded_exp(x, exp=torch.exp):
    """Nearest float32: torch's own is an ulp off in one frequency of Z-Image's time, whose angle of
    hundreds then shows in the output (tests/models/test_zimage.py)."""
    return exp(x.double()).to(x.dtype)


def our_denoiser(part: Component, given, dtype=np.float32) -> Outputs:
    apply = functional(part.family.build(part.spec, dtype=dtype, remat=False)).apply
    apply = jax.jit(apply, static_argnames="method")
    cond = Cond(given["text"], given.get("mask"), given.get("extras"))
    predict = part.family.predictor(apply, part.spec)
    return {"out": predict(part.params, given["x"], given["t"], cond)}


RUN = {"text_encoder": run_text, "vae": run_vae, "unet": run_denoiser, "transformer": run_denoiser}
OURS = {"text_encoder": our_text, "vae": our_vae, "unet": our_denoiser, "transformer": our_denoiser}
