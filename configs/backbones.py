"""Large backbones to 4 steps as adapters: DMD + GAD + the diversity anchor, one variant a teacher.

Reproduces: no published numbers. DP-DMD's form (arXiv 2602.03139) with GAD beside it; adapters of
          rank 64 for student and critic on one copy of the teacher's weights.
Command:  gadjax train --config configs/backbones.py:VARIANT --workdir DIR
              --config.teacher=PATH --config.data.prompts=PROMPTS.txt
Variants: sd35_large (default; stable-diffusion-3.5-large, 1024 pixels), pixart_sigma
          (PixArt-Sigma-XL-2-1024-MS), flux_dev (FLUX.1-dev; student and critic have the
          teacher's guidance as an input), flux_schnell (FLUX.1-schnell, itself a few-step student),
          z_image (Z-Image), lumina2 (Lumina-Image-2.0), flux2_klein (FLUX.2-klein-base-4B)
Hardware: chosen by `gadjax plan`; no variant has run on any.
Result:   not yet run.
"""

from gadjax.training.config import variant_config

GAD = {"weight": 1.0, "steps": 2, "loss": "square"}
FLOW = {
    "dmd": {"backprop": "all", "normalizer": "x_t"},
    "gad": GAD,
    "anchor": {"weight": 0.05, "target": "v", "steps": 4},
}
DDPM = {
    "dmd": {"backprop": "all"},
    "gad": GAD,
    "anchor": {"weight": 0.05, "target": "x0", "steps": 4},
}
VARIANTS = {"sd35_large": FLOW, "pixart_sigma": DDPM, "flux_dev": FLOW, "flux_schnell": FLOW}
VARIANTS |= {"z_image": FLOW, "lumina2": FLOW, "flux2_klein": FLOW}
# Variant -> the teacher's guidance, the student's times, prompt length.
SAMPLING = {
    "sd35_large": (3.5, (1000.0, 857.69, 602.15, 8.93), 256),
    "pixart_sigma": (4.5, (999, 749, 499, 249), 300),
    "flux_dev": (3.5, (1000.0, 904.53, 759.51, 512.84), 512),  # its grid at 1024 pixels
    "flux_schnell": (1.0, (1000.0, 750.0, 500.0, 250.0), 256),
    # Guidance 5 in diffusers, whose form is cond + s (cond - null).
    "z_image": (6.0, (1000.0, 947.37, 857.14, 666.67), 512),
    "lumina2": (4.0, (1000.0, 947.37, 857.14, 666.67), 256),
    "flux2_klein": (4.0, (1000.0, 967.38, 908.14, 767.2), 512),  # its grid of 4 at 1024 pixels
}


def get_config(variant: str = "sd35_large"):
    config = variant_config(VARIANTS, variant)
    config.teacher = ""  # --config.teacher=PATH
    config.guidance, config.student.timesteps, config.data.length = SAMPLING[variant]
    if variant == "flux_dev":  # the scale is an input of the network
        config.student.guidance = config.guidance
    config.student.lora.update(rank=64, alpha=64.0)
    config.steps = 3_000
    config.batch = 32
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.optim.update(lr=1e-4, warmup=50)  # ten times a whole network's
    config.critic.update(updates=5, lr=1e-4, b1=0.9)
    return config
