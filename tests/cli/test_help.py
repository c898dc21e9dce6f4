"""The command line starts at once: what takes long to import is imported by those who need it."""

import pytest
from programs import run_python

# The dearest imports of all commands together.
HEAVY = {"jax", "numpy", "flax", "orbax", "optax", "grain", "transformers", "diffusers", "torch"}
HEAVY |= {"PIL", "tqdm", "google.protobuf", "tensorflow"}
PROGRAM = """
import sys
heavy = set(sys.argv.pop().split(","))
from gadjax.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", *sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "command",
    [
        [],
        *(f"{name}".split() for name in "train plan launch status evaluate repair doctor".split()),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(command):
    printed = run_python("-c", PROGRAM, *command, "--help", ",".join(HEAVY)).stdout
    assert printed.startswith("usage: gadjax")
    assert printed.splitlines()[-1] == "imported:"


def test_an_import_would_be_listed():
    """`sample` takes its defaults from modules that import JAX."""
    printed = run_python("-c", PROGRAM, "sample", "--help", ",".join(HEAVY)).stdout
    assert "jax" in printed.splitlines()[-1].split()


def test_status_imports_nothing_heavy(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3, "batch": 2}')
    printed = run_python("-c", PROGRAM, "status", tmp_path, ",".join(HEAVY)).stdout
    assert "0 / 3" in printed and printed.splitlines()[-1] == "imported:"
