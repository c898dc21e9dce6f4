"""A component's named tensors <-> its parameters: strict, and bit-exact in every float dtype."""

import re
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from gadjax.errors import InputError
from gadjax.models.keymap import KeyMap
from gadjax.models.params import flatten, unflatten
from gadjax.types import Params

LISTED = 10  # names shown in one error line
BLOCK = 1 << 18  # elements looked at together; stays in the cache
STRIP = 64  # columns transposed together

# File key -> (path of the parameter, layer of a stacked one or None).
Places = dict[str, tuple[str, int | None]]


def _to_torch(name: str, value: np.ndarray) -> np.ndarray:
    """Linear [in, out] -> [out, in]; convolution HWIO -> OIHW; everything else as it is."""
    if name != "kernel" or value.ndim not in (2, 4):
        return value
    return value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)


def _from_torch(name: str, value: np.ndarray) -> np.ndarray:
    if name != "kernel" or value.ndim not in (2, 4):
        return value
    return value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)


def _numbered(key: str, layer: int | None) -> str:
    """The key of one layer of a stack, whose number '#' or '#+FIRST' stands for."""
    if layer is None:
        return key
    return re.sub(r"#(?:\+(\d+))?", lambda found: str(layer + int(found[1] or 0)), key)


def expected_shapes(abstract: Params, keymap: KeyMap) -> dict[str, tuple[str, int | None, tuple]]:
    """File key -> (path, layer or None, shape in the file), from shapes alone."""
    found = {}
    for path, leaf in flatten(abstract).items():
        key, name = keymap.key(path), path.rsplit("/", 1)[-1]
        layers = range(leaf.shape[0]) if "#" in key else [None]
        shape = leaf.shape[1:] if "#" in key else leaf.shape
        # A broadcast scalar has the shape and takes no memory.
        shape = _to_torch(name, np.broadcast_to(np.float32(0), shape)).shape
        for layer in layers:
            found[_numbered(key, layer)] = (path, layer, shape)
    return found


def check_keys(
    shapes: Mapping[str, tuple[int, ...]], abstract: Params, keymap: KeyMap, where: str
) -> Places:
    """Account for every tensor of a file by name and shape.

    Returns: the file's key -> (path, layer). Raises: InputError listing at most ten missing,
    unexpected, repeated or misshapen tensors and the count of each.
    """
    wanted = expected_shapes(abstract, keymap)
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
        f"{key} (found {tuple(shapes[key])}, expected {wanted[name][2]})"
        for name, key in sorted(by_name.items())
        if name in wanted and tuple(shapes[key]) != wanted[name][2]
    ]
    problems = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (
            ("missing", sorted(set(wanted) - set(by_name))),
            ("unexpected", sorted(key for name, key in by_name.items() if name not in wanted)),
            ("under two names", sorted(repeated)),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{where}: found {len(shapes)} tensors; expected {len(wanted)}, of which "
            + "; ".join(problems)
        )
    return {key: wanted[name][:2] for name, key in by_name.items()}


def check_dtypes(dtypes: Mapping[str, np.dtype], places: Places, where: str) -> None:
    """Only floating tensors, and one dtype for the layers that are stacked into one parameter.

    Raises: InputError naming at most ten tensors of each kind.
    """
    first: dict[str, str] = {}
    mixed, other = [], []
    for key, (path, _) in places.items():
        if not jnp.issubdtype(dtypes[key], jnp.floating):
            other.append(f"{key} ({dtypes[key]})")
        elif dtypes[key] != dtypes[first.setdefault(path, key)]:
            mixed.append(f"{key} ({dtypes[key]}, while {first[path]} is {dtypes[first[path]]})")
    if other:
        raise InputError(f"{where}: found {_listed(other)}; expected floating-point tensors")
    if mixed:
        raise InputError(f"{where}: found {_listed(mixed)}; expected one dtype in all layers")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], abstract: Params, keymap: KeyMap, where: str = "tensors"
) -> Params:
    """Named torch-layout tensors -> nested parameters: numpy, their dtype, stacked by layer."""
    places = check_keys({k: v.shape for k, v in tensors.items()}, abstract, keymap, where)
    check_dtypes({k: v.dtype for k, v in tensors.items()}, places, where)
    return place_tensors(((k, tensors[k]) for k in places), places, abstract)


def fill(target: np.ndarray, value: np.ndarray) -> None:
    """target[...] = value; a transposed matrix in strips that stay in the cache, twice as fast."""
    if value.ndim != 2 or value.flags.c_contiguous:
        target[...] = value
        return
    for start in range(0, value.shape[1], STRIP):
        target[:, start : start + STRIP] = value[:, start : start + STRIP]


def all_finite(value: np.ndarray) -> bool:
    """Whether a contiguous array has no NaN and no infinity. Other than floating: True."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return True
    # The bits of infinity are a full exponent. Ten times faster than isfinite on half precision.
    bits = f"u{value.dtype.itemsize}"
    infinity = np.array(np.inf, value.dtype).view(bits)
    flat = value.reshape(-1).view(bits)
    return all(
        (flat[start : start + BLOCK] & infinity).max() < infinity
        for start in range(0, flat.size, BLOCK)
    )


def place_tensors(
    stream: Iterable[tuple[str, np.ndarray]],
    places: Places,
    abstract: Params,
    dtype=None,
    where: str = "tensors",
) -> Params:
    """Fill parameters from a stream of (file key, array), one tensor in memory beside the result.

    Each tensor of `places` must come once. dtype: of the result; None keeps the file's.
    Raises: InputError naming a tensor that `dtype` cannot hold.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    flat: dict[str, np.ndarray] = {}
    missing = set(places)
    for key, value in stream:
        path, layer = places[key]
        if path not in flat:
            flat[path] = np.empty(shapes[path], dtype or value.dtype)
        target = flat[path] if layer is None else flat[path][layer, ...]
        with np.errstate(over="ignore"):
            fill(target, _from_torch(path.rsplit("/", 1)[-1], value))
        if dtype is not None and not all_finite(target):
            raise InputError(
                f"{where}: found values of {key} too large for {target.dtype}; expected "
                "ones that it holds"
            )
        missing.remove(key)
    if missing:
        raise ValueError(f"the stream ended without {_listed(sorted(missing))}")
    return unflatten({path: flat[path] for path in shapes})


def tensors_from_params(
    params: Params, keymap: KeyMap, *, views: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters -> (file key, torch-layout array), one at a time.

    The arrays are contiguous; with `views` they share the parameters' memory and are strided,
    for a consumer that lays them out itself.
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
