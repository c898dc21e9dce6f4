"""Sample from a student with diffusers: python launch/sample_with_diffusers.py DIR PROMPTS OUT

Needs torch and diffusers. gadjax.json in the folder has the steps that the student was trained for:
its timesteps, or a number of steps of its scheduler.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def main(model: Path, prompts: Path, out: Path) -> None:
    config = json.loads((model / "gadjax.json").read_text())
    pipe = DiffusionPipeline.from_pretrained(model, low_cpu_mem_usage=False)
    timesteps = config.get("timesteps")
    steps = {"timesteps": timesteps} if timesteps else {"num_inference_steps": config["steps"]}
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts.read_text().splitlines(),
        **steps,
        guidance_scale=config["guidance"],
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(0),
    ).images
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(out / f"{number:05d}.png")
    print(f"{len(images)} images in {out}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
