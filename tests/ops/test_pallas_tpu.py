import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import both, case, error, error_of_directions, error_of_value
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gadjax.ops import pallas_tpu
from gadjax.parallel.hardware import find_topology

CASES = {
    "cross": (dict(queries=130, keys=530, moving=False, masked=True), 1e-5),
    # Subtracting the common component of keys and values last, or that of o in bfloat16, would
    # give errors of 0.1.
    "bfloat16": (dict(queries=200, keys=530, channels=64, dtype=jnp.bfloat16, shared=3), 2e-2),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_op_and_its_transpose(name):
    options, tolerance = CASES[name]
    assert error(pallas_tpu, *case(**options)) <= tolerance


def test_vmap_over_directions():
    assert error_of_directions(pallas_tpu, *case(600, 530, masked=True)) <= 1e-5


def test_value_and_gradient():
    assert error_of_value(pallas_tpu, *case(70, 530, masked=True)) <= 1e-5
    options, tolerance = CASES["bfloat16"]
    assert error_of_value(pallas_tpu, *case(**options)) <= tolerance


def test_supported():
    (q, k, _, bias, *_), _ = case(300, 77, masked=True)
    assert pallas_tpu.supported(q, k, None) and pallas_tpu.supported(q, k, bias)
    assert not pallas_tpu.supported(q, k, jnp.zeros((2, 1, 300, 77)))
    assert not pallas_tpu.supported(q[:, :8], k, None)
    assert not pallas_tpu.supported(q.astype(jnp.float16), k.astype(jnp.float16), None)


def test_block_sizes():
    x = jax.ShapeDtypeStruct((1, 1, 1, 72), jnp.bfloat16)
    blocks = {n: pallas_tpu.block(n, x) for n in (77, 300, 1024, 4096, 4096 + 77, 4096 + 300)}
    assert list(blocks.values()) == [128, 384, 512, 512, 384, 512]
    assert pallas_tpu.block(4096, jax.ShapeDtypeStruct((1, 1, 1, 160), jnp.float32)) == 256


def devices(topology):
    pytest.importorskip("libtpu")
    return np.array(find_topology(topology).devices())


def operands(
    mesh, spec, queries, keys, *, batch=1, heads=2, channels=72, moving=True, masked=False
):
    def x(n):
        shape = batch, n, heads, channels
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    q, k, t = x(queries), x(keys), x(keys) if moving else None
    bias = jax.ShapeDtypeStruct(
        (batch, 1, 1, keys), jnp.float32, sharding=NamedSharding(mesh, P(*spec[:1]))
    )
    return (q, k, k, bias if masked else None, q, t, t), (q, q)


def compiled(topology, *sizes, **options):
    mesh = Mesh(devices(topology)[:1], "x")
    return jax.jit(both(pallas_tpu)).lower(*operands(mesh, P(), *sizes, **options)).compile()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles(topology):
    assert compiled(topology, 300, 77, masked=True)


def test_compiles_sharded():
    mesh = Mesh(devices("v5e:2x2").reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    spec, rows = P(("data", "fsdp"), None, "tensor"), P(("data", "fsdp"))
    args, cotangents = operands(mesh, spec, 256, 256, batch=4, masked=True)
    specs = jax.tree.map(lambda x: rows if x.shape[2] == 1 else spec, (args, cotangents))
    f = jax.shard_map(both(pallas_tpu), mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    text = jax.jit(f).lower(args, cotangents).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3 and "all-" not in text


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:4x4"])
@pytest.mark.parametrize(
    "queries, keys, options",
    [
        (1024, 1024, dict(heads=16)),
        (4096, 4096, dict(heads=16)),
        (4096, 4096, dict(heads=24, channels=64)),
        (4096, 300, dict(heads=16, moving=False, masked=True)),
        (16384, 16384, dict(heads=2, channels=128)),
    ],
)
def test_compiles_at_full_size(topology, queries, keys, options):
    program = compiled(topology, queries, keys, batch=2, **options)
    operand = 2 * 2 * options["heads"] * queries * 128
    assert program.memory_analysis().temp_size_in_bytes < 16 * operand
