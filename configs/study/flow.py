"""The study on the bundled flow teacher: v prediction on a straight schedule.

Reproduces: nothing published (docs/results/study).
Command:  gadjax train --config configs/study/flow.py:dmd_both --workdir DIR --config.seed=0
Variants: those of configs/study/eps.py
Hardware: 2 CPU cores, about 5 minutes a cell when they are free.
Result:   docs/results/study/README.md

The student's times are the 4-step grid of the teacher's own DPM-Solver, which takes no others.
"""

from gadjax.recipes.study import cell_config


def get_config(variant: str = "dmd_both"):
    config = cell_config(variant)
    config.teacher = "asset:shapes_flow_teacher"
    config.student.steps = 4
    config.student.timesteps = (999, 749.25, 499.5, 249.75)
    return config
