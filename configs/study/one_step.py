"""The study with students of one step, on the bundled eps teacher.

Reproduces: nothing published (docs/results/study).
Command:  gadjax train --config configs/study/one_step.py:dmd_gad --workdir DIR --config.seed=0
Variants: {dmd,sid,tdm,regression}_{none,gad}; an anchor needs a second step.
Hardware: 2 CPU cores, about 5 minutes a cell when they are free.
Result:   docs/results/study/README.md

One interval spans all of the teacher's, so that its maps take 8 steps where 4 students' steps of
configs/study/eps.py take 4 each.
"""

from gadjax.recipes.study import cell_config


def get_config(variant: str = "dmd_gad"):
    config = cell_config(variant)
    config.teacher = "asset:shapes_teacher"
    config.student.steps = 1
    config.student.timesteps = (899,)
    for term in {"gad", "regression"} & set(config.objective):
        config.objective[term]["steps"] = 8
    return config
