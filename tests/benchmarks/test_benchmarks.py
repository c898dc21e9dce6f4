"""The benchmarks run, and their figures of correctness hold; none is about speed."""

import json
import math
from functools import partial

import pytest
from benchmarks import accuracy, attention, plans, run
from benchmarks.common import Figure, Size
from programs import run_python

from gadjax.parallel.hardware import find_topology


def test_a_figure_is_held_to_its_aim():
    assert Figure("x", 1.0, most=1.0).holds and Figure("x", 1.0, least=1.0).holds
    assert Figure("x", 2.0, most=1.0).holds is False
    assert Figure("x", math.nan, most=1.0).holds is False
    assert Figure("x", 2.0).holds is None and Figure("x", None, most=1.0).holds is None


def test_a_set_is_printed_and_written(monkeypatch, tmp_path, capsys):
    figures = partial(attention.exactness, ((96, 2, 12),))
    monkeypatch.setattr(run, "benchmarks", lambda kind, tiny: {"attention": figures})
    path = tmp_path / "found.json"
    assert run.main(["cpu", "--tiny", "--only", "attention", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["set"] == "cpu" and found["versions"]["jax"] and found["device"] and found["date"]
    names = [figure["name"] for figure in found["figures"]["attention"]]
    assert len(names) == 3 and all(figure["holds"] for figure in found["figures"]["attention"])
    assert names[0] in capsys.readouterr().out


def test_another_device_or_name_is_refused(monkeypatch):
    with pytest.raises(SystemExit, match="gpu: found cpu; expected"):
        run.main(["gpu"])
    with pytest.raises(SystemExit):
        run.main(["cpu", "--tiny", "--only", "nothing"])


@pytest.mark.slow
def test_a_tangent_in_bfloat16_is_accurate():
    found = {f.name: f for f in accuracy.accuracy(Size(6, 6, 64, 32), ("bfloat16",))}
    held = [name for name, figure in found.items() if figure.aim]
    assert len(held) == 2 and all(found[name].holds for name in held)
    # The finite differences of the released script, for comparison.
    assert found["error of J v: difference h=0.01, bfloat16"].value > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind in ("cpu", "gpu") for name in run.benchmarks(kind, True)]
)
def test_every_benchmark_runs_in_tiny_sizes(kind, name, tmp_path):
    path = tmp_path / "found.json"
    assert run.main([kind, "--tiny", "--only", name, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"][name]
    assert figures and all(math.isfinite(figure["value"]) for figure in figures)


def test_the_table_of_plans_is_that_of_its_files(tmp_path):
    for path in plans.OUT.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    plans.write_table(tmp_path)
    assert (tmp_path / "README.md").read_text() == (plans.OUT / "README.md").read_text()
    assert {path.stem for path in plans.OUT.glob("*.json")} <= plans.ROWS.keys()


def test_a_row_takes_all_chips_of_its_topology():
    for name, row in plans.ROWS.items():
        assert find_topology(row.topology).count == row.data * row.fsdp, name


PLACED = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from benchmarks import placing
placing.dump_to(folder := Path(sys.argv[1]))
from gadjax.parallel.hardware import find_topology
from gadjax.plan.programs import build_programs
from gadjax.plan.traffic import traffic
from gadjax.training.config import read_config
from gadjax.training.setup import prepare
config = read_config(["--config=configs/shapes_gad.py:dmd", "--config.mesh.fsdp=4"])
where = find_topology("v5e:2x2")
programs = build_programs(prepare(config, abstract=True, devices=where.devices()), where)
done = placing.compile_fully(programs, "student", config.batch, print)
text, assignment = placing.reports(folder, "student")
print(json.dumps([
    [done.peak, done.arguments, done.temporary, traffic(done.text, 4).sent],
    [*placing.sizes_of(assignment), traffic(text, 4).sent],
]))
"""


@pytest.mark.slow
def test_placed_buffers_are_those_of_the_finished_program(request, tmp_path):
    pytest.importorskip("libtpu")
    root = request.config.rootpath
    completed = run_python("-c", PLACED, tmp_path, cwd=root, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    expected, placed = json.loads(completed.stdout.splitlines()[-1])
    assert placed == [
        pytest.approx(expected[0], abs=2**18),
        *expected[1:2],
        pytest.approx(expected[2], abs=2**16),
        expected[3],
    ]
