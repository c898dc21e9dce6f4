"""Where compiled programs are kept between two starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
from gadjax.cli.main import main
main(["no such command"])
import jax
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    "own,found",
    [
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/gadjax/compiled"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/gadjax/compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
    ],
)
def test_a_folder_of_the_users_unless_jax_is_told_another(own, found):
    known = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=known | {"PYTHONPATH": str(ROOT)} | own,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == found, run.stderr


def test_a_program_that_has_jax_keeps_its_own(monkeypatch):
    from gadjax.cli.main import main

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert "jax" in sys.modules and main(["no such command"]) == 2
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
