"""SDXL to 4 steps with DMD2, or with DP-DMD in its x0 form, at 1024 pixels.

Reproduces: dmd2 and dmd2_gan: DMD2 (arXiv 2405.14867), 4 steps: times 999/749/499/249, guidance 8,
          rate 5e-7 for both, 5 critic updates for one of the student's, 128 samples, a
          discriminator of weight 0.005, a student that adds noise between its steps and is updated
          before the critic is.
          dpdmd: DP-DMD's form for diffusion models (the anchor's target is x0). Its settings for
          SDXL are not public; weight and K (a third of the teacher's steps) are SD3.5's.
Differs:  DMD2's discriminator is a tower of convolutions on the middle block of the critic; here
          it is an MLP there, averaged over positions.
Command:  gadjax train --config configs/sdxl.py:dmd2 --workdir DIR
              --config.teacher=PATH/stable-diffusion-xl-base-1.0 --config.data.prompts=PROMPTS.txt
Variants: dpdmd (default); dpdmd_gad (with GAD); dmd2; dmd2_gan (needs pictures:
          --config.data.latents=DIR of gadjax embed --images)
Hardware: meant for 64 TPU v5e chips or 16 GPUs of 80 GB.
Result:   not yet run.
"""

from gadjax.training.config import variant_config

ANCHOR = {"anchor": {"weight": 0.05, "target": "x0", "steps": 10, "until": 666.0}}
VARIANTS = {
    "dpdmd": {"dmd": {"backprop": "all"}} | ANCHOR,
    "dpdmd_gad": {"dmd": {"backprop": "all"}, "gad": {"weight": 1.0, "steps": 4, "loss": "square"}}
    | ANCHOR,
    "dmd2": {"dmd": {}},
    "dmd2_gan": {"dmd": {}, "adversarial": {"weight": 0.005}},
}


def get_config(variant: str = "dpdmd"):
    config = variant_config(VARIANTS, variant)
    config.teacher = ""  # --config.teacher=PATH/stable-diffusion-xl-base-1.0
    config.guidance = 8.0
    config.student.timesteps = (999, 749, 499, 249)
    config.steps = 10_000
    config.batch = 128
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.data.length = 77
    config.optim.update(lr=5e-7, warmup=500, weight_decay=1e-2, clip=10.0)
    config.critic.update(updates=5, lr=5e-7, b1=0.9)
    if variant.startswith("dmd2"):
        config.student.rollout = "fresh_noise"
        config.critic.first = False
    return config
