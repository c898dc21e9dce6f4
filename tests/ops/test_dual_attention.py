"""Dual attention against plain derivatives of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion.geometry import tangent, tangents
from gadjax.ops import dual_attention
from gadjax.ops.attention import attention, tangent_pass, value_attention

B, N, H, K = 2, 37, 3, 4


def plain(q, k, v, bias=None):
    s = jnp.einsum("bnhk,bmhk->bhnm", q, k) / q.shape[-1] ** 0.5
    p = jax.nn.softmax(s if bias is None else s + bias, axis=-1)
    return jnp.einsum("bhnm,bmhk->bnhk", p, v)


def normal(seed, *shapes, dtype=np.float64):
    r = np.random.default_rng(seed)
    return [jnp.asarray(r.standard_normal(shape), dtype) for shape in shapes]


@pytest.fixture
def blocks(monkeypatch):
    """Limit the logits so that every attention here takes several blocks and a remainder."""
    monkeypatch.setattr(dual_attention, "MAX_LOGITS", 200)


def everything(f, moving, primals, along, weights, bias):
    """Value, tangent, and the gradient of a function of both in all operands and tangents."""

    def loss(primals, along):
        def call(*parts):
            return f(*parts, *primals[len(parts) :], bias)

        count = len(moving)
        with tangent_pass(f is attention):
            o, to = jax.jvp(call, primals[:count], along[:count])
        return jnp.vdot(o, weights[0]) + jnp.vdot(jnp.sin(to), weights[1]), (o, to)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(primals, along)


def worst(actual, expected):
    """The largest difference, relative to the largest value of each array."""
    errors = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30)),
        actual,
        expected,
    )
    return max(jax.tree.leaves(errors))


@pytest.mark.parametrize(
    "keys,moving,bias,dtype,bound",
    [
        (N, "qkv", None, np.float32, 1e-5),
        (29, "qkv", (B, 1, 1, 29), np.float64, 1e-13),
        (29, "qkv", (1, H, N, 29), np.float64, 1e-13),
        (11, "q", (B, 1, 1, 11), np.float64, 1e-13),
    ],
    ids=["self", "mask", "full bias", "cross"],
)
def test_derivatives_equal_plain_attention(blocks, keys, moving, bias, dtype, bound):
    with jax.enable_x64(dtype is np.float64):
        shapes = (B, N, H, K), (B, keys, H, K), (B, keys, H, K)
        primals, along = (tuple(normal(seed, *shapes, dtype=dtype)) for seed in (0, 1))
        weights = normal(2, (B, N, H, K), (B, N, H, K), dtype=dtype)
        bias = None if bias is None else normal(3, bias, dtype=dtype)[0]
        inputs = moving, primals, along, weights, bias
        assert worst(everything(attention, *inputs), everything(plain, *inputs)) < bound


def test_fully_masked_prompt_attends_uniformly(blocks):
    q, k, v = normal(0, (1, N, H, K), (1, 11, H, K), (1, 11, H, K), dtype=np.float32)
    bias = jnp.full((1, 1, 1, 11), -10_000.0)
    actual = tangent(lambda q: attention(q, k, v, bias), q, q)
    expected = jax.jvp(lambda q: plain(q, k, v), (q,), (q,))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3)  # float32 has steps of 1e-3 at 10,000


def test_several_directions_share_one_value_and_its_cotangent_once(blocks):
    with jax.enable_x64(True):
        x, *v = normal(0, *[(B, N, H, K)] * 4)
        v = jnp.stack(v)

        def of(f):
            return lambda x: f(x, 2 * x, x + 1)

        def loss(x):
            value, tangent_out = tangents(of(attention), x, v)
            return jnp.sum(value**2) + jnp.sum(tangent_out**3)

        def expected(x):
            one = [jax.jvp(of(plain), (x,), (d,)) for d in v]
            return jnp.sum(one[0][0] ** 2) + sum(jnp.sum(tangent_out**3) for _, tangent_out in one)

        actual, reference = (jax.jit(jax.value_and_grad(f))(x) for f in (loss, expected))
        assert worst(actual, reference) < 1e-13


def test_nested_vmap_over_directions(blocks):
    """The cotangent of a value that both maps share counts once."""
    with jax.enable_x64(True):
        (x,) = normal(0, (B, N, H, K))
        (v,) = normal(1, (2, 3, B, N, H, K))

        def loss(f, x):
            one = lambda d: f(lambda x: (attention if f is tangent else plain)(x, x, x), x, d)  # noqa: E731
            many = jax.vmap(one, out_axes=(None, 0))
            value, tangent_out = jax.vmap(many, out_axes=(None, 0))(v)
            return jnp.sum(value**2) + jnp.sum(tangent_out**3)

        actual, reference = (
            jax.jit(jax.grad(lambda x, f=f: loss(f, x)))(x)
            for f in (tangent, lambda f, x, d: jax.jvp(f, (x,), (d,)))
        )
        assert worst(actual, reference) < 1e-13


def test_through_scan_and_remat():
    with jax.enable_x64(True):
        x, v = normal(0, (B, N, H, K), (B, N, H, K))
        (layers,) = normal(1, (3, K, K))

        def net(f, layers, x):
            def body(x, w):
                return x + f(x @ w, x, x @ w), None

            return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, layers)[0]

        def loss(f, layers):
            with tangent_pass(f is attention):
                value, tangent_out = jax.jvp(lambda x: net(f, layers, x), (x,), (v,))
            return jnp.sum(jnp.cos(value)) + jnp.sum(tangent_out**2)

        actual, reference = (
            jax.jit(jax.value_and_grad(lambda w, f=f: loss(f, w)))(layers)
            for f in (attention, plain)
        )
        assert worst(actual, reference) < 1e-12


def test_bfloat16_error_is_that_of_its_operands():
    exact = normal(0, *[(1, 256, 2, 64)] * 3, dtype=np.float32)
    along = normal(1, *[(1, 256, 2, 64)] * 3, dtype=np.float32)
    weights = normal(2, *[(1, 256, 2, 64)] * 2, dtype=np.float32)
    rounded = [[x.astype(jnp.bfloat16) for x in part] for part in (exact, along)]
    back = [[x.astype(jnp.float32) for x in part] for part in rounded]

    def derivatives(f, primals, along):
        def loss(primals, along):
            with tangent_pass(f is attention):
                o, to = jax.jvp(f, tuple(primals), tuple(along))
            return jnp.vdot(o.astype(jnp.float32), weights[0]) + jnp.vdot(
                to.astype(jnp.float32), weights[1]
            ), (o.astype(jnp.float32), to.astype(jnp.float32))

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(primals, along)

    actual, reference = derivatives(attention, *rounded), derivatives(plain, *back)
    errors = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)),
        actual,
        reference,
    )
    assert max(jax.tree.leaves(errors)) < 2e-2


def test_reverse_mode_saves_nothing_of_logits_size():
    shapes = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)

    def loss(f, x):
        with tangent_pass(f is attention):
            value, tangent_out = jax.jvp(lambda x: f(x, x, x), (x,), (x,))
        return jnp.sum(value) + jnp.sum(tangent_out)

    def temporary(f):
        compiled = jax.jit(jax.grad(lambda x: loss(f, x))).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(attention) < temporary(plain) / 3


def test_function_is_retraced_for_the_other_kind_of_pass(blocks):
    with jax.enable_x64(True):
        x, v = normal(0, (B, N, H, K), (B, N, H, K))
        f = jax.jit(lambda x: attention(x, x, x))
        first = jax.grad(lambda x: jnp.sum(f(x) ** 2))(x)
        jax.grad(lambda x: jnp.sum(tangent(f, x, v)[1] ** 2))(x)
        again = jax.grad(lambda x: jnp.sum(f(x) ** 2))(x)
        np.testing.assert_array_equal(first, again)


def test_values_in_blocks_differentiate_in_both_modes(blocks):
    with jax.enable_x64(True):
        x, v = normal(0, (B, N, H, K), (B, N, H, K))

        def twice(f):
            def loss(x):
                return jnp.sum(jnp.sin(f(x, x, x)))

            return jax.jvp(jax.grad(loss), (x,), (v,))

        assert (
            worst(jax.jit(lambda: twice(value_attention))(), jax.jit(lambda: twice(plain))())
            < 1e-12
        )


def test_remat_policy_may_save_the_results():
    """Of the six products of value and tangent, only those that the transpose itself needs."""
    from gadjax.models.module import scan_blocks
    from gadjax.ops.flops import flops

    x = jax.ShapeDtypeStruct((1, 64, 1, 16), jnp.float32)
    layers = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)

    def cost(remat, moving):
        def loss(layers, x):
            def net(x):
                return scan_blocks(layers, x, lambda w, x: attention(x, x, x) @ w, remat)

            return sum(map(jnp.sum, tangent(net, x, x) if moving else (net(x),)))

        return flops(jax.grad(loss), layers, x) / (3 * 2 * 64 * 64 * 16)

    assert cost(True, False) - cost("results", False) == pytest.approx(1, abs=0.01)
    assert cost(True, True) - cost("results", True) == pytest.approx(6, abs=0.01)
    assert cost("results", True) - cost(False, True) < 1
