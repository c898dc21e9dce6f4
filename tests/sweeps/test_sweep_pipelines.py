"""Pictures of random pipeline folders by both, from the same initial noise."""

import json
from functools import partial
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from random_pipelines import CONCEPTS, NEWER, PIPELINES, write_pipeline
from random_schedulers import ODD, USUAL
from sweeping import Case, Choice, Outputs, sweep

from gadjax.api import load, with_sampling
from gadjax.formats.diffusers_folder import INDEX
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.pipelines.diffusers_calls import same_noise
from gadjax.pipelines.sampling import draw as draw_pictures
from gadjax.pipelines.sampling import initial_noise

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4  # of a picture from 0 to 1
WORDS = {"scheduler", "steps", "size", "negative", "guidance", "length", "_class_name"}
WORDS |= {"num_train_timesteps", "padding_side"}
PROMPTS = (
    "a red circle above the blue square",
    "",
    "Ein ROTER Kreis, 3 Stück 🟥",
    "the green circle " * 30,
    *(f"a {token} above the square" for token in CONCEPTS),
)
LENGTHS = ("PixArt", "Sana", "StableDiffusion3")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name, tmp_path):
    sweep(name, partial(draw, name), tmp_path, len(PIPELINES))


def draw(name: str, rng: np.random.Generator, root: Path) -> Case:
    pick = Choice(rng)
    scheduler = write_pipeline(name, root / "folder", pick)
    folder = root / "folder"
    prompts = [pick(*PROMPTS) for _ in range(pick(1, 2, 3))]
    asked = {
        "steps": pick(1, 2, 2, 3, 4),
        "guidance": pick(0, 0.5, 1, 1.5, 3.0, 4.5, 7.5, -1),
        "negative": pick(*[None] * 4, "", "the blue square"),
        "size": size_of(name, pick),
    }
    if asked["guidance"] <= 1 and name != "SanaSprintPipeline" and pick.chance(0.8):
        asked["negative"] = None
    if name in ("SanaSprintPipeline", "Flux2KleinPipeline") and pick.chance(0.9):
        asked["negative"] = None
    if name.startswith(LENGTHS) and pick.chance(0.7):
        (folder / GADJAX_JSON).write_text(json.dumps({"length": pick(5, 12, 30)}))
    elif name in NEWER:  # some of which have a chat's or system's prompt before the user's
        (folder / GADJAX_JSON).write_text(json.dumps({"length": pick(20, 64, 200)}))

    def ours() -> Outputs:
        model = with_sampling(load(folder), **asked)
        noise = initial_noise(0, len(prompts), model.pipeline.latent)
        with jax.default_matmul_precision("highest"):
            pictures = draw_pictures(model, prompts, noise)
        return {"pictures": pictures / 2 + 0.5}

    return Case(
        {"scheduler": scheduler, "prompts": prompts, **asked, "folder": summary(folder)},
        frozenset({*WORDS, *USUAL, *ODD}),
        lambda: {"pictures": their_pictures(folder, prompts, asked)},
        ours,
        lambda: {"pictures": their_pictures(folder, prompts, asked, moved=True)},
        tolerance=TOLERANCE,
    )


def size_of(name: str, pick: Choice) -> tuple[int, int] | None:
    """Of which diffusers takes multiples of 8, and of SANA's 32; NEWER have no default."""
    unit = {"San": 32, "Lum": 16}.get(name[:3], 8)
    sides = (1, 2) if unit == 32 else (1, 2, 3)
    return pick(*[None] * (name not in NEWER), (unit * pick(*sides), unit * pick(*sides)))


def summary(folder: Path) -> dict:
    """What a failure shows of a folder's networks."""
    return {
        str(path.relative_to(folder)): json.loads(path.read_text())
        for path in (folder / INDEX, *sorted(folder.glob("*/config.json")))
    }


def their_pictures(
    folder: Path, prompts: list[str], asked: dict, moved: bool = False
) -> np.ndarray:
    """moved: from a noise that is one rounding away."""
    index = json.loads((folder / INDEX).read_text())
    absent = {name: None for name, part in index.items() if part == [None, None]}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    kind = type(pipeline).__name__
    arguments = {"num_inference_steps": asked["steps"], "guidance_scale": asked["guidance"]}
    if kind == "FluxPipeline" and not pipeline.transformer.config.guidance_embeds:
        if asked["guidance"] > 1:  # guidance_scale is the network's input alone
            arguments |= {
                "true_cfg_scale": asked["guidance"],
                "negative_prompt": [""] * len(prompts),
            }
    if kind == "ZImagePipeline":  # its guidance is cond + s (cond - null)
        arguments["guidance_scale"] = max(asked["guidance"], 1) - 1
    if kind == "SanaSprintPipeline" and asked["steps"] != 2:
        arguments["intermediate_timesteps"] = None
    if asked["negative"] is not None:
        arguments["negative_prompt"] = [asked["negative"]] * len(prompts)
    if (folder / GADJAX_JSON).is_file():
        arguments["max_sequence_length"] = json.loads((folder / GADJAX_JSON).read_text())["length"]
    if kind.startswith(("PixArt", "Sana")):
        arguments |= {"use_resolution_binning": False, "clean_caption": False}
    body = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    up = 2 ** (len(pipeline.vae.config.get("block_out_channels") or (1, 1)) - 1)
    up *= pipeline.vae.config.get("patch_size", (1,))[0]
    packed = kind == "FluxPipeline"
    height, width = asked["size"] or [up * body.config.sample_size] * 2
    arguments |= {"height": height, "width": width}
    latent = (height // up, width // up, body.config.in_channels // (4 if packed else 1))
    noise = initial_noise(0, len(prompts), latent)
    noise = np.nextafter(noise, np.float32(np.inf)) if moved else noise

    def as_latents(x):
        x = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
        return pipeline._pack_latents(x, *x.shape) if packed else x

    with same_noise(pipeline.scheduler, noise, as_latents):
        drawn = {"latents": as_latents(noise), "output_type": "np"}
        return pipeline(prompt=list(prompts), **drawn, **arguments).images
