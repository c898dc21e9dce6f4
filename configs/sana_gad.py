"""SANA to 4 steps with SiD + GAD, at 512 pixels.

Reproduces: the kind of run that GAD's paper has on SANA (score identity). Its code is not public:
          SiD's settings are those of SiD-DiT on flow models (guidance 4.5 for teacher and critic,
          alpha 1, t = sigmoid(N(ln 2, 1.6^2)), the weight 1 - sigma, rate 5e-6, 256 samples, 4
          steps, no average), the weight of GAD is the public PixArt code's.
Differs:  SiD-DiT drops 10 % of the critic's captions (here none).
Command:  gadjax train --config configs/sana_gad.py --workdir DIR
              --config.teacher=PATH/Sana_600M_512px_diffusers --config.data.prompts=PROMPTS.txt
          (the language model is the larger half: gadjax embed first, then data.embeddings)
Variants: gad (default); sid (the base alone); both (with the diversity anchor)
Hardware: meant for 16 TPU v5e chips or 8 GPUs of 80 GB.
Result:   not yet run.

The student's times are the 4-step grid of the teacher's own DPM-Solver, which accepts no others.
"""

from gadjax.training.config import variant_config

LAW = {"times": "logit_normal", "low": 0.0, "high": 1.0}  # SiD-DiT's mean and deviation
SID = {"sid": {"guidance": "lsg", "weighting": "1 - sigma"} | LAW}
GAD = {"gad": {"weight": 1.0, "steps": 4, "loss": "square"}}
VARIANTS = {
    "gad": SID | GAD,
    "sid": SID,
    "both": SID | GAD | {"anchor": {"weight": 0.05, "target": "v", "steps": 4}},
}


def get_config(variant: str = "gad"):
    config = variant_config(VARIANTS, variant)
    config.teacher = ""  # --config.teacher=PATH/Sana_600M_512px_diffusers
    config.guidance = 4.5
    config.student.timesteps = (999.67, 899.64, 749.62, 499.67)
    config.steps = 10_000
    config.batch = 256
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.data.length = 300
    config.optim.update(lr=5e-6, b1=0.0, b2=0.999, clip=0.0)
    config.ema = 0.0  # none: what is exported is the student itself
    config.critic.update(updates=1, lr=5e-6)
    return config
