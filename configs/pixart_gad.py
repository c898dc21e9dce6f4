"""PixArt-alpha to 4 steps with TDM + GAD + the diversity anchor, at 512 pixels.

Reproduces: the setting of the public GAD code (PixArt-XL-2-512x512, grid 899/674/449/224, guidance
4.5, student 4e-6 and critic 2e-5), with exact flow-map tangents instead of its finite differences.
Differs:  that code has 16 samples (here 128 at the same rates), a student's rate that falls to zero
          by a cosine (here constant), fp16 autocast (here bfloat16).
Command:  gadjax train --config configs/pixart_gad.py --workdir DIR
              --config.teacher=PATH/PixArt-XL-2-512x512 --config.data.prompts=PROMPTS.txt
Variants: gad (default); tdm (the base alone); script (the released finite differences, float32);
          dpdmd (DP-DMD: DMD through the whole rollout + the x0 anchor)
Hardware: meant for 16 TPU v5e chips or 8 GPUs of 80 GB.
Result:   not yet run.
"""

from gadjax.training.config import variant_config

VARIANTS = {
    "gad": {
        "tdm": {},
        "gad": {"weight": 1.0, "loss": "square"},
        "anchor": {"weight": 0.05, "target": "x0"},
    },
    "tdm": {"tdm": {}},
    "script": {"tdm": {}, "gad_script": {"weight": 1.0}},
    "dpdmd": {"dmd": {"backprop": "all"}, "anchor": {"weight": 0.05, "target": "x0"}},
}


def get_config(variant: str = "gad"):
    config = variant_config(VARIANTS, variant)
    config.teacher = ""  # --config.teacher=PATH/PixArt-XL-2-512x512
    config.steps = 10_000
    config.batch = 128
    config.microbatch = 128
    config.mesh.update(data=1, fsdp=-1)  # beyond 128 devices: fsdp=128, data=-1
    config.dtype = "bfloat16"
    config.optim.update(lr=4e-6, warmup=50, b1=0.0, b2=0.95, weight_decay=1e-2)
    config.ema = 0.0  # none: what is exported is the student itself
    config.critic.update(updates=5 if variant == "dpdmd" else 1, lr=2e-5, warmup=0, clip=0.0)
    return config
