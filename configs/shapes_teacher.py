"""The bundled teacher: a PixArt of 1 M parameters on the captioned shapes, by plain denoising.

Commands: python -m gadjax.experiments.folder --out DIR    (torch: random weights in the folder)
          python -m gadjax.experiments.shapes_vae --folder DIR
          python -m gadjax.experiments.shapes_text --folder DIR
          gadjax train --config configs/shapes_teacher.py --workdir RUN --config.teacher=DIR
          gadjax export --workdir RUN --out TEACHER
Variants: eps (default); flow, the flow teacher, from the eps teacher's weights:
          python -m gadjax.experiments.flow_folder --out DIR
          gadjax train --config configs/shapes_teacher.py:flow --workdir RUN --config.teacher=DIR
Hardware: 2 CPU cores, at 650 images/s in one leg of the run: 40 minutes in all.
Result:   as one run from the random start: not yet run. The bundled weights came from this recipe
          in legs, and draw 98.1 % of fully specified captions right: the story and the numbers
          are in gadjax/assets/shapes_teacher/README.md. The flow variant made the bundled flow
          teacher, see gadjax/assets/shapes_flow_teacher/README.md.

`teacher` is the folder whose text encoder and autoencoder are used; student.init="random" starts
from random weights of the transformer, "teacher" from its weights.
"""

from gadjax.errors import InputError
from gadjax.training.config import default_config


def get_config(variant: str = "eps"):
    if variant not in ("eps", "flow"):
        raise InputError(f"--config: found the variant {variant!r}; expected eps or flow")
    config = default_config()
    config.teacher = "asset:shapes_teacher"
    config.guidance = 2.0
    config.student.init = "random"
    config.student.steps = 1  # of no use to plain denoising
    config.student.timesteps = (999,)
    config.objective = {"denoising": {"balance": 0.02}}
    config.steps = 24_000
    config.batch = 64
    config.remat = "none"
    config.optim.update(lr=1e-3, warmup=500, decay=24_000, b2=0.99, weight_decay=1e-3)
    config.ema = 0.999
    config.data.update(world="gadjax.worlds.shapes", cache=49_152, dropout=0.1, length=16)
    config.checkpoint.every = 500
    config.log.every = 100
    config.preview.every = 2000
    if variant == "flow":
        config.teacher = ""  # --config.teacher=DIR of experiments.flow_folder
        config.student.init = "teacher"
        config.objective = {"denoising": {}}
        config.steps = 8_000
        config.seed = 3
        config.optim.update(warmup=300, decay=8_000)
    return config
