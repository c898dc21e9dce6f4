from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion import geometry
from gadjax.models import layers, mmdit, pixart
from gadjax.models.module import Keys, functional
from gadjax.ops.flops import flops
from gadjax.parallel.placement import Placement, current_placement
from gadjax.parallel.sharding import make_mesh

CONFIGS = {
    pixart.FAMILY: {
        "num_attention_heads": 2,
        "attention_head_dim": 6,
        "cross_attention_dim": 12,
        "num_layers": 2,
        "sample_size": 8,
        "caption_channels": 10,
    },
    mmdit.FAMILY: {
        "num_attention_heads": 2,
        "attention_head_dim": 6,
        "num_layers": 2,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "caption_projection_dim": 12,
        "joint_attention_dim": 10,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
    },
}


def program(family, dtype):
    """A loss of value and tangent with its gradient, and the arguments of both."""
    config = family.config.from_dict(CONFIGS[family])
    net, rng = functional(family.build(config, dtype=dtype)), np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape)), net.abstract)
    x, v, c = (jnp.asarray(rng.normal(size=(2, 8, 8, 4))) for _ in range(3))
    text, pooled = jnp.asarray(rng.normal(size=(2, 5, 10))), jnp.asarray(rng.normal(size=(2, 10)))
    last = jnp.ones((2, 5)) if family is pixart.FAMILY else pooled

    def loss(params, x):
        def call(x):
            return net.apply(params, x, jnp.full(2, 500.0), text, last)[..., :4]

        value, tangent = geometry.tangent(call, x, v)
        return jnp.sum(c * value) + jnp.sum(value * tangent)

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, x)


def in_chunks(f, args, elements, monkeypatch):
    """f(*args) and its FLOPs with hidden layers in chunks of at most so many elements."""
    monkeypatch.setattr(layers, "MAX_CHUNK_ELEMENTS", elements)
    with current_placement(Placement(make_mesh({"data": 1}, jax.devices()[:1]))):
        return jax.jit(lambda *args: f(*args))(*args), flops(lambda *args: f(*args), *args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f is mmdit.FAMILY)) for f in CONFIGS],
    ids=["pixart", "mmdit"],
)
def test_a_hidden_layer_in_chunks_is_the_layer(family, monkeypatch):
    """Equal to the last digits, for as many FLOPs: reverse mode computes no chunk twice."""
    with jax.enable_x64(True):
        f, args = program(family, jnp.float64)
        reference, operations = in_chunks(f, args, 2**24, monkeypatch)
        # Keys' biases have no gradient but rounding.
        largest = max(np.abs(a).max() for a in jax.tree.leaves(reference))
        # 2 samples of 16 positions, 48 units: in two chunks, three, and no more than four.
        for elements in (2 * 16 * 24, 2 * 16 * 16, 1):
            out, count = in_chunks(f, args, elements, monkeypatch)
            assert count == operations
            pairs = list(zip(*map(jax.tree.leaves, (reference, out)), strict=True))
            for a, b in pairs:
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-13 * largest)
            assert any(np.any(a != b) for a, b in pairs)  # it was in chunks indeed


def test_chunks_round_no_more_than_the_layer_at_once(monkeypatch):
    """Rounding the sum to bfloat16 after every chunk would be a third less exact."""
    rng = np.random.default_rng(0)
    mlp = layers.Mlp(
        64, 256, 64, layers.gelu_tanh, dtype=jnp.bfloat16, rngs=Keys(jax.random.key(0))
    )
    base, gate, x = (rng.normal(size=shape) for shape in ((2, 32, 64), (2, 1, 64), (2, 32, 64)))
    args = [jnp.asarray(array, jnp.bfloat16) for array in (base, gate, x)]
    base, gate, x = (np.asarray(array, np.float64) for array in args)
    weights = [
        np.asarray(getattr(layer, name)[...], np.float64)
        for layer in (mlp.linear_1, mlp.linear_2)
        for name in ("kernel", "bias")
    ]
    hidden = np.asarray(layers.gelu_tanh(jnp.float32(x @ weights[0] + weights[1])), np.float64)
    true = base + gate * (hidden @ weights[2] + weights[3])

    def error(elements):
        out, _ = in_chunks(partial(mlp.gated_residual, remat=True), args, elements, monkeypatch)
        assert out.dtype == jnp.bfloat16
        return np.linalg.norm(np.asarray(out, np.float64) - true) / np.linalg.norm(true)

    assert 1e-4 < error(1) < 1.02 * error(2**24)


@pytest.mark.parametrize(
    "shape,hidden,chunks",
    [
        ((8, 1024, 1152), 4608, 4),  # PixArt-XL with 8 samples
        ((4, 1024, 1152), 4608, 3),
        ((1, 1024, 1152), 4608, 1),
        ((64, 1024, 1152), 4608, 4),
        ((64, 1024, 1152), 4610, 2),
        ((64, 1024, 1152), 4609, 1),
    ],
)
def test_number_of_chunks(shape, hidden, chunks):
    assert layers.hidden_chunks(shape, hidden) == (1, 1)  # outside of training
    with current_placement(Placement(make_mesh({"data": 1}, jax.devices()[:1]))):
        assert layers.hidden_chunks(shape, hidden) == (chunks, 1)
