"""Stable Diffusion 3.5-medium to 4 steps with DP-DMD, at 1024 pixels.

Reproduces: DP-DMD (arXiv 2602.03139) with its code's settings: the 4 times of its scheduler,
          guidance 3.5, 5 critic updates for one of the student's (of 6,000 iterations 1,000 are
          the student's), rate 1e-5 for both, 32 samples, no average, DMD and critic at times that
          are uniform in the shifted grid (median sigma .75), DMD's gradient over mean|x_t - T|, an
          anchor of weight 0.05 at the teacher's 10th of 30 steps (sigma 0.851).
Differs:  that code draws one t a batch, here one a sample; its processes all draw the same initial
          noises, here every sample has its own.
Command:  gadjax train --config configs/sd35_dpdmd.py --workdir DIR
              --config.teacher=PATH/stable-diffusion-3.5-medium --config.data.prompts=PROMPTS.txt
Variants: dpdmd (default); dpdmd_k5 (the anchor at the 5th step, sigma 0.935); gad (dpdmd + GAD);
          dmd (without the anchor)
Hardware: meant for 32 TPU v5e chips or 8 GPUs of 80 GB.
Result:   not yet run.
"""

from gadjax.training.config import variant_config

LAW = {"times": "shifted", "shift": 3.0, "low": 0.0, "high": 1.0}
DMD = {"dmd": {"backprop": "all", "normalizer": "x_t"} | LAW}
ANCHOR = {"weight": 0.05, "target": "v", "steps": 10, "until": 851.3}
VARIANTS = {
    "dpdmd": DMD | {"anchor": ANCHOR},
    "dpdmd_k5": DMD | {"anchor": ANCHOR | {"steps": 5, "until": 935.3}},
    "gad": DMD | {"anchor": ANCHOR, "gad": {"weight": 1.0, "steps": 4, "loss": "square"}},
    "dmd": DMD,
}


def get_config(variant: str = "dpdmd"):
    config = variant_config(VARIANTS, variant)
    config.teacher = ""  # --config.teacher=PATH/stable-diffusion-3.5-medium
    config.guidance = 3.5
    config.student.timesteps = (1000.0, 857.69, 602.15, 8.93)
    config.steps = 1_000
    config.batch = 32
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.data.length = 256
    config.optim.update(lr=1e-5)
    config.ema = 0.0  # none: what is exported is the student itself
    config.critic.update(updates=5, lr=1e-5, b1=0.9)
    return config
