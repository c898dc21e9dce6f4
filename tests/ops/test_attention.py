import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gadjax.ops.attention import attention

B, N, M, H, K = 2, 5, 7, 3, 4


def arrays(dtype=np.float32, n=N, m=M):
    r = np.random.default_rng(0)
    shapes = (B, n, H, K), (B, m, H, K), (B, m, H, K)
    return [r.standard_normal(s).astype(dtype) for s in shapes]


def torch_attention(q, k, v, bias):
    q, k, v = (torch.tensor(a).transpose(1, 2) for a in (q, k, v))
    bias = None if bias is None else torch.tensor(bias)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize("shape", [None, (B, 1, 1, M), (1, H, N, M), (B, H, N, M)])
def test_equals_torch_attention(shape):
    bias = None if shape is None else np.random.default_rng(1).standard_normal(shape, np.float32)
    expected = torch_attention(*arrays(), bias)
    out = attention(*arrays(), None if bias is None else jnp.asarray(bias))
    assert np.abs(out - expected).max() <= 1e-6 * np.abs(expected).max()


def test_masked_keys_are_ignored_and_fully_masked_rows_are_uniform():
    q, k, v = arrays()
    bias = np.zeros((B, 1, 1, M), np.float32)
    bias[0, ..., 3:] = bias[1] = -10_000.0
    out = attention(q, k, v, jnp.asarray(bias))
    unmasked = attention(q[:1], k[:1, :3], v[:1, :3])
    np.testing.assert_allclose(out[:1], unmasked, atol=1e-6)
    np.testing.assert_allclose(out[1], attention(q, k, v)[1], atol=1e-3)


def test_derivatives_equal_central_differences():
    with jax.enable_x64(True):
        primals = tuple(jnp.asarray(a) for a in arrays(np.float64))
        r = np.random.default_rng(2)
        v, u = (tuple(jnp.asarray(r.standard_normal(a.shape)) for a in primals) for _ in range(2))
        bias = jnp.asarray(r.standard_normal((B, 1, 1, M)))

        @jax.jit
        def both(*primals):
            return jax.jvp(lambda *p: attention(*p, bias), primals, v)

        def f(*primals):
            return both(*primals)[0]

        def g(*primals):
            return jnp.sum(jnp.sin(both(*primals)[1]))

        def central(f, along, h=1e-5):
            ahead, behind = (
                f(*(p + s * a for p, a in zip(primals, along, strict=True))) for s in (h, -h)
            )
            return (ahead - behind) / (2 * h)

        np.testing.assert_allclose(both(*primals)[1], central(f, v), atol=1e-8)
        grads = jax.jit(jax.grad(g, argnums=(0, 1, 2)))(*primals)
        actual = sum(jnp.vdot(a, b) for a, b in zip(grads, u, strict=True))
        np.testing.assert_allclose(actual, central(g, u), rtol=1e-7)


def test_softmax_is_float32_in_bfloat16():
    # 512 equal keys: a softmax that summed in bfloat16 would stop counting at 256.
    q, k, v = (jnp.ones((1, n, 1, 8), jnp.bfloat16) for n in (1, 512, 512))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)
    # Logits one apart near 300, where bfloat16 has steps of two.
    q, k = (
        jnp.asarray(a, jnp.bfloat16) for a in ([[[[16.0, 1.0]]]], [[[[26.5, 0]], [[26.5, 1.5]]]])
    )
    v = jnp.asarray([[[[0.0, 0.0]], [[1.0, 1.0]]]], jnp.bfloat16)
    expected = 1 / (1 + np.exp(-1.5 / 2**0.5))
    np.testing.assert_allclose(np.asarray(attention(q, k, v), np.float32), expected, rtol=1e-2)
