"""A 4-step student of the bundled flow teacher at guidance 4: DMD + GAD + the diversity anchor.

Command:  gadjax train --config configs/shapes_gad.py --workdir runs/shapes_gad
Variants: --config configs/shapes_gad.py:VARIANT with
  gad (default)  dmd + gad + anchor
  dmd            dmd alone
  anchor         dmd + anchor (DP-DMD)
  paired         dmd + 3 regression: what the study recommends (docs/results/README.md)
  tdm            tdm + gad + anchor
  regression     regression to the teacher's own next latent
  quickstart     gad in fewer and smaller updates, for launch/quickstart.sh
Hardware: 2 CPU cores.
Result:   quickstart: docs/results/quickstart/report.md; the others not yet run at this guidance
          (in 800 updates of 16 samples: docs/results/study/README.md)

The student's times are the 4-step grid of the teacher's own DPM-Solver, which accepts no others.
"""

from gadjax.training.config import variant_config

GAD = {"weight": 0.3, "steps": 4}
ANCHOR = {"weight": 0.05, "target": "v", "steps": 4}
VARIANTS = {
    "gad": {"dmd": {}, "gad": GAD, "anchor": ANCHOR},
    "dmd": {"dmd": {}},
    "anchor": {"dmd": {}, "anchor": ANCHOR},
    "paired": {"dmd": {}, "regression": {"weight": 3.0, "steps": 4}},
    "tdm": {"tdm": {}, "gad": GAD, "anchor": ANCHOR},
    "regression": {"regression": {"steps": 4}},
    "quickstart": {"dmd": {}, "gad": GAD, "anchor": ANCHOR},
}


def get_config(variant: str = "gad"):
    config = variant_config(VARIANTS, variant)
    config.teacher = "asset:shapes_flow_teacher"
    config.guidance = 4.0
    config.student.steps = 4
    config.student.timesteps = (999, 749.25, 499.5, 249.75)
    config.steps = 2000
    config.batch = 32
    config.remat = "none"
    config.optim.update(lr=2e-4, warmup=20, decay=2000, b1=0.0, b2=0.95)
    config.critic.update(updates=2, lr=4e-4)
    config.ema = 0.995
    config.data.update(prompts="asset:shapes_prompts.txt", length=16)
    config.checkpoint.every = 500
    config.log.every = 20
    config.preview.update(every=500, features="asset:shapes_features")
    if variant == "quickstart":
        config.steps = 200
        config.batch = 16
        config.optim.update(lr=3e-4, decay=200)
        config.critic.lr = 6e-4
        config.ema = 0.98
        config.checkpoint.every = 50
        config.preview.every = 50
    return config
