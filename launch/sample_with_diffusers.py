"""Draw with a student in diffusers: python launch/sample_with_diffusers.py DIR PROMPTS OUT

Needs torch and diffusers. gadjax.json beside the weights says which steps it was trained for: times
of its own, or those of its scheduler in so many steps.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def main(model: Path, prompts: Path, out: Path) -> None:
    recipe = json.loads((model / "gadjax.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(model, low_cpu_mem_usage=False)
    own = recipe.get("timesteps")
    steps = {"timesteps": own} if own else {"num_inference_steps": recipe["steps"]}
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts.read_text().splitlines(),
        **steps,
        guidance_scale=recipe["guidance"],
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(0),
    ).images
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(out / f"{number:05d}.png")
    print(f"{len(images)} pictures in {out}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
