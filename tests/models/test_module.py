import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gadjax.diffusion.geometry import tangent
from gadjax.models.module import scan_blocks
from gadjax.ops.flops import flops


def feed_forward(x, up, down, gate):
    return x + gate * (jnp.tanh(x @ up) @ down)


def convolved(x, up, down, gate):
    """`feed_forward` as convolutions of size 1."""

    def conv(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    x = x[:, None]
    return (x + gate * conv(jnp.tanh(conv(x, up[None, None])), down[None, None]))[:, 0]


@pytest.mark.parametrize("block", [feed_forward, convolved])
@pytest.mark.parametrize("with_tangent", [False, True])
def test_remat_results_saves_the_outputs_of_feed_forwards(block, with_tangent):
    """Saved outputs of value and tangent spare the recomputation of either's last product."""
    rng = np.random.default_rng(0)
    shapes = (2, 3, 5), (4, 5, 20), (4, 20, 5), (4, 1, 5)
    x, *layers = (rng.normal(size=shape) for shape in shapes)

    def grad(remat):
        def loss(layers):
            def net(x):
                return scan_blocks(layers, x, lambda layer, x: block(x, *layer), remat)

            return sum(jnp.sum(y**2) for y in (tangent(net, x, x) if with_tangent else (net(x),)))

        return jax.grad(loss)

    def cost(remat):
        return flops(grad(remat), layers) / (4 * 2 * 6 * 5 * 20)

    count = 2 if with_tangent else 1
    with jax.enable_x64(True):
        x, *layers = map(jnp.asarray, (x, *layers))
        assert cost(True) - cost("results") == pytest.approx(count)
        assert cost("results") - cost(False) == pytest.approx(count)  # the first products
        for a, b in zip(grad("results")(layers), grad(False)(layers), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
