"""Attention with queries sharded over devices, against one device."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from several import run_on_devices

from gadjax.diffusion.geometry import tangents
from gadjax.ops import dual_attention, kernels, pallas_tpu
from gadjax.ops.attention import attention
from gadjax.parallel.placement import Placement, current_placement, gather_positions
from gadjax.parallel.sharding import AXES, make_mesh

B, N, H, K, TEXT = 2, 24, 2, 4, 11


def net(x, text, mask, rows):
    """Network with self-attention, and cross-attention to constant and to varying keys; with every
    kind of bias."""
    x = x + attention(x, 2 * x, x + 1, rows)
    x = x + attention(x, text, text + 1, mask)
    return x + attention(x, x[:, :TEXT], jnp.sin(x[:, :TEXT]))


def gradient_of_tangents(x, text, v, mask, rows):
    def loss(x, text, v):
        value, tangent_out = tangents(lambda x: net(x, text, mask, rows), x, v)
        return jnp.sum(jnp.sin(value)) + jnp.sum(tangent_out**3), (value, tangent_out)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, text, v)


def gradient_of_values(x, text, v, mask, rows):
    def loss(x, text, rows):
        value = net(x, text, mask, rows)
        return jnp.sum(jnp.sin(value)), value

    return jax.grad(loss, (0, 1, *(() if rows is None else (2,))), has_aux=True)(x, text, rows)


def make_case(count, dtype, rows):
    rng = np.random.default_rng(0)
    shapes = (B, N, H, K), (B, TEXT, H, K), (count, B, N, H, K), (1, H, N, N)
    x, text, v, bias = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    mask = jnp.zeros((B, 1, 1, TEXT), dtype).at[0, ..., 5:].set(-10_000.0)
    return x, text, v, mask, bias if rows else None


def run(f, place, arguments):
    with current_placement(place):
        return jax.jit(lambda *x: f(*x))(*arguments)


def worst(f, place, arguments) -> float:
    pairs = zip(
        *(jax.tree.leaves(run(f, where, arguments)) for where in (place, None)), strict=True
    )
    return max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs)


def split(f, place, arguments) -> bool:
    with current_placement(place):
        return "shard_map" in str(jax.make_jaxpr(lambda *x: f(*x))(*arguments))


def interpreted() -> SimpleNamespace:
    """TPU kernels in the interpreter; shapes that `supported` is called with go to `asked`."""
    names, asked = ("value", "dual", "dual_transpose"), []

    def supported(q, k, bias):
        asked.append((q.shape[1], k.shape[1]))
        return bias is None or bias.shape[2] == 1

    functions = {name: partial(getattr(pallas_tpu, name), interpret=True) for name in names}
    return SimpleNamespace(supported=supported, asked=asked, **functions)


# Name -> mesh (of AXES), function, directions, largest number of logits of one head: with the small
# numbers every device takes several blocks of queries and a remainder.
FEW = 40
CASES = {
    "two tangents in blocks": ((1, 2, 2, 2), gradient_of_tangents, 2, FEW),
    "values": ((1, 2, 2, 2), gradient_of_values, 1, dual_attention.MAX_LOGITS),
    "values in blocks": ((1, 2, 1, 4), gradient_of_values, 1, FEW),
}


def worker(out: Path) -> None:
    assert len(jax.devices()) == 8
    results = {}
    for name, (sizes, f, count, cells) in CASES.items():
        place = Placement(make_mesh(dict(zip(AXES, sizes, strict=True))))
        dual_attention.MAX_LOGITS = cells
        with jax.enable_x64(True):
            results[name] = worst(f, place, make_case(count, jnp.float64, rows=True))
    case = make_case(1, jnp.float32, rows=True)
    assert split(gradient_of_values, place, case)
    odd = [x[..., :21, :, :] if x.ndim > 3 and x.shape[-3] == N else x for x in case[:4]]
    results["odd"] = split(gradient_of_values, place, (*odd, None))

    module = kernels.KERNEL_MODULES["tpu"] = interpreted()
    place = place._replace(kernels="tpu")
    case = make_case(2, jnp.float32, rows=False)
    results["kernels tangents"] = worst(gradient_of_tangents, place, case)
    results["kernels values"] = worst(gradient_of_values, place, case)
    results["asked"] = sorted(set(module.asked))
    out.write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("shard_mapped") / "results.json"
    run_on_devices(8, __file__, out)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_several_devices_equal_one(results, name):
    assert results[name] <= 1e-12


@pytest.mark.slow
def test_kernels(results):
    assert max(results["kernels tangents"], results["kernels values"]) <= 1e-5
    # Called with a device's queries, and all keys.
    assert results["asked"] == [[N // 4, TEXT], [N // 4, N]]


@pytest.mark.slow
def test_indivisible_positions_are_not_split(results):
    assert results["odd"] is False


def test_gather_positions_without_sequence_axis():
    place = Placement(make_mesh({"data": 1}, jax.devices()[:1]))
    case = make_case(2, jnp.float32, rows=True)
    assert not split(gradient_of_tangents, place, case)
    with current_placement(place):
        assert gather_positions(case[0]) is case[0]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
