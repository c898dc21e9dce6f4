"""Convert a state dict to nested parameters and back, bit-exact in every float dtype.

The state dict holds torch's keys and layouts. Every tensor must be accounted for.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.models.keymap import KeyMap
from gadjax.models.params import flatten, unflatten
from gadjax.types import Params

MAX_LISTED = 10  # names in one error line
BLOCK = 1 << 18  # elements checked at a time, to stay in the cache
STRIP = 64  # columns transposed at a time

# File key -> (path of the parameter, index of the layer in a stacked parameter or None).
TensorMap = dict[str, tuple[str, int | None]]


def kernel_to_torch(value: np.ndarray) -> np.ndarray:
    """A kernel in torch's layout: linear [in, out] -> [out, in], convolution HWIO -> OIHW."""
    return value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)


def kernel_from_torch(value: np.ndarray) -> np.ndarray:
    """The inverse of `kernel_to_torch`."""
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def _to_torch(name: str, value: np.ndarray) -> np.ndarray:
    """Torch's layout of kernels; other parameters are unchanged."""
    return kernel_to_torch(value) if name == "kernel" and value.ndim in (2, 4) else value


def _from_torch(name: str, value: np.ndarray) -> np.ndarray:
    return kernel_from_torch(value) if name == "kernel" and value.ndim in (2, 4) else value


def _numbered(key: str, layer: int | None) -> str:
    """Key of one layer of a stack: '#' or '#+FIRST' replaced by the layer's number."""
    if layer is None:
        return key
    return re.sub(r"#(?:\+(\d+))?", lambda match: str(layer + int(match[1] or 0)), key)


def expected_shapes(abstract: Params, keymap: KeyMap) -> dict[str, tuple[str, int | None, tuple]]:
    """Expected state dict from shapes alone: file key -> (path, layer or None, shape)."""
    expected = {}
    for path, leaf in flatten(abstract).items():
        key, name = keymap.key(path), path.rsplit("/", 1)[-1]
        layers = range(leaf.shape[0]) if "#" in key else [None]
        shape = leaf.shape[1:] if "#" in key else leaf.shape
        # A broadcast scalar has the shape and needs no memory.
        shape = _to_torch(name, np.broadcast_to(np.float32(0), shape)).shape
        for layer in layers:
            expected[_numbered(key, layer)] = (path, layer, shape)
    return expected


def check_keys(
    shapes: Mapping[str, tuple[int, ...]], abstract: Params, keymap: KeyMap, where: str
) -> TensorMap:
    """Match the tensors of a file to the parameters, strictly, by key and shape.

    Args:
      shapes: shapes by the file's keys.
      abstract: shapes of the parameters.
      keymap: parameter paths to file keys.
      where: the file, for error texts.

    Returns: the file's key -> (path, layer).
    Raises: InputError listing at most ten missing, unexpected, repeated or misshapen tensors, and
      the count of each.
    """
    expected = expected_shapes(abstract, keymap)
    ignored = [re.compile(pattern) for pattern in keymap.ignored]
    by_name: dict[str, str] = {}
    repeated = []
    tied_keys = dict(keymap.tied_keys)
    for key in shapes:
        if any(pattern.search(key) for pattern in ignored) or tied_keys.get(key) in shapes:
            continue
        first = by_name.setdefault(keymap.canonical(key), key)
        if first != key:
            repeated.append(f"{first} and {key}")
    misshapen = [
        f"{key} (found {tuple(shapes[key])}, expected {expected[name][2]})"
        for name, key in sorted(by_name.items())
        if name in expected and tuple(shapes[key]) != expected[name][2]
    ]
    problems = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (
            ("missing", sorted(set(expected) - set(by_name))),
            ("unexpected", sorted(key for name, key in by_name.items() if name not in expected)),
            ("under two names", sorted(repeated)),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{where}: found {len(shapes)} tensors; expected {len(expected)}, of which "
            + "; ".join(problems)
        )
    return {key: expected[name][:2] for name, key in by_name.items()}


def check_dtypes(dtypes: Mapping[str, np.dtype], tensor_map: TensorMap, where: str) -> None:
    """Check that tensors are floating, with one dtype for all layers of a stacked parameter.

    Args:
      dtypes: dtypes by the file's keys.
      tensor_map: the file's keys -> parameters, from `check_keys`.
      where: the file, for error texts.

    Raises: InputError naming at most ten tensors of each kind.
    """
    first: dict[str, str] = {}
    mixed, other = [], []
    for key, (path, _) in tensor_map.items():
        if not jnp.issubdtype(dtypes[key], jnp.floating):
            other.append(f"{key} ({dtypes[key]})")
        elif dtypes[key] != dtypes[first.setdefault(path, key)]:
            mixed.append(f"{key} ({dtypes[key]}, while {first[path]} is {dtypes[first[path]]})")
    if other:
        raise InputError(f"{where}: found {_listed(other)}; expected floating-point tensors")
    if mixed:
        raise InputError(f"{where}: found {_listed(mixed)}; expected one dtype in all layers")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], abstract: Params, keymap: KeyMap, where: str = "tensors"
) -> Params:
    """Convert a state dict in torch's layout to nested parameters, stacked by layer.

    Args:
      tensors: arrays by the file's keys.
      abstract: shapes of the parameters.
      keymap: parameter paths to file keys.
      where: source of the tensors, for error texts.

    Returns: nested numpy arrays, in the tensors' dtype.
    Raises: InputError as `check_keys` and `check_dtypes`.
    """
    tensor_map = check_keys({k: v.shape for k, v in tensors.items()}, abstract, keymap, where)
    check_dtypes({k: v.dtype for k, v in tensors.items()}, tensor_map, where)
    return place_tensors(((k, tensors[k]) for k in tensor_map), tensor_map, abstract)


def fill(target: np.ndarray, value: np.ndarray) -> None:
    """Assign target[...] = value; transposed matrices in cache-sized strips, twice as fast."""
    if value.ndim != 2 or value.flags.c_contiguous:
        target[...] = value
        return
    for start in range(0, value.shape[1], STRIP):
        target[:, start : start + STRIP] = value[:, start : start + STRIP]


def all_finite(value: np.ndarray) -> bool:
    """True if a contiguous array has no NaN and no infinity; always for integers and booleans."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return True
    # Infinity and NaN have all exponent bits set. Ten times faster than isfinite in half precision.
    bits = f"u{value.dtype.itemsize}"
    infinity = np.array(np.inf, value.dtype).view(bits)
    flat = value.reshape(-1).view(bits)
    return all(
        (flat[start : start + BLOCK] & infinity).max() < infinity
        for start in range(0, flat.size, BLOCK)
    )


def place_tensors(
    stream: Iterable[tuple[str, np.ndarray]],
    tensor_map: TensorMap,
    abstract: Params,
    dtype=None,
    where: str = "tensors",
) -> Params:
    """Fill parameters from a stream of tensors, with one tensor in memory besides the result.

    Args:
      stream: (file key, array); every key of `tensor_map` exactly once.
      tensor_map: the file's keys -> parameters, from `check_keys`.
      abstract: shapes of the parameters.
      dtype: dtype of the result; None keeps the file's.
      where: source of the tensors, for error texts.

    Returns: nested numpy arrays.
    Raises: InputError naming a tensor whose values overflow in `dtype`.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    flat: dict[str, np.ndarray] = {}
    missing = set(tensor_map)
    for key, value in stream:
        path, layer = tensor_map[key]
        if path not in flat:
            flat[path] = np.empty(shapes[path], dtype or value.dtype)
        target = flat[path] if layer is None else flat[path][layer, ...]
        with np.errstate(over="ignore"):
            fill(target, _from_torch(path.rsplit("/", 1)[-1], value))
        if dtype is not None and not all_finite(target):
            raise InputError(
                f"{where}: found values of {key} too large for {target.dtype}; expected "
                "ones within its range"
            )
        missing.remove(key)
    if missing:
        raise ValueError(f"the stream ended without {_listed(sorted(missing))}")
    return unflatten({path: flat[path] for path in shapes})


def tensors_from_params(
    params: Params, keymap: KeyMap, *, views: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the state dict of parameters: (file key, array in torch's layout), one at a time.

    views: yield strided views of the parameters' memory, for consumers that copy; otherwise the
      arrays are contiguous.
    """
    for path, leaf in flatten(params).items():
        key, name = keymap.key(path), path.rsplit("/", 1)[-1]
        leaf = np.asarray(leaf)
        stacked = "#" in key
        for layer in range(len(leaf)) if stacked else [None]:
            value = _to_torch(name, leaf[layer, ...] if stacked else leaf)
            # ascontiguousarray would give a scalar an axis.
            value = value if views or not value.ndim else np.ascontiguousarray(value)
            yield _numbered(key, layer), value
