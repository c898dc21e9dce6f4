"""Seconds of both updates with adapters, on the float32 base and on an 8-bit one, beside whole
weights'."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from benchmarks.common import Figure, Size, make_batch, make_network, seconds
from benchmarks.step import Bench, make_step_spec

from gadjax.models.adapters import TARGETS, Lora, abstract_adapters, init_adapters
from gadjax.models.quantized import quantized
from gadjax.objectives import DMD, GAD, Anchor
from gadjax.training.config import read_config
from gadjax.training.setup import prepare
from gadjax.training.state import create_state
from gadjax.training.steps import critic_step, student_step

CONFIG = Path(__file__).parents[2] / "configs/shapes_gad.py"
RANK, MOST = 16, 1.15
WHOLE, ADAPTED, ON_8_BITS = "whole weights", f"adapters of rank {RANK}", "the same on 8 bits"
Updates = dict[str, Callable[[], object]]  # update -> function that does it, from the last state


def adapted(size: Size, rounds: int) -> Iterator[Figure]:
    """Figures of the bundled flow teacher, 16 samples of the quickstart's config, and of a random
    PixArt with rematerialised blocks; both with DMD + GAD + anchor."""
    made: tuple[tuple[str, Callable[[str], Updates]], ...] = (
        ("bundled", bundled),
        (str(size), partial(random_network, size)),
    )
    for name, make in made:
        runs = {kind: make(kind) for kind in (WHOLE, ADAPTED, ON_8_BITS)}
        for update in runs[WHOLE]:
            taken = seconds({kind: of[update] for kind, of in runs.items()}, rounds)
            yield Figure(f"{name}, {update}: {WHOLE}, s", taken[WHOLE])
            for kind in (ADAPTED, ON_8_BITS):
                ratio = taken[kind] / taken[WHOLE]
                yield Figure(f"{name}, {update}: {kind} / {WHOLE}", ratio, MOST)


def bundled(kind: str) -> Updates:
    rank = 0 if kind == WHOLE else RANK
    flags = [f"--config.student.lora.rank={rank}", "--config.preview.every=0"]
    flags += [f"--config.int8={TARGETS}"] * (kind == ON_8_BITS)
    bench = Bench(prepare(read_config([f"--config={CONFIG}:quickstart", *flags])))

    def do(step):
        bench.state, metrics = step(bench.state, bench.frozen, bench.raw, jnp.uint32(0))
        return metrics

    return {
        "student's update": partial(do, bench.steps.student),
        "critic's update": partial(do, bench.steps.critic),
    }


def random_network(size: Size, kind: str) -> Updates:
    objective = DMD() + 0.3 * GAD(steps=2) + 0.05 * Anchor(steps=2)
    step_spec = make_step_spec(size, objective)
    base = jax.device_get(make_network(size)[0].init(jax.random.key(0)))
    networks, trained = {"teacher": base}, base
    if kind != WHOLE:
        trained = init_adapters(jax.random.key(1), abstract_adapters(base, Lora(RANK)))
        base = quantized(base, TARGETS) if kind == ON_8_BITS else base
        networks = dict.fromkeys(("teacher", "student/base", "critic/base"), base)
    networks, batch = jax.device_put((networks, make_batch(size)))
    params = {role: jax.tree.map(jnp.array, trained) for role in step_spec.optimizers}
    state = create_state(params, step_spec.optimizers)

    def do(step):
        nonlocal state
        state, metrics = step(state, networks, batch)
        return metrics

    steps = {"student's update": student_step, "critic's update": critic_step}
    return {
        name: partial(do, jax.jit(partial(step, step_spec), donate_argnums=0))
        for name, step in steps.items()
    }
