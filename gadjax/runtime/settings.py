"""JAX configuration pinned for reproducible numbers, whatever the environment or the program set.

64-bit types, another PRNG or unpartitioned threefry give other noise for the same seed, and a run
that is resumed with them would continue as another one. Strict promotion and transfer guards are
for debugging: the code here relies on what they refuse.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax

from gadjax.seeds import PRNG_IMPL


@contextmanager
def pinned_jax_config() -> Iterator[None]:
    """Pin the JAX config of this thread; also a decorator of every function that enters JAX."""
    with ExitStack() as stack:
        for setting, value in (
            (jax.enable_x64, False),
            (jax.default_prng_impl, PRNG_IMPL),
            (jax.threefry_partitionable, True),
            (jax.numpy_dtype_promotion, "standard"),
            (jax.numpy_rank_promotion, "allow"),
            (jax.transfer_guard, "allow"),
        ):
            stack.enter_context(setting(value))
        yield
