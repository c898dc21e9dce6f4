"""Shared checks of the commands that write a folder: write errors, dtypes, number flags."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gadjax.errors import InputError, RunStopped, check_choice

DTYPES = ("float32", "bfloat16", "float16")


@contextmanager
def stop_on_write_error(out: Path) -> Iterator[None]:
    """Context that turns write errors (OSError) into RunStopped, naming the folder `out`."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f"{out}: cannot be written: {error.strerror or error}") from error


def parse_dtype(name: str | None):
    """Parse the dtype of weight files; None keeps the files' own. Raises: InputError."""
    import jax.numpy as jnp  # here, so that flags are parsed without JAX

    if name is not None:
        check_choice("--dtype", name, DTYPES)
    return name and jnp.dtype(name)


def add_lora_argument(
    parser: argparse.ArgumentParser,
    of: str = "model",
    action: str | type[argparse.Action] = "append",
) -> None:
    """Add `--lora`, which may be repeated.

    Args:
        parser: of the command.
        of: the model that it adapts, for the help text.
        action: of argparse.
    """
    parser.add_argument(
        "--lora",
        action=action,
        default=[],
        metavar="FILE[:WEIGHT]",
        help=f"LoRA that is merged into the {of}: a safetensors file, or a folder of gadjax export "
        "--lora, diffusers or PEFT; may be repeated",
    )


def check_at_least(flag: str, value: int | None, least: int) -> None:
    """Check the lower limit of a number flag; None passes. Raises: InputError."""
    if value is not None and value < least:
        raise InputError(f"{flag}: found {value}; expected {least} or more")
