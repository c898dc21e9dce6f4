"""Compilation cache between two starts, and readers that close the output."""

import os
import signal
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
    "variables,cache",
    [
        ({"XDG_CACHE_HOME": "TMP/caches"}, "TMP/caches/gadjax/compiled"),
        ({"XDG_CACHE_HOME": "", "HOME": "TMP/me"}, "TMP/me/.cache/gadjax/compiled"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "TMP/me"}, "TMP/me/.cache/gadjax/compiled"),
        ({"XDG_CACHE_HOME": "", "HOME": "~"}, "None"),  # the home of a user without one
        ({"XDG_CACHE_HOME": "/dev/null/caches"}, "None"),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
    ],
)
def test_the_users_cache_unless_jax_has_another(variables, cache, tmp_path):
    variables = {name: text.replace("TMP", str(tmp_path)) for name, text in variables.items()}
    cache = cache.replace("TMP", str(tmp_path))
    known = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=known | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.stdout.strip() == cache, run.stderr
    assert not list(tmp_path.iterdir())


def test_a_program_with_jax_keeps_its_cache(monkeypatch):
    from gadjax.cli.main import main

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert "jax" in sys.modules and main(["no such command"]) == 2
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_closed_output_is_not_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3, "batch": 2}')
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
        "from gadjax.cli.main import main; sys.exit(main(['status', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, b"")
