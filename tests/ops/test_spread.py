"""Attention whose queries lie on several devices, against the same on one."""

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
    """Its own keys, keys of a text that stand still, others that move; a bias of each kind."""
    x = x + attention(x, 2 * x, x + 1, rows)
    x = x + attention(x, text, text + 1, mask)
    return x + attention(x, x[:, :TEXT], jnp.sin(x[:, :TEXT]))


def gradient_of_tangents(x, text, v, mask, rows):
    def loss(x, text, v):
        value, moved = tangents(lambda x: net(x, text, mask, rows), x, v)
        return jnp.sum(jnp.sin(value)) + jnp.sum(moved**3), (value, moved)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, text, v)


def gradient_of_values(x, text, v, mask, rows):
    def loss(x, text, rows):
        value = net(x, text, mask, rows)
        return jnp.sum(jnp.sin(value)), value

    return jax.grad(loss, (0, 1, *(() if rows is None else (2,))), has_aux=True)(x, text, rows)


def given(count, dtype, rows):
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
    """A TPU's kernels on this machine; what they are asked to take goes into `asked`."""
    names, asked = ("value", "dual", "dual_transpose"), []

    def supported(q, k, bias):
        asked.append((q.shape[1], k.shape[1]))
        return bias is None or bias.shape[2] == 1

    found = {name: partial(getattr(pallas_tpu, name), interpret=True) for name in names}
    return SimpleNamespace(supported=supported, asked=asked, **found)


# Name -> mesh (of AXES), what is computed, directions, logits of one head that exist at once: of
# the few, every device takes several blocks of queries and a remainder.
FEW = 40
CASES = {
    "two tangents in blocks": ((1, 2, 2, 2), gradient_of_tangents, 2, FEW),
    "values": ((1, 2, 2, 2), gradient_of_values, 1, dual_attention.MAX_LOGITS),
    "values in blocks": ((1, 2, 1, 4), gradient_of_values, 1, FEW),
}


def worker(out: Path) -> None:
    assert len(jax.devices()) == 8
    found = {}
    for name, (sizes, f, count, cells) in CASES.items():
        place = Placement(make_mesh(dict(zip(AXES, sizes, strict=True))))
        dual_attention.MAX_LOGITS = cells
        with jax.enable_x64(True):
            found[name] = worst(f, place, given(count, jnp.float64, rows=True))
    case = given(1, jnp.float32, rows=True)
    assert split(gradient_of_values, place, case)
    odd = [x[..., :21, :, :] if x.ndim > 3 and x.shape[-3] == N else x for x in case[:4]]
    found["odd"] = split(gradient_of_values, place, (*odd, None))

    module = kernels.KERNEL_MODULES["tpu"] = interpreted()
    place = place._replace(kernels="tpu")
    case = given(2, jnp.float32, rows=False)
    found["kernels tangents"] = worst(gradient_of_tangents, place, case)
    found["kernels values"] = worst(gradient_of_values, place, case)
    found["asked"] = sorted(set(module.asked))
    out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("spread") / "found.json"
    run_on_devices(8, __file__, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_several_devices_do_what_one_does(found, name):
    assert found[name] <= 1e-12


def test_kernels_do_so_too(found):
    assert max(found["kernels tangents"], found["kernels values"]) <= 1e-5
    # They are asked for a device's queries, and all keys.
    assert found["asked"] == [[N // 4, TEXT], [N // 4, N]]


def test_positions_that_do_not_divide_stay_together(found):
    assert found["odd"] is False


def test_without_an_axis_of_positions_nothing_changes():
    place = Placement(make_mesh({"data": 1}, jax.devices()[:1]))
    case = given(2, jnp.float32, rows=True)
    assert not split(gradient_of_tangents, place, case)
    with current_placement(place):
        assert gather_positions(case[0]) is case[0]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
