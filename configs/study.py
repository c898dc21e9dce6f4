"""One cell of the study: a bundled teacher at real guidance, a base objective, further terms.

Reproduces: nothing published; the question is which term brings what back (docs/results/study).
Command:  python -m gadjax.experiments.study (all cells, several seeds of each at once), or one run:
          gadjax train --config configs/study.py:flow/dmd_polar_anchor --workdir DIR
Variants: FAMILY/VARIANT, both listed in gadjax/experiments/study_cells.py
Hardware: 2 CPU cores, 5 to 10 minutes a run when they are free; or one GPU.
Result:   docs/results/study/README.md
"""

from gadjax.experiments.study_cells import config_of


def get_config(cell: str = "flow/dmd_polar_anchor"):
    return config_of(cell)
