"""Cost of attention, and its growth, where a gradient goes through a tangent."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.common import (
    MIB,
    Figure,
    Size,
    make_batch,
    make_network,
    relative,
    seconds,
    temp,
)
from jax.sharding import NamedSharding, PartitionSpec

from gadjax.diffusion.geometry import tangent
from gadjax.models import layers
from gadjax.ops.attention import attention as ours
from gadjax.ops.flops import flops
from gadjax.parallel.hardware import find_topology
from gadjax.parallel.placement import Placement, current_placement
from gadjax.parallel.sharding import make_mesh
from gadjax.training.checks import select_kernels

H = 1e-2
T = 500.0


def plain(q, k, v, bias=None):
    """Plain attention, with logits and softmax in float32."""
    s = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(s * q.shape[-1] ** -0.5 + (0 if bias is None else bias), axis=-1)
    return jnp.einsum("bhnm,bmhk->bnhk", p.astype(v.dtype), v)


def exactness(shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Figure]:
    """Errors of self-attention in float32: value, tangent, and the gradient of both.

    shapes: (positions, heads, channels); more than 2^19 logits a head are computed in blocks.
    """
    for shape in shapes:
        primals, tangents, weights = operands(shape, jnp.float32)
        with jax.default_matmul_precision("highest"):
            values, expected = (
                jax.jit(f)(primals, tangents, weights)
                for f in (with_gradients(ours, tangent), with_gradients(plain, plain_jvp))
            )
        for name, a, b in zip(("value", "jvp", "grad of jvp"), values, expected, strict=True):
            note = "{} positions, {} heads of {}".format(*shape)
            yield Figure(f"{name} beside plain attention", relative(a, b), 1e-5, note=note)


def operands(shape, dtype, batch: int = 1):
    """Random (q, k, v), their tangents, and the weights of value and tangent in a loss."""
    rng = np.random.default_rng(0)
    n, h, k = shape
    made = [jnp.asarray(rng.standard_normal((batch, n, h, k)), dtype) for _ in range(8)]
    return made[:3], made[3:6], made[6:]


def plain_jvp(f, x, v):
    return jax.jvp(f, (x,), (v,))


def with_gradients(attention: Callable, push: Callable):
    """Function (primals, tangents, weights) -> value, tangent, gradients of their sum to both."""

    def loss(primals, tangents, weights):
        out = push(lambda qkv: attention(*qkv), primals, tangents)
        return sum(jnp.vdot(w, o) for w, o in zip(weights, out, strict=True)), out

    def run(*inputs):
        grads, (value, dot) = jax.grad(loss, (0, 1), has_aux=True)(*inputs)
        return value, dot, grads

    return run


def operator(shape: tuple[int, int, int], batch: int, rounds: int) -> Iterator[Figure]:
    """Time and memory of the tangent attention in bfloat16, forward and reverse, beside plain."""
    inputs = operands(shape, jnp.bfloat16, batch)
    programs = operator_programs(inputs, place(jax.devices()))
    taken = seconds({n: lambda p=p: p(*inputs) for n, p in programs.items()}, rounds)
    size = {name: temp(program) / MIB for name, program in programs.items()}
    note = f"{batch} x {shape[0]} positions, {shape[1]} heads of {shape[2]}, bfloat16"
    for what, of, least in (("time", taken, 5), ("temp", size, 10)):
        ratio = of["plain"] / of["ours"]
        yield Figure(f"plain / tangent attention: {what}", ratio, least=least, note=note)
    yield Figure("tangent attention: ms", taken["ours"] * 1e3, note=note)
    yield Figure("tangent attention: temp MiB", size["ours"], note=note)
    yield fused_values(inputs, taken["ours"], rounds, note)


def fused_values(inputs, seconds_of_tangent: float, rounds: int, note: str) -> Figure:
    """Tangent attention's time by that of cuDNN's values, forward and reverse (3.0 by products)."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    name = f"tangent attention / values by {implementation}: time"
    (qkv, _, (weights, _)) = inputs

    def loss(qkv):
        value = jax.nn.dot_product_attention(*qkv, implementation=implementation)
        return jnp.vdot(weights, value), value

    try:
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(qkv).compile()
        taken = seconds({"": lambda: program(qkv)}, rounds)[""]
    except Exception as reason:  # a cuDNN without these heads, for one
        return Figure(name, None, note=f"{note}: {' '.join(str(reason).split())[:200]}")
    return Figure(name, seconds_of_tangent / taken, note=f"{note}; values {taken * 1e3:.4g} ms")


def place(devices, dtype: str = "bfloat16") -> Placement:
    mesh = make_mesh({"data": 1}, devices[:1])
    return Placement(mesh, select_kernels("auto", mesh, dtype))


def operator_programs(inputs, where: Placement):
    """Forward and reverse of the tangent attention and of the plain one, compiled for a mesh."""
    with current_placement(where):
        return {
            name: jax.jit(with_gradients(f, push)).lower(*inputs).compile()
            for name, f, push in (("ours", ours, tangent), ("plain", plain, plain_jvp))
        }


def ahead(names: tuple[str, ...], shapes, batch: int) -> Iterator[Figure]:
    """Temp memory of `operator` for absent chips, by kernels, in blocks and plain."""
    for name in names:
        where = find_topology(name)
        if where.estimate:
            yield Figure(f"{name}: temp MiB", None, note="needs JAX's CUDA plugin")
            continue
        chip = place(where.devices())
        everywhere = NamedSharding(chip.mesh, PartitionSpec())
        for shape in shapes:
            x = jax.ShapeDtypeStruct((batch, *shape), jnp.bfloat16, sharding=everywhere)
            inputs = (x,) * 3, (x,) * 3, (x,) * 2
            size = {n: temp(p) / MIB for n, p in operator_programs(inputs, chip).items()}
            blocks = operator_programs(inputs, chip._replace(kernels=""))["ours"]
            note = f"{batch} x {shape[0]} positions, {shape[1]} heads of {shape[2]}, bfloat16"
            least = 10 if shape[0] == 4096 else None
            if size["ours"]:  # a TPU's program may have all of its own in VMEM
                ratio = size["plain"] / size["ours"]
                yield Figure(f"{name}: temp, plain / kernels", ratio, least=least, note=note)
            yield Figure(f"{name}: temp MiB, kernels", size["ours"], note=note)
            yield Figure(f"{name}: temp MiB, in blocks", temp(blocks) / MIB, note=note)
            yield Figure(f"{name}: temp MiB, plain", size["plain"], note=note)


def gradient_programs(size: Size, dtype=jnp.float32) -> dict[str, Callable]:
    """Gradients to the parameters of <x, f(x)> and of that plus <v, J v>, J v in three ways.

    Each block is rematerialised in reverse.
    """
    _, denoiser = make_network(size, dtype)

    def alone(f, x, v):
        return f(x), jnp.zeros_like(x)

    def difference(f, x, v):
        value = f(x)
        return value, (f(x + H * v) - value) / H

    def gradient(push):
        def loss(params, x, v, cond):
            value, dot = push(lambda x: denoiser.raw(params, x, T, cond), x, v)
            return jnp.vdot(x, value) + jnp.vdot(v, dot)

        return jax.grad(loss)

    def naive(*inputs):
        with mock.patch.object(layers, "attention", plain):
            return gradient(plain_jvp)(*inputs)

    return {
        "value": gradient(alone),
        "difference": gradient(difference),
        "jvp": gradient(tangent),
        "jvp, plain attention": naive,
    }


def input_shapes(size: Size):
    """Inputs of the programs: a function that makes them, and their shapes."""

    def make():
        batch = make_batch(size)
        params = make_network(size)[0].init(jax.random.key(0))
        return params, batch.noise, batch.noise, batch.cond

    return make, jax.eval_shape(make)


def programs(
    sizes: list[Size], timed: Size | None = None, rounds: int = 3, dtype=jnp.float32
) -> Iterator[Figure]:
    """FLOPs and temp memory of the four programs at each size, and seconds at `timed`."""
    for size in sizes:
        _, shapes = input_shapes(size)
        made = gradient_programs(size, dtype)
        cost = {name: flops(f, *shapes) for name, f in made.items()}
        held = {n: temp(jax.jit(f).lower(*shapes).compile()) / MIB for n, f in made.items()}
        for name in made:
            yield Figure(f"FLOPs / value: {name}", cost[name] / cost["value"], note=str(size))
            yield Figure(f"temp MiB: {name}", held[name], note=str(size))
        most = 1.1 if size.tokens == 1024 else None
        ratio = held["jvp"] / held["difference"]
        yield Figure("temp: jvp / difference", ratio, most, note=str(size))
        most = 1 / 6 if size.tokens == 4096 else None
        ratio = held["jvp"] / held["jvp, plain attention"]
        yield Figure("temp: jvp / jvp, plain attention", ratio, most, note=str(size))
    if timed is not None:
        make, shapes = input_shapes(timed)
        inputs, made = jax.jit(make)(), gradient_programs(timed, dtype)
        compiled = {n: jax.jit(f).lower(*shapes).compile() for n, f in made.items()}
        taken = seconds({n: lambda p=p: p(*inputs) for n, p in compiled.items()}, rounds)
        for name, aim in (("value", 2.3), ("difference", 1.25), ("jvp, plain attention", None)):
            ratio = taken["jvp"] / taken[name]
            yield Figure(f"time: jvp / {name}", ratio, aim, note=str(timed))
        yield Figure("seconds: value", taken["value"], note=str(timed))


def growth(base: Size, sides: tuple[int, ...], depths: tuple[int, ...], dtype=jnp.float32):
    """Growth of temp memory over numbers of tokens and over depths, with `programs` of each."""
    sizes = [replace(base, side=side) for side in sides]
    others = [replace(base, layers=n, side=sides[1]) for n in depths if n != base.layers]
    figures = []
    for size in sizes + others:
        for figure in programs([size], dtype=dtype):
            figures.append((size, figure))
            yield figure
    for name in ("value", "difference", "jvp", "jvp, plain attention"):
        of = {size: f.value for size, f in figures if f.name == f"temp MiB: {name}"}
        wide = [(np.log(size.tokens), np.log(of[size])) for size in sizes]
        deep = [(size.layers, of[size]) for size in (sizes[1], *others)]
        exponent, slope = (np.polyfit(*zip(*points, strict=True), 1)[0] for points in (wide, deep))
        note = f"from {sizes[0].tokens} to {sizes[-1].tokens} tokens"
        yield Figure(f"temp ~ tokens ** x: {name}", float(exponent), note=note)
        note = f"{min(depths)} to {max(depths)} layers, {sizes[1].tokens} tokens"
        yield Figure(f"temp MiB a layer: {name}", float(slope), note=note)
