"""sample, convert, export and embed run where neither torch nor diffusers can be imported."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
import sys

# An import then fails, and who asks whether they are installed is told no.
sys.modules["torch"] = sys.modules["diffusers"] = None

from gadjax.cli.main import main

teacher, workdir, prompts, out = sys.argv[1:]
for command in (
    ["convert", teacher, f"{out}/own"],
    ["convert", f"{out}/own", f"{out}/back"],
    ["export", "--workdir", workdir, "--out", f"{out}/student"],
    ["sample", "--model", f"{out}/student", "--prompts", prompts, "--out", f"{out}/pictures"],
    ["embed", "--model", f"{out}/own", "--prompts", prompts, "--out", f"{out}/text"],
    ["doctor"],
):
    assert main(command) == 0, command
assert main(["convert", teacher, f"{out}/checked", "--check"]) == 2
assert main(["export", "--verify", f"{out}/student"]) == 2
assert not {name.split(".")[0] for name, m in sys.modules.items() if m} & {"torch", "diffusers"}
"""


def test_without_torch(tiny_pipeline, workdir, prompts, tmp_path):
    out = tmp_path / "out"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), tiny_pipeline, workdir, prompts, out],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("found no torch and no diffusers") == 2
    assert "Traceback" not in done.stderr
    assert "Not verified" in (out / "student" / "README.md").read_text()
    assert not (out / "checked").exists()
    assert (out / "pictures" / "00001-0.png").exists()
