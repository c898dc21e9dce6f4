"""Repair of a distilled student by adapters (`gadjax repair`).

Reproduces: no published numbers; docs/repair.md has what it brings back on the bundled world.
Command:  gadjax repair --teacher DIR --student DIR --prompts FILE --out DIR, which sets the
          teacher, the student's start, its timesteps and the prompts.
Variants: ode (default: a student of deterministic steps); fresh_noise (one that adds noise).
Hardware: 2 CPU cores for the bundled world.
Result:   docs/repair.md.
"""

from gadjax.training.config import variant_config

# Terms of weight 0 brought nothing on the bundled world; a weight puts one in.
VARIANTS = {
    "ode": {
        "regression": {"steps": 4},
        "tether": {"weight": 0.1},
        "gad": {"weight": 0.0, "steps": 4, "loss": "polar"},
        "anchor": {"weight": 0.0, "steps": 4},
    },
    "fresh_noise": {
        "regression": {"end": "clean", "steps": 4},
        "tether": {"weight": 0.1, "end": "clean"},
        "gad": {"weight": 0.0, "end": "clean", "steps": 4, "loss": "polar"},
    },
}


def get_config(variant: str = "ode"):
    config = variant_config(VARIANTS, variant)
    config.student.lora.rank = 16
    config.steps = 600
    config.batch = 16
    config.optim.update(lr=1e-3, warmup=20, decay=600, b1=0.0, b2=0.95)
    config.ema = 0.98
    config.checkpoint.update(every=100, keep=1)
    config.log.every = 20
    config.preview.every = 0
    return config
