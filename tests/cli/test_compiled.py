"""Where compiled programs are kept between two starts."""

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
    "own,found",
    [
        ({"XDG_CACHE_HOME": "TMP/caches"}, "TMP/caches/gadjax/compiled"),
        ({"XDG_CACHE_HOME": "", "HOME": "TMP/me"}, "TMP/me/.cache/gadjax/compiled"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "TMP/me"}, "TMP/me/.cache/gadjax/compiled"),
        ({"XDG_CACHE_HOME": "", "HOME": "~"}, "None"),  # what is left of no home at all
        ({"XDG_CACHE_HOME": "/dev/null/caches"}, "None"),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
    ],
)
def test_a_folder_of_the_users_unless_jax_is_told_another(own, found, tmp_path):
    own = {name: text.replace("TMP", str(tmp_path)) for name, text in own.items()}
    found = found.replace("TMP", str(tmp_path))
    known = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=known | {"PYTHONPATH": str(ROOT)} | own,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.stdout.strip() == found, run.stderr
    assert not list(tmp_path.iterdir())


def test_a_program_that_has_jax_keeps_its_own(monkeypatch):
    from gadjax.cli.main import main

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert "jax" in sys.modules and main(["no such command"]) == 2
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_reader_that_leaves_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3, "batch": 2}')
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
        "from gadjax.cli.main import main; sys.exit(main(['status', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, b"")
