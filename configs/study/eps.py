"""The study: a base objective with and without GAD and the anchor, on the bundled eps teacher.

Reproduces: nothing published; the question is which term brings what back (docs/results/study).
Command:  python -m gadjax.recipes.study (all cells, resumable), or one of them:
          gadjax train --config configs/study/eps.py:dmd_both --workdir DIR --config.seed=0
Variants: {regression,dmd,tdm,sid}_{none,gad,anchor,both}; script and script_half, TDM with the
          released finite differences in float32 and with fp16 rounding; and, on dmd_both (dmd_gad
          for step_first), one thing changed: see CHANGES.
Hardware: 2 CPU cores, about 5 minutes a cell when they are free.
Result:   docs/results/study/README.md
"""

from gadjax.recipes.study import cell_config


def get_config(variant: str = "dmd_both"):
    config = cell_config(variant)
    config.teacher = "asset:shapes_teacher"
    config.student.steps = 4
    config.student.timesteps = (899, 674, 449, 224)
    return config
