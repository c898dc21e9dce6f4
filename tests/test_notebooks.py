"""Notebooks: jupytext files in percent format that run as scripts."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from programs import run_python

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.py"))}
all_notebooks = pytest.mark.parametrize("name", NOTEBOOKS)


@cache
def output(name, folder):
    """Output of the notebook, run as a script in an empty folder."""
    return run_python(NOTEBOOKS[name], cwd=folder).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@all_notebooks
def test_it_is_a_notebook(name):
    """A header with the format, then text, then code; every cell parses as Python by itself."""
    text = NOTEBOOKS[name].read_text()
    head, *cells = re.split(r"^# %%", text, flags=re.MULTILINE)
    assert head.startswith("# ---\n") and "format_name: percent" in head
    assert cells[0].startswith(" [markdown]\n# # ")
    for cell in cells:
        kind, _, body = cell.partition("\n")
        assert kind in ("", " [markdown]"), kind
        if kind:
            assert all(line.startswith("#") or not line for line in body.splitlines()), body
        else:
            assert ast.parse(body).body, body


@pytest.mark.slow
@all_notebooks
def test_it_runs(name, folder):
    assert output(name, folder)


@pytest.mark.slow
def test_the_objectives_table_supports_the_text(folder):
    """DMD loses the map from noise to data; GAD, regression and the notebook's loss keep it."""
    text = output("02_write_your_own_objective", folder)
    rows = {}
    for line in text.splitlines():
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if cells and re.fullmatch(r"[\d.]+", cells[0]):
            rows[label] = [float(cell) for cell in cells]
    assert list(rows) == ["DMD", "DMD + 0.3 GAD", "Regression", "Sobolev (ours)"]
    modes, _, _, cost, error, cosine = zip(*rows.values(), strict=True)
    assert min(modes) == 1
    assert cost[0] > 0.5 and max(cost[1:]) < 0.1
    assert cosine[0] < 0.7 and min(cosine[1:]) > 0.9
    assert error[3] < error[2] < error[0]
    assert (folder / "runs" / "notebooks" / "02_rings.png").stat().st_size > 1000
