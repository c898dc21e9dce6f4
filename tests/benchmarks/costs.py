"""Operations and memory of the updates of terms, on the bundled flow teacher: exact, any device.

To compare with another commit, copy this file into its clone's tests/benchmarks and run it there:
`python tests/benchmarks/costs.py`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = str(ROOT / "tests"), str(ROOT)  # the clone's gadjax, installed or not

import jax  # noqa: E402
import numpy as np  # noqa: E402
from benchmarks.common import MIB, Figure  # noqa: E402

from gadjax.ops.flops import flops  # noqa: E402
from gadjax.training.compile import compile_steps  # noqa: E402
from gadjax.training.config import read_config  # noqa: E402
from gadjax.training.setup import prepare  # noqa: E402

GAD = {"weight": 0.3, "steps": 4}
ANCHOR = {"weight": 0.05, "target": "v", "steps": 4}
OBJECTIVES = {name: {name: {}} for name in ("dmd", "tdm", "sid", "consistency", "denoising")} | {
    "dmd + adversarial": {"dmd": {}, "adversarial": {}},
    "regression": {"regression": {"steps": 4}},
    "gad": {"gad": GAD},
    "anchor": {"anchor": ANCHOR},
    "dmd + gad + anchor": {"dmd": {}, "gad": GAD, "anchor": ANCHOR},
}
WITH_PICTURES = "denoising", "dmd + adversarial"
# Buffers are assigned before LLVM, whose levels they do not depend on.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def costs(objectives: tuple[str, ...] = tuple(OBJECTIVES)) -> Iterator[Figure]:
    """FLOPs of the traced updates of 16 samples, batch and prompts included, and their memory.

    objectives: some of `OBJECTIVES`.
    """
    for name in objectives:
        config = read_config([f"--config={ROOT / 'configs/shapes_gad.py'}:quickstart"])
        config.objective = OBJECTIVES[name]
        config.preview.every = 0
        if name in WITH_PICTURES:
            config.data.update(prompts="", world="gadjax.worlds.shapes")
        run = prepare(config)
        steps = compile_steps(run)
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.frozen)
        state = jax.eval_shape(run.start, run.initial_params)
        arguments = state, frozen, run.source.batch(0, config.batch), np.uint32(0)
        for update in dict.fromkeys(steps.order):
            step = update.__name__
            yield Figure(f"{name}, {step}: GFLOP", flops(update, *arguments) / 1e9)
            memory = update.lower(*arguments).compile(FAST).memory_analysis()
            yield Figure(f"{name}, {step}: temp MiB", memory.temp_size_in_bytes / MIB)
            yield Figure(f"{name}, {step}: held MiB", memory.argument_size_in_bytes / MIB)


if __name__ == "__main__":
    for figure in costs(tuple(sys.argv[1:]) or tuple(OBJECTIVES)):
        print(f"{figure.name:50} {figure.value:12.6f}", flush=True)
