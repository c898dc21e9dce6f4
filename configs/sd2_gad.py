"""Stable Diffusion 2 to 4 steps, or to one, by output matching + GAD, at 512 pixels.

Reproduces: the kind of run that GAD's paper has on SD2 (output matching with LADD). Its code is not
          public: grid, weights and rates are those of the public PixArt code, not the paper's.
Differs:  LADD's discriminator has heads on several blocks, with an R1 penalty; the adversarial term
          here has one head on the features half-way. The student's rate is constant and 128 samples
          stand for the PixArt code's 16, as in pixart_gad.py.
Command:  gadjax train --config configs/sd2_gad.py --workdir DIR
              --config.teacher=PATH/stable-diffusion-2-base --config.data.prompts=PROMPTS.txt
Variants: gad (regression to the teacher's next latent + GAD, the default); base (regression alone);
          adversarial and adversarial_gad (with a discriminator on the teacher's features;
          needs pictures: --config.data.latents=DIR of gadjax embed --images); one and one_gad (a
          single step)
Hardware: meant for 16 TPU v5e chips or 8 GPUs of 80 GB.
Result:   not yet run.
"""

from gadjax.training.config import variant_config

REGRESSION = {"regression": {"steps": 4}}
ADVERSARIAL = {"adversarial": {"weight": 0.1, "features": "teacher", "loss": "hinge"}}
GAD = {"gad": {"weight": 1.0, "steps": 4, "loss": "square"}}
ONE = {"regression": {"steps": 12}}
VARIANTS = {
    "gad": REGRESSION | GAD,
    "base": REGRESSION,
    "adversarial": REGRESSION | ADVERSARIAL,
    "adversarial_gad": REGRESSION | ADVERSARIAL | GAD,
    "one": ONE,
    "one_gad": ONE | {"gad": {"weight": 1.0, "steps": 12, "loss": "square"}},
}


def get_config(variant: str = "gad"):
    config = variant_config(VARIANTS, variant)
    config.teacher = ""  # --config.teacher=PATH/stable-diffusion-2-base
    config.guidance = 7.5
    config.student.timesteps = (899,) if variant.startswith("one") else (899, 674, 449, 224)
    config.student.steps = len(config.student.timesteps)
    config.steps = 10_000
    config.batch = 128
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.data.length = 77
    config.optim.update(lr=4e-6, warmup=50, b1=0.0, b2=0.95, weight_decay=1e-2)
    config.critic.update(updates=1, lr=2e-5)
    return config
