"""PRNG keys from seeds, independent of JAX's default generator."""

import jax
import numpy as np

from gadjax.errors import InputError

PRNG_IMPL = "threefry2x32"
SEED_BITS = 64


def check_seed(seed: int, name: str = "seed", count: int = 1) -> None:
    """Check that `count` consecutive seeds from this one on are valid.

    Args:
      seed: the first seed.
      name: the flag or key that the error names.
      count: number of seeds.

    Raises: InputError where one is negative or has more than 64 bits.
    """
    if not 0 <= seed <= 2**SEED_BITS - count:
        raise InputError(f"{name}: found {seed}; expected 0 to 2^{SEED_BITS} - {count}")


def make_key(seed: int) -> jax.Array:
    """PRNG key from all 64 bits of a seed; `jax.random.key` drops the upper 32.

    Raises: InputError as `check_seed`.
    """
    check_seed(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(words, impl=PRNG_IMPL)
