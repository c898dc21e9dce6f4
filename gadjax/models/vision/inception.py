"""Inception-v3 as FID uses it: TensorFlow's network of 2015-12-05, in pytorch-fid's layout.

Szegedy et al., arXiv:1512.00567; https://github.com/mseitzer/pytorch-fid. It differs from
torchvision's: average pools leave padding out of the mean, and the last block has a maximum pool.
Shapes: B pictures [B, H, W, 3] in [-1, 1]; 2048 features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gadjax.models import layers
from gadjax.models.keymap import KeyMap
from gadjax.models.module import Keys
from gadjax.models.vision.resize import resize_axes

SIDE, FEATURES = 299, 2048
EPSILON = 1e-3
# The classifier of 1008 classes and counters of batch norms, which features do not use.
KEYMAP = KeyMap(ignored=(r"^fc\.(weight|bias)$", r"\.num_batches_tracked$"))


class BatchNorm(nnx.Module):
    """Batch norm with stored statistics, under torch's names."""

    def __init__(self, channels: int):
        self.weight, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))

    def __call__(self, x_BHWC):
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + EPSILON)
        return (x_BHWC - self.running_mean[...]) * scale + self.bias[...]


class ConvUnit(nnx.Module):
    """Convolution without a bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel, rngs: Keys, *, stride=1, padding=(0, 0)):
        self.conv = layers.Conv(
            *(inputs, outputs, kernel),
            strides=stride,
            padding=[(side, side) for side in padding],
            use_bias=False,
            rngs=rngs,
        )
        self.bn = BatchNorm(outputs)

    def __call__(self, x_BHWC):
        return jax.nn.relu(self.bn(self.conv(x_BHWC)))


def max_pool(x_BHWC: jax.Array, stride: int, padding: int = 0) -> jax.Array:
    """Maximum over windows of 3 x 3."""
    sides = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    window = (1, 3, 3, 1)
    return jax.lax.reduce_window(
        x_BHWC, -jnp.inf, jax.lax.max, window, (1, stride, stride, 1), sides
    )


def mean_pool(x_BHWC: jax.Array) -> jax.Array:
    """Mean over windows of 3 x 3, of the pixels that lie in the picture."""
    sides, window = [(0, 0), (1, 1), (1, 1), (0, 0)], (1, 3, 3, 1)

    def total(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), sides)

    return total(x_BHWC) / total(jnp.ones((1, *x_BHWC.shape[1:3], 1), x_BHWC.dtype))


def _concatenate(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)


class BlockA(nnx.Module):
    """Mixed_5b to 5d: 1x1; 5x5; two 3x3; pool."""

    def __init__(self, inputs: int, pooled: int, rngs: Keys):
        self.branch1x1 = ConvUnit(inputs, 64, (1, 1), rngs)
        self.branch5x5_1 = ConvUnit(inputs, 48, (1, 1), rngs)
        self.branch5x5_2 = ConvUnit(48, 64, (5, 5), rngs, padding=(2, 2))
        self.branch3x3dbl_1 = ConvUnit(inputs, 64, (1, 1), rngs)
        self.branch3x3dbl_2 = ConvUnit(64, 96, (3, 3), rngs, padding=(1, 1))
        self.branch3x3dbl_3 = ConvUnit(96, 96, (3, 3), rngs, padding=(1, 1))
        self.branch_pool = ConvUnit(inputs, pooled, (1, 1), rngs)

    def __call__(self, x):
        return _concatenate(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(mean_pool(x)),
        )


class BlockB(nnx.Module):
    """Mixed_6a: strided 3x3; two 3x3, the last strided; strided maximum pool."""

    def __init__(self, inputs: int, rngs: Keys):
        self.branch3x3 = ConvUnit(inputs, 384, (3, 3), rngs, stride=2)
        self.branch3x3dbl_1 = ConvUnit(inputs, 64, (1, 1), rngs)
        self.branch3x3dbl_2 = ConvUnit(64, 96, (3, 3), rngs, padding=(1, 1))
        self.branch3x3dbl_3 = ConvUnit(96, 96, (3, 3), rngs, stride=2)

    def __call__(self, x):
        return _concatenate(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            max_pool(x, 2),
        )


class BlockC(nnx.Module):
    """Mixed_6b to 6e: 1x1; 7x7 and two of them in factors; pool."""

    def __init__(self, inputs: int, inner: int, rngs: Keys):
        row, column = {"padding": (0, 3)}, {"padding": (3, 0)}
        self.branch1x1 = ConvUnit(inputs, 192, (1, 1), rngs)
        self.branch7x7_1 = ConvUnit(inputs, inner, (1, 1), rngs)
        self.branch7x7_2 = ConvUnit(inner, inner, (1, 7), rngs, **row)
        self.branch7x7_3 = ConvUnit(inner, 192, (7, 1), rngs, **column)
        self.branch7x7dbl_1 = ConvUnit(inputs, inner, (1, 1), rngs)
        self.branch7x7dbl_2 = ConvUnit(inner, inner, (7, 1), rngs, **column)
        self.branch7x7dbl_3 = ConvUnit(inner, inner, (1, 7), rngs, **row)
        self.branch7x7dbl_4 = ConvUnit(inner, inner, (7, 1), rngs, **column)
        self.branch7x7dbl_5 = ConvUnit(inner, 192, (1, 7), rngs, **row)
        self.branch_pool = ConvUnit(inputs, 192, (1, 1), rngs)

    def __call__(self, x):
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return _concatenate(self.branch1x1(x), once, twice, self.branch_pool(mean_pool(x)))


class BlockD(nnx.Module):
    """Mixed_7a: strided 3x3; 7x7 in factors and a strided 3x3; strided maximum pool."""

    def __init__(self, inputs: int, rngs: Keys):
        self.branch3x3_1 = ConvUnit(inputs, 192, (1, 1), rngs)
        self.branch3x3_2 = ConvUnit(192, 320, (3, 3), rngs, stride=2)
        self.branch7x7x3_1 = ConvUnit(inputs, 192, (1, 1), rngs)
        self.branch7x7x3_2 = ConvUnit(192, 192, (1, 7), rngs, padding=(0, 3))
        self.branch7x7x3_3 = ConvUnit(192, 192, (7, 1), rngs, padding=(3, 0))
        self.branch7x7x3_4 = ConvUnit(192, 192, (3, 3), rngs, stride=2)

    def __call__(self, x):
        factors = self.branch7x7x3_2(self.branch7x7x3_1(x))
        factors = self.branch7x7x3_4(self.branch7x7x3_3(factors))
        return _concatenate(self.branch3x3_2(self.branch3x3_1(x)), factors, max_pool(x, 2))


class BlockE(nnx.Module):
    """Mixed_7b and 7c: 1x1; 3x3 in factors side by side, twice; mean or maximum pool."""

    def __init__(self, inputs: int, maximum: bool, rngs: Keys):
        row, column = {"padding": (0, 1)}, {"padding": (1, 0)}
        self.branch1x1 = ConvUnit(inputs, 320, (1, 1), rngs)
        self.branch3x3_1 = ConvUnit(inputs, 384, (1, 1), rngs)
        self.branch3x3_2a = ConvUnit(384, 384, (1, 3), rngs, **row)
        self.branch3x3_2b = ConvUnit(384, 384, (3, 1), rngs, **column)
        self.branch3x3dbl_1 = ConvUnit(inputs, 448, (1, 1), rngs)
        self.branch3x3dbl_2 = ConvUnit(448, 384, (3, 3), rngs, padding=(1, 1))
        self.branch3x3dbl_3a = ConvUnit(384, 384, (1, 3), rngs, **row)
        self.branch3x3dbl_3b = ConvUnit(384, 384, (3, 1), rngs, **column)
        self.branch_pool = ConvUnit(inputs, 192, (1, 1), rngs)
        self.maximum = maximum

    def __call__(self, x):
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x, 1, padding=1) if self.maximum else mean_pool(x)
        return _concatenate(
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(pooled),
        )


class Inception(nnx.Module):
    """Inception-v3 without its classifier: `net(x_BHWC) -> [B, 2048]`, the last pool's means."""

    def __init__(self, rngs: Keys):
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, (3, 3), rngs, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3), rngs)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3), rngs, padding=(1, 1))
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, (1, 1), rngs)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3), rngs)
        self.Mixed_5b = BlockA(192, 32, rngs)
        self.Mixed_5c = BlockA(256, 64, rngs)
        self.Mixed_5d = BlockA(288, 64, rngs)
        self.Mixed_6a = BlockB(288, rngs)
        self.Mixed_6b = BlockC(768, 128, rngs)
        self.Mixed_6c = BlockC(768, 160, rngs)
        self.Mixed_6d = BlockC(768, 160, rngs)
        self.Mixed_6e = BlockC(768, 192, rngs)
        self.Mixed_7a = BlockD(768, rngs)
        self.Mixed_7b = BlockE(1280, False, rngs)
        self.Mixed_7c = BlockE(2048, True, rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BHWC)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool(x, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((1, 2))


def fid_resize(x_BHWC: jax.Array) -> jax.Array:
    """Resize to 299 x 299 as pytorch-fid: bilinear, without antialias."""
    return resize_axes(x_BHWC, (SIDE, SIDE), "bilinear", antialias=False)
