"""JAX configuration that results depend on, pinned against the environment and the calling program.

64-bit numbers, another generator or unpartitioned threefry give other noise for the same seed, and
a resumed run would diverge from itself. Strict promotion and guarded transfers are debugging aids:
what they refuse is intended here. Without compilation nothing runs: programs place their arrays on
the devices of a mesh, and are compiled ahead of time.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax

from gadjax.errors import InputError
from gadjax.seeds import PRNG_IMPL


@contextmanager
def pinned_jax_config() -> Iterator[None]:
    """Pin JAX's configuration in this thread; also a decorator, for every entry point.

    Raises: InputError where compilation is disabled.
    """
    if jax.config.jax_disable_jit:
        raise InputError(
            "JAX_DISABLE_JIT: found it set; expected it unset, because programs are compiled ahead "
            "of time"
        )
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
