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
    theirs = dict(torch_seconds(size, half, remat, {c[3] for c in selected.values()}, rounds))
    for name, (objective, times, critic, other) in selected.items():
        update, cost, u = make_update(size, objective, times, critic, jnp.dtype(dtype), remat)
        taken = seconds({name: update}, rounds)[name]
        del update
        yield Figure(f"{name}: gadjax, seconds", taken, note=f"{note}, {dtype}")
        yield Figure(f"{name}: gadjax, u", cost / u, note=note)
        if name == "whole iteration" and jax.default_backend() != "cpu":
            yield Figure("images per second", size.batch / taken, least=12, note=note)
            share = None if peak() is None else cost / taken / peak()
            yield Figure("share of peak", share, least=0.35, note="recomputation is counted")
        if not theirs:
            yield Figure(f"{name}: gadjax / PyTorch", None, AIMS.get(name), note="no torch here")
            continue
        taken_there, u_there, kind = theirs[other]
        yield Figure(f"{name}: PyTorch, seconds", taken_there, note=f"{note}, {kind}")
        yield Figure(f"{name}: PyTorch, u", u_there, note=note)
        yield Figure(f"{name}: gadjax / PyTorch", taken / taken_there, AIMS.get(name), note=note)


def torch_seconds(size: Size, half: str, remat: bool, names: set[str], rounds: int):
    """Pairs (name, (seconds, evaluations, dtype)); none without a torch for this device."""
    try:
        import torch
        from benchmarks.torch_steps import Reference
    except ImportError:
        return
    if (jax.default_backend() == "gpu") != torch.cuda.is_available():
        return
    model = Reference(size, getattr(torch, half), remat)
    u = model.flops(model.once)
    for name in sorted(names):
        run = getattr(model, name)
        cost = model.flops(run) / u
        taken = seconds({name: partial(model.finished, run)}, rounds)[name]
        yield name, (taken, cost, str(model.half).removeprefix("torch."))
    del model, run
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_update(size, objective, times, critic, dtype, remat) -> tuple[Callable, float, float]:
    """Update that continues from its last state; its FLOPs; those of one evaluation."""
    step_spec = make_step_spec(size, objective, times, dtype, remat)
    shapes = jax.eval_shape(partial(start, size, step_spec, dtype))
    steps = [student_step] + [critic_step] * critic
    cost = sum(flops(partial(step, step_spec), *shapes) for step in steps)
    denoiser: Denoiser = step_spec.denoiser
    _, params, batch = shapes
    u = flops(lambda p, b: denoiser.raw(p, b.noise, 500.0, b.cond), params, batch)
    compiled = [
        jax.jit(partial(step, step_spec), donate_argnums=0).lower(*shapes).compile()
        for step in steps
    ]
    held = list(jax.jit(partial(start, size, step_spec, dtype))())

    def update():
        for step in compiled:
            held[0], metrics = step(*held)
        return held[0].step, metrics

    return update, cost, u


def peak() -> float | None:
    """Peak bfloat16 FLOP/s of this device, None where it is not known."""
    kind = jax.devices()[0].device_kind.lower()
    return next((c.peak for name, c in CHIPS.items() if name.split("-")[0] in kind), None)
