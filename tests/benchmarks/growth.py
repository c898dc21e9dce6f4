"""How the student's update grows with tokens, batch, steps of the teacher's map and directions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from benchmarks.common import MIB, Figure, Size, clock, temp
from benchmarks.step import make_step_spec, start

from gadjax.objectives import DMD, GAD, Anchor
from gadjax.training.steps import student_step

# Axis -> its values; the first of each but the own is every other axis' value.
AXES: Mapping[str, Sequence[int]] = {
    "tokens": (256, 576, 1024, 2304),
    "batch": (2, 4, 8, 16),
    "map steps": (1, 2, 4, 8),
    "directions": (1, 2, 4),
}
TINY: Mapping[str, Sequence[int]] = {"tokens": (16, 64), "map steps": (1, 2)}


def growth(
    size: Size, axes: Mapping[str, Sequence[int]] = AXES, rounds: int = 3
) -> Iterator[Figure]:
    """Seconds and temporary memory of updates with DMD + GAD + anchor, one axis at a time.

    Beside each axis its law, by least squares: the exponent p of c n^p for tokens and batch, and
    for map steps and directions what one more adds to the first one's.

    Args:
      size: of a random PixArt in float32, with its blocks rematerialised.
      axes: values by axis.
      rounds: timed updates, of which the shortest counts.
    """
    first = {"batch": 2, "map steps": 1, "directions": 1} | {k: v[0] for k, v in axes.items()}
    done: dict[tuple, tuple[float, float]] = {}
    for axis, values in axes.items():
        measured = []
        for value in values:
            point = first | {axis: value}
            key = tuple(point.values())
            done[key] = done.get(key) or cost(size, point, rounds)
            measured.append(done[key])
            yield Figure(f"{axis} {value}: s", measured[-1][0])
            yield Figure(f"{axis} {value}: temp MiB", measured[-1][1])
        for name, of in zip(("s", "temp MiB"), np.transpose(measured), strict=True):
            yield law(axis, name, values, of)


def cost(size: Size, point: Mapping[str, int], rounds: int) -> tuple[float, float]:
    """Seconds of an update, and its temporary memory in MiB."""
    side = 2 * round(point["tokens"] ** 0.5)
    size = replace(size, side=side, batch=point["batch"])
    gad = GAD(steps=point["map steps"], directions=point["directions"])
    step_spec = make_step_spec(size, DMD() + 0.3 * gad + 0.05 * Anchor(steps=point["map steps"]))
    state, networks, batch = start(size, step_spec)
    program = jax.jit(partial(student_step, step_spec), donate_argnums=0)
    compiled = program.lower(state, networks, batch).compile()
    now, times = clock(), []
    for _ in range(rounds + 1):
        begin = now()
        state, metrics = jax.block_until_ready(compiled(state, networks, batch))
        times.append(now() - begin)
    return min(times[1:]), temp(compiled) / MIB


def law(axis: str, name: str, values: Sequence[int], measured: Any) -> Figure:
    """The axis' law as one number, and how far the worst point is from it."""
    if axis in ("tokens", "batch"):
        slope, start = np.polyfit(np.log(values), np.log(measured), 1)
        fitted, what = np.exp(start + slope * np.log(values)), "exponent"
    else:
        slope, start = np.polyfit(values, measured, 1)
        fitted, slope = start + slope * np.asarray(values), slope / measured[0]
        what = "of one more, beside the first"
    worst = np.max(np.abs(fitted / measured - 1))
    return Figure(f"{axis}, {name}: {what}", float(slope), note=f"worst point {worst:.0%} away")
