"""Updates of gadjax beside the same ones in PyTorch, of the same size, device and process."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from benchmarks.common import Figure, Size, seconds
from benchmarks.step import GRID, make_step_spec, start

from gadjax.diffusion.denoiser import Denoiser
from gadjax.objectives import DMD, GAD, TDM, Anchor, GADScript
from gadjax.ops.flops import flops
from gadjax.parallel.hardware import CHIPS
from gadjax.training.steps import critic_step, student_step

ONE = 899.0, -1.0  # a grid of one step: the update starts from a given latent
# Update -> gadjax's objective, its grid, whether its critic is trained too, PyTorch's method.
CASES = {
    "generator step": (TDM() + GAD(steps=1), ONE, False, "generator"),
    "generator step with the script's differences": (TDM() + GADScript(), ONE, False, "generator"),
    "whole iteration": (TDM() + GAD(steps=1), GRID, True, "iteration"),
    "DP-DMD's student step": (DMD(backprop="all") + 0.05 * Anchor(), GRID, False, "dpdmd"),
}
AIMS = {"generator step": 0.8, "whole iteration": 0.75}


def reference(
    size: Size, dtype: str, half: str, remat: bool, rounds: int, cases: tuple[str, ...] = ()
) -> Iterator[Figure]:
    """Seconds and evaluations of updates in gadjax and in PyTorch.

    Args:
      size: of the networks.
      dtype: gadjax's.
      half: PyTorch's on a GPU; on a CPU both compute in float32.
      remat: rematerialise each block in reverse.
      rounds: runs of which the shortest counts.
      cases: names of CASES; all by default.
    """
    selected = {name: CASES[name] for name in cases or CASES}
    note = f"{size}, batch {size.batch}, {'each block' if remat else 'nothing'} recomputed"
    model = torch_model(size, half, remat)
    for i, (name, (objective, times, critic, other)) in enumerate(selected.items()):
        update, cost, u, planned = make_update(
            size, objective, times, critic, jnp.dtype(dtype), remat
        )
        runs = {"gadjax": update}
        if model is not None:
            runs["PyTorch"] = partial(model.finished, getattr(model, other))
        taken = seconds(runs, rounds)  # in turn: other work on the machine slows both
        del update, runs["gadjax"]
        yield Figure(f"{name}: gadjax, seconds", taken["gadjax"], note=f"{note}, {dtype}")
        yield Figure(f"{name}: gadjax, u", cost / u, note=note)
        if name == "whole iteration" and jax.default_backend() != "cpu":
            yield Figure("images per second", size.batch / taken["gadjax"], least=12, note=note)
            share = None if peak() is None else cost / taken["gadjax"] / peak()
            yield Figure("share of peak", share, least=0.35, note="recomputation is counted")
        if i == 0:  # the allocator keeps the peak of all cases
            yield from peak_memory(planned, f"{name}, {note}")
        if model is None:
            yield Figure(f"{name}: gadjax / PyTorch", None, AIMS.get(name), note="no torch here")
            continue
        kind = str(model.half).removeprefix("torch.")
        yield Figure(f"{name}: PyTorch, seconds", taken["PyTorch"], note=f"{note}, {kind}")
        theirs = model.flops(getattr(model, other)) / model.flops(model.once)
        yield Figure(f"{name}: PyTorch, u", theirs, note=note)
        ratio = taken["gadjax"] / taken["PyTorch"]
        yield Figure(f"{name}: gadjax / PyTorch", ratio, AIMS.get(name), note=f"{note}, in turn")


def torch_model(size: Size, half: str, remat: bool):
    """Reference of this size; None without a torch for this device."""
    try:
        import torch
        from benchmarks.torch_steps import Reference
    except ImportError:
        return None
    if (jax.default_backend() == "gpu") != torch.cuda.is_available():
        return None
    return Reference(size, getattr(torch, half), remat)


def peak_memory(planned: float, note: str) -> Iterator[Figure]:
    """JAX's peak in this process, beside what the compiler says; nothing without an allocator's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        measured = stats["peak_bytes_in_use"]
        yield Figure("peak memory, GiB", measured / 2**30, note=note)
        yield Figure("peak memory, by the compiler as gadjax plan counts, GiB", planned / 2**30)
        yield Figure("peak memory: measured / planned", measured / planned, note=note)


def make_update(
    size, objective, times, critic, dtype, remat
) -> tuple[Callable, float, float, float]:
    """Update that continues from its last state; its FLOPs; those of one evaluation; its bytes."""
    step_spec = make_step_spec(size, objective, times, dtype, remat)
    shapes = jax.eval_shape(partial(start, size, step_spec, dtype))
    steps = [student_step] + [critic_step] * critic
    cost = sum(flops(partial(step, step_spec), *shapes) for step in steps)
    denoiser: Denoiser = step_spec.denoiser
    _, networks, batch = shapes
    u = flops(lambda p, b: denoiser.raw(p, b.noise, 500.0, b.cond), networks["teacher"], batch)
    compiled = [
        jax.jit(partial(step, step_spec), donate_argnums=0).lower(*shapes).compile()
        for step in steps
    ]
    held = list(jax.jit(partial(start, size, step_spec, dtype))())

    def update():
        for step in compiled:
            held[0], metrics = step(*held)
        return held[0].step, metrics

    return update, cost, u, max(map(planned_bytes, compiled))


def planned_bytes(compiled) -> float:
    """Peak bytes of a compiled update, as `gadjax.plan.programs` counts them, with one batch."""
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept)


def peak() -> float | None:
    """Peak bfloat16 FLOP/s of this device, None where it is not known."""
    kind = jax.devices()[0].device_kind.lower()
    return next((c.peak for name, c in CHIPS.items() if name.split("-")[0] in kind), None)
