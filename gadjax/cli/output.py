"""What commands that write a folder have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp

from gadjax.errors import InputError, RunStopped

DTYPES = ("float32", "bfloat16", "float16")


@contextmanager
def storage(out: Path) -> Iterator[None]:
    """Raises: RunStopped where the disk fails."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f"{out}: cannot be written: {error.strerror or error}") from error


def storage_dtype(name: str | None):
    """A dtype for files, None for the one they have."""
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype: found {name!r}; expected one of {', '.join(DTYPES)}")
    return name and jnp.dtype(name)


def check_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"{flag}: found {value}; expected {least} or more")
