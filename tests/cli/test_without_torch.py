"""Everything but the checks runs where neither torch nor diffusers can be imported."""

import pytest
from programs import run_python
from tiny_run import config_file

IMPORTS = """
import importlib, pkgutil, sys


class Refusal:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "diffusers"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Refusal())

import gadjax

names = [m.name for m in pkgutil.walk_packages(gadjax.__path__, "gadjax.")]
# Modules of programs begin them when they are imported; configs are of users.
for name in names:
    if not name.endswith("__main__") and not name.startswith(("gadjax.configs", "gadjax.assets")):
        importlib.import_module(name)
print(len(names))
"""

SCRIPT = """
import sys

# An import then fails, and they count as not installed.
sys.modules["torch"] = sys.modules["diffusers"] = None

from gadjax.cli.main import main

teacher, workdir, config, prompts, out = sys.argv[1:]
for command in (
    ["train", "--config", config, "--workdir", f"{out}/run"],
    ["sample", "--model", f"{out}/run", "--prompts", prompts, "--out", f"{out}/first"],
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


def test_every_module_is_imported_without_torch():
    done = run_python("-c", IMPORTS)
    assert int(done.stdout) > 200


@pytest.mark.slow
def test_without_torch(tiny_pipeline, workdir, prompts, tmp_path):
    out = tmp_path / "out"
    config = config_file(
        tmp_path / "config.py",
        teacher=str(tiny_pipeline),
        objective={"regression": {"steps": 1}},
        student={"steps": 2, "timesteps": (900, 400)},
        **{"steps": 1, "batch": 2, "remat": "none"},
        data={"prompts": str(prompts), "length": 8},
    )
    done = run_python("-c", SCRIPT, tiny_pipeline, workdir, config, prompts, out)
    assert done.stderr.count("found no torch and no diffusers") == 2
    assert "Traceback" not in done.stderr
    assert "Not verified" in (out / "student" / "README.md").read_text()
    assert not (out / "checked").exists()
    assert (out / "pictures" / "00001-0.png").exists()
