"""The wheel in an empty environment: commands, bundled assets and configs without a clone."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
IN_CLONE_ALONE = {"study"}  # needs gadjax.experiments


def called(*command, code=0, **options):
    """Run a command without PYTHONPATH; return its stdout and stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy of the sources: a build leaves folders in them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("gadjax", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    called(sys.executable, "-c", build, cwd=copy)
    (path,) = copy.glob("dist/*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """New environment with the wheel; its dependencies are those of the running environment."""
    folder = tmp_path_factory.mktemp("environment")
    called(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    called(sys.executable, "-m", "pip", "--python", python, *install)
    site = next((folder / "lib").glob("python*/site-packages"))
    # Folders named in a .pth are searched after this environment's, and their own .pth are not
    # read: an editable gadjax there has no effect.
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(paths))
    location = called(python, "-c", "import gadjax; print(gadjax.__file__)", cwd=folder)[0]
    assert location.strip() == str(site / "gadjax" / "__init__.py")
    return folder


@pytest.fixture
def gadjax(environment, tmp_path):
    """Call a command of the wheel in an empty folder; returns its stdout and stderr."""
    return lambda *arguments, code=0: called(
        environment / "bin" / "gadjax", *arguments, code=code, cwd=tmp_path
    )


@pytest.mark.slow
def test_the_wheel_has_configs_and_assets_and_no_experiments(wheel):
    files = {Path(name) for name in ZipFile(wheel).namelist()}
    configs = {path.stem for path in files if path.parent == Path("gadjax/configs")}
    assert configs == {path.stem for path in (ROOT / "configs").glob("*.py")} - IN_CLONE_ALONE
    assets = {path.relative_to(ROOT) for path in (ROOT / "gadjax" / "assets").rglob("*.*")}
    assert {path for path in assets if "__pycache__" not in path.parts} <= files
    assert Path("gadjax/evaluation/templates/report.html") in files
    assert not [path for path in files if "experiments" in path.parts]
    assert {path.parts[0] for path in files} == {
        "gadjax",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }


@pytest.mark.slow
def test_version(gadjax):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert gadjax("--version")[0] == f"gadjax {project['version']}\n"


@pytest.mark.slow
def test_sample(gadjax, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle\n")
    gadjax(
        *("sample", "--model", "asset:shapes_flow_teacher", "--steps", "2"),
        *("--prompts", prompts, "--out", tmp_path / "out"),
    )
    assert list((tmp_path / "out").glob("*.png"))


@pytest.mark.slow
def test_train_by_the_name_of_a_config(gadjax, tmp_path):
    small = [f"--config.{key}" for key in ("steps=2", "batch=2", "preview.every=0", "remat=none")]
    train = ("train", "--config", "shapes_gad:regression", "--workdir", tmp_path / "run", *small)
    gadjax(*train)
    assert "done" in gadjax("status", tmp_path / "run")[0]
    error = gadjax("train", "--config=study:flow", "--workdir", tmp_path / "no", code=2)[1]
    assert error.count("\n") == 1 and "found 'study'; expected a file, or one of" in error


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_plan_by_the_name_of_a_config(gadjax):
    small = [
        f"--config.{key}" for key in ("batch=4", "student.steps=1", "student.timesteps=(999,)")
    ]
    table, _ = gadjax("plan", "--config=shapes_gad:regression", "--topology=v5e:2x2", *small)
    assert "v5e" in table
