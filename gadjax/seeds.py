"""From seeds to random keys: the same ones whatever JAX's default generator is."""

import jax
import numpy as np

from gadjax.errors import InputError

PRNG_IMPL = "threefry2x32"
BITS = 64


def check_seed(seed: int, name: str = "seed", count: int = 1) -> None:
    """count: of seeds that are taken from this one on. Raises: InputError where one is negative or
    has more than 64 bits."""
    if not 0 <= seed <= 2**BITS - count:
        raise InputError(f"{name}: found {seed}; expected 0 to 2^{BITS} - {count}")


def make_key(seed: int) -> jax.Array:
    """Of all bits of a seed; `jax.random.key` leaves out the upper 32. Raises: as `check_seed`."""
    check_seed(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(words, impl=PRNG_IMPL)
