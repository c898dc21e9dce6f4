"""Notebooks: jupytext scripts in percent format, and beside them their .ipynb with outputs."""

import ast
import json
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


def source_cells(name):
    """(kind, text) of the cells of a .py."""
    cells = re.split(r"^# %%", NOTEBOOKS[name].read_text(), flags=re.MULTILINE)[1:]
    for cell in cells:
        kind, _, body = cell.partition("\n")
        if kind:
            yield "markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
        else:
            yield "code", body.strip()


def with_outputs(name):
    """Cells of a .ipynb."""
    return json.loads(NOTEBOOKS[name].with_suffix(".ipynb").read_text())["cells"]


def output_texts(cell):
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        yield "".join(output.get("text", data.get("text/plain", "")))


@all_notebooks
def test_the_ipynb_has_the_cells_of_its_source(name):
    """After a change of the .py: python launch/run_notebooks.py NAME."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in with_outputs(name)]
    assert cells == list(source_cells(name))


@all_notebooks
def test_the_ipynb_was_run_top_to_bottom(name):
    code = [cell for cell in with_outputs(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@all_notebooks
def test_the_ipynb_is_small_and_of_no_machine(name):
    """No absolute paths and no addresses in memory in its outputs."""
    assert NOTEBOOKS[name].with_suffix(".ipynb").stat().st_size < 400_000
    for cell in with_outputs(name):
        assert not cell["metadata"]
        for text in output_texts(cell):
            assert not re.search(r"(?<![\w./])/\w[\w.-]*/|0x[0-9a-f]{6}", text), text


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
