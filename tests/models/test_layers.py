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
    pixart: {
        "num_attention_heads": 2,
        "attention_head_dim": 6,
        "cross_attention_dim": 12,
        "num_layers": 2,
        "sample_size": 8,
        "caption_channels": 10,
    },
    mmdit: {
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


def program(module, dtype):
    """A loss of value and tangent, its gradient, and what both are given."""
    config = module.Config.from_dict(CONFIGS[module])
    net, rng = functional(module.build(config, dtype=dtype)), np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape)), net.abstract)
    x, v, c = (jnp.asarray(rng.normal(size=(2, 8, 8, 4))) for _ in range(3))
    text, told = jnp.asarray(rng.normal(size=(2, 5, 10))), jnp.asarray(rng.normal(size=(2, 10)))
    last = jnp.ones((2, 5)) if module is pixart else told

    def loss(params, x):
        def call(x):
            return net.apply(params, x, jnp.full(2, 500.0), text, last)[..., :4]

        value, moved = geometry.tangent(call, x, v)
        return jnp.sum(c * value) + jnp.sum(value * moved)

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, x)


def in_parts(f, given, part, monkeypatch):
    """f(*given) and its operations, where a hidden layer's parts have so many numbers."""
    monkeypatch.setattr(layers, "MAX_CHUNK_ELEMENTS", part)
    with current_placement(Placement(make_mesh({"data": 1}, jax.devices()[:1]))):
        return jax.jit(lambda *given: f(*given))(*given), flops(lambda *given: f(*given), *given)


@pytest.mark.parametrize("module", CONFIGS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_hidden_layer_in_parts_is_the_layer(module, monkeypatch):
    """To the last digits, for as many operations: reverse mode makes no part twice."""
    with jax.enable_x64(True):
        f, given = program(module, jnp.float64)
        whole, all_of = in_parts(f, given, 2**24, monkeypatch)
        # Keys' biases have no gradient but rounding.
        largest = max(np.abs(a).max() for a in jax.tree.leaves(whole))
        # 2 samples of 16 positions, 48 units: in two parts, three, and no more than four.
        for part in (2 * 16 * 24, 2 * 16 * 16, 1):
            found, count = in_parts(f, given, part, monkeypatch)
            assert count == all_of
            pairs = list(zip(*map(jax.tree.leaves, (whole, found)), strict=True))
            for a, b in pairs:
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-13 * largest)
            assert any(np.any(a != b) for a, b in pairs)  # it was in parts indeed


def test_parts_round_no_more_than_the_whole(monkeypatch):
    """Each part's sum rounded to bfloat16 would be a third less exact."""
    rng = np.random.default_rng(0)
    mlp = layers.Mlp(
        64, 256, 64, layers.gelu_tanh, dtype=jnp.bfloat16, rngs=Keys(jax.random.key(0))
    )
    base, gate, x = (rng.normal(size=shape) for shape in ((2, 32, 64), (2, 1, 64), (2, 32, 64)))
    given = [jnp.asarray(array, jnp.bfloat16) for array in (base, gate, x)]
    base, gate, x = (np.asarray(array, np.float64) for array in given)
    weights = [
        np.asarray(getattr(layer, name)[...], np.float64)
        for layer in (mlp.linear_1, mlp.linear_2)
        for name in ("kernel", "bias")
    ]
    hidden = np.asarray(layers.gelu_tanh(jnp.float32(x @ weights[0] + weights[1])), np.float64)
    true = base + gate * (hidden @ weights[2] + weights[3])

    def error(part):
        found, _ = in_parts(partial(mlp.added, again=True), given, part, monkeypatch)
        assert found.dtype == jnp.bfloat16
        return np.linalg.norm(np.asarray(found, np.float64) - true) / np.linalg.norm(true)

    assert 1e-4 < error(1) < 1.02 * error(2**24)


@pytest.mark.parametrize(
    "shape,hidden,parts",
    [
        ((8, 1024, 1152), 4608, 4),  # PixArt-XL with 8 samples
        ((4, 1024, 1152), 4608, 3),
        ((1, 1024, 1152), 4608, 1),
        ((64, 1024, 1152), 4608, 4),
        ((64, 1024, 1152), 4610, 2),
        ((64, 1024, 1152), 4609, 1),
    ],
)
def test_in_how_many_parts(shape, hidden, parts):
    assert layers.hidden_chunks(shape, hidden) == (1, 1)  # outside of training
    with current_placement(Placement(make_mesh({"data": 1}, jax.devices()[:1]))):
        assert layers.hidden_chunks(shape, hidden) == (parts, 1)
