"""JAX's settings under which numbers are made here, whatever the environment or a program says.

Wide numbers, another generator or unpartitioned threefry give other noise for the same seed, and
a run that is resumed with them would go on as another one. Strict promotion and guarded transfers
are for finding faults in a program: what they refuse is meant here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax

from gadjax.seeds import PRNG_IMPL


@contextmanager
def pinned_jax_config() -> Iterator[None]:
    """For this thread; also a decorator, for every function that begins work with JAX."""
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
