"""Linear maps and convolutions whose kernel is an array, 8-bit, or frozen with a low-rank adapter.

A layer of a network gets `promote_dtype`, `dot_general` and `conv_general_dilated` from here in
place of JAX's own, and multiplies by any kind of kernel. The adapted kernel is never formed:
y = x base + scale (x a) b costs 2 r (in + out) operations a token more than the base, and reverse
mode forms no gradient of the size of the base. An 8-bit kernel is converted layer by layer, where
it is multiplied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn import dtypes
from jax import lax

from gadjax.parallel.placement import replicate


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scale",))
@dataclass(frozen=True)
class Adapter:
    """Low-rank difference of a kernel, scale * a @ b. Hu et al., arXiv:2106.09685.

    Attributes:
      a: [..., in, r]; of a convolution [..., H, W, in, r]. A stack's has a leading layer axis.
      b: [..., r, out]; of a convolution [..., 1, 1, r, out].
      scale: factor alpha / r.
    """

    a: Any
    b: Any
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=())
@dataclass(frozen=True)
class Quantized:
    """Frozen 8-bit kernel, values * scales, with one scale an output.

    Attributes:
      values: int8 [..., in, out]; of a convolution [..., H, W, in, out]. A stack's has a leading
        layer axis.
      scales: float32 [..., out].
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.values.shape

    def __getitem__(self, index) -> "Quantized":
        """The kernel itself for `[...]`, as layers read their parameters."""
        return _itself(self, index)

    def astype(self, dtype) -> "Quantized":
        """The kernel as it is: products are in the dtype of the other factor."""
        return self


def _itself(kernel: Any, index: Any) -> Any:
    if index is not Ellipsis:
        raise TypeError(f"{type(kernel).__name__}: found the index {index!r}; expected ...")
    return kernel


@partial(jax.tree_util.register_dataclass, data_fields=("base", "adapter"), meta_fields=())
@dataclass(frozen=True)
class LowRank:
    """Kernel base + adapter. The base is an array, `Quantized`, or for a second adapter `LowRank`.

    It takes a kernel's place in parameters: derivatives, scans over layers, donation and shardings
    go through its arrays.
    """

    base: Any
    adapter: Adapter

    def __getitem__(self, index) -> "LowRank":
        """The kernel itself for `[...]`, as layers read their parameters."""
        return _itself(self, index)

    def astype(self, dtype) -> "LowRank":
        """The kernel with its arrays in another dtype, but for 8-bit ones."""
        adapter = jax.tree.map(lambda x: x.astype(dtype), self.adapter)
        return LowRank(self.base.astype(dtype), adapter)


Kernel = jax.Array | Quantized | LowRank


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def quantize(kernel: Any) -> Quantized:
    """8-bit kernel of a dense one: the nearest of 255 values, up to the largest of each output.

    kernel: NumPy's, or its shape; a stack's outputs have scales of their own in each layer.
    """
    shape = tuple(kernel.shape)
    layers = shape[: len(shape) % 2]
    if isinstance(kernel, jax.ShapeDtypeStruct):
        scales = jax.ShapeDtypeStruct((*layers, shape[-1]), jnp.float32)
        return Quantized(jax.ShapeDtypeStruct(shape, jnp.int8), scales)
    wide = np.asarray(kernel, np.float32).reshape(*layers, -1, shape[-1])
    scales = np.abs(wide).max(-2) / np.float32(127)
    scales = np.where(scales > 0, scales, np.float32(1))
    values = np.rint(wide / scales[..., None, :]).astype(np.int8)
    return Quantized(values.reshape(shape), scales)


def promote_dtype(args: tuple, *, dtype=None, inexact: bool = True) -> tuple:
    """Cast inputs, kernel and bias to one dtype: flax's `promote_dtype`, for kernels of any kind.

    Args:
      args: arrays, kernels and None.
      dtype: target dtype; None: that to which the arguments promote.
      inexact: require a floating-point dtype.
    """
    leaves, structure = jax.tree.flatten(args, is_leaf=is_quantized)
    # An 8-bit kernel stays as it is, and has a say in the dtype by its scales.
    arrays = tuple(leaf.scales if is_quantized(leaf) else leaf for leaf in leaves)
    promoted = dtypes.promote_dtype(arrays, dtype=dtype, inexact=inexact)
    return structure.unflatten(
        leaf if is_quantized(leaf) else array for leaf, array in zip(leaves, promoted, strict=True)
    )


def _multiply(product: Callable[..., jax.Array], x: jax.Array, kernel: Kernel) -> jax.Array:
    """Product of x and a kernel of any kind.

    product: (x, array) -> product of x and an array in the kernel's place.
    """
    if is_quantized(kernel):
        # Reverse mode would keep the converted values of every layer.
        convert = jax.checkpoint(lambda x, v: product(x, v.astype(x.dtype)), prevent_cse=False)
        y = convert(x, kernel.values)
        return (y * kernel.scales).astype(y.dtype)
    if not isinstance(kernel, LowRank):
        return product(x, kernel)
    adapter = kernel.adapter
    # Gathered, as small as they are: else the compiler leaves outputs split as b is, and exchanges
    # the whole product's.
    a, b = replicate(adapter.a), replicate(adapter.b.reshape(adapter.b.shape[-2:]))
    inner = product(x, a)
    inner = inner if adapter.scale == 1 else inner * jnp.asarray(adapter.scale, inner.dtype)
    return _multiply(product, x, kernel.base) + inner @ b


def dot_general(x: jax.Array, kernel: Kernel, dimension_numbers, **options) -> jax.Array:
    """`jax.lax.dot_general` over the last axis of x and the first of a kernel of any kind.

    Args:
      x: [..., in].
      kernel: [in, out].
      dimension_numbers, options: of `jax.lax.dot_general`.
    """
    return _multiply(lambda x, k: lax.dot_general(x, k, dimension_numbers, **options), x, kernel)


def conv_general_dilated(x: jax.Array, kernel: Kernel, *args, **options) -> jax.Array:
    """`jax.lax.conv_general_dilated` with the channels last, for kernels of any kind.

    Args:
      x: [B, H, W, in].
      kernel: [H, W, in, out]; an adapted one without groups of channels.
      args, options: of `jax.lax.conv_general_dilated`.
    """

    def convolve(x, kernel):
        if options.get("feature_group_count", 1) > 1:
            # Else the compiler exchanges activations, so that each device has the groups of its
            # part of the kernel: those are many times larger than the kernel.
            kernel = replicate(kernel)
        return lax.conv_general_dilated(x, kernel, *args, **options)

    return _multiply(convolve, x, kernel)


def linear(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x @ kernel: [..., in] and [in, out] -> [..., out]."""
    return _multiply(jnp.matmul, x, kernel)


def as_matrix(kernel: Kernel) -> Kernel:
    """A convolution's kernel [H, W, in, out] as [H * W * in, out]."""
    if isinstance(kernel, LowRank):
        adapter = kernel.adapter
        matrices = Adapter(as_matrix(adapter.a), as_matrix(adapter.b), adapter.scale)
        return LowRank(as_matrix(kernel.base), matrices)
    if is_quantized(kernel):
        return Quantized(as_matrix(kernel.values), kernel.scales)
    return kernel.reshape(-1, kernel.shape[-1])


def chunks(kernel: Kernel, axis: int, split: Callable[[Any, int], jax.Array]) -> Kernel:
    """A kernel [in, out] in chunks [count, ...] of its inputs (axis 0) or outputs (axis 1).

    Args:
      kernel: of any kind.
      axis: 0 or 1.
      split: (array, axis) -> its chunks along that axis.
    """
    if is_quantized(kernel):
        values, scales = split(kernel.values, axis), kernel.scales[None]
        if axis == 0:
            return Quantized(values, jnp.broadcast_to(scales, (len(values), scales.shape[1])))
        return Quantized(values, split(scales, 1)[:, 0])
    if not isinstance(kernel, LowRank):
        return split(kernel, axis)
    base, (a, b) = chunks(kernel.base, axis, split), (kernel.adapter.a, kernel.adapter.b)
    count = len(jax.tree.leaves(base)[0])
    # The factor on the other side belongs to every chunk.
    if axis == 0:
        a, b = split(a, 0), jnp.broadcast_to(b, (count, *b.shape))
    else:
        a, b = jnp.broadcast_to(a, (count, *a.shape)), split(b, 1)
    return LowRank(base, Adapter(a, b, kernel.adapter.scale))


def dense(kernel: Kernel) -> Any:
    """The kernel as one array, with its adapters added; sums and products are in float32.

    kernel: of any kind; stacked ones too, and NumPy's.
    """
    if is_quantized(kernel):
        # One axis for all between the layer's and the output's.
        flat = kernel.values.reshape(*kernel.scales.shape[:-1], -1, kernel.shape[-1])
        return (flat * kernel.scales[..., None, :]).reshape(kernel.shape)
    if not isinstance(kernel, LowRank):
        return kernel
    a, b = (x.astype("float32") for x in (kernel.adapter.a, kernel.adapter.b))
    # Of a convolution, b's two axes of size 1 broadcast against the height and width of a.
    return dense(kernel.base).astype("float32") + kernel.adapter.scale * (a @ b)
