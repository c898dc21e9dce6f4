"""The benchmarks run, and their figures of correctness hold; none is about speed."""

import json
import math
import shutil
import time
from functools import partial

import jax
import pytest
from benchmarks import accuracy, attention, kernels, plans, run, training
from benchmarks.common import Figure, Size
from programs import run_python

from gadjax.ops.pallas_gpu import Tile
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


def test_another_device_or_name_is_refused(capfd):
    with pytest.raises(SystemExit, match="gpu: found cpu; expected"):
        run.main(["gpu", "--only", "attention"])
    assert run.main(["gpu"]) == 1  # after the first part
    assert capfd.readouterr().err.count("gpu: found cpu; expected") == 1
    with pytest.raises(SystemExit):
        run.main(["cpu", "--tiny", "--only", "nothing"])


def broken():
    yield Figure("before", 1.0)
    raise RuntimeError("no\nmemory")


def test_a_failed_part_leaves_its_figures_and_those_of_others(monkeypatch, tmp_path, capsys):
    parts = {"first": lambda: iter([Figure("x", 2.0)]), "second": broken}
    monkeypatch.setattr(run, "benchmarks", lambda kind, tiny: parts)
    path = tmp_path / "found.json"
    command = ["cpu", "--tiny", "--json", str(path)]
    assert run.main([*command, "--only", "first"]) == 0
    assert run.main([*command, "--only", "second"]) == run.FAILED
    found = json.loads(path.read_text())
    assert [figure["value"] for figure in found["figures"]["first"]] == [2.0]
    assert [figure["name"] for figure in found["figures"]["second"]] == ["before"]
    assert found["failures"] == {"second": "RuntimeError: no memory"}
    parts["second"] = parts["first"]
    assert run.main([*command, "--only", "second"]) == 0
    assert json.loads(path.read_text())["failures"] == {}
    # A file of another device or other versions is not added to.
    path.write_text(path.read_text().replace('"tiny": true', '"tiny": false'))
    assert run.main([*command, "--only", "second"]) == 0
    assert list(json.loads(path.read_text())["figures"]) == ["second"]


@pytest.mark.slow
def test_parts_are_processes_that_end_alone(monkeypatch, tmp_path, capsys):
    """One crashes, one hangs, one writes why it failed; the last one is run all the same."""
    program = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
name, path = sys.argv[-1], Path(sys.argv[-3])
content = json.loads(path.read_text()) if path.exists() else {"figures": {}, "failures": {}}
content["figures"][name] = 1
content["failures"] |= {"wrong": "ValueError"} if name == "wrong" else {}
path.write_text(json.dumps(content))
if name == "crash": os.kill(os.getpid(), signal.SIGKILL)
if name == "hang":
    subprocess.Popen(["bash", "-c", f"sleep 5.5; touch {path.with_name('late')}"])
    time.sleep(60)
sys.exit(3 if name == "wrong" else 0)
"""
    (tmp_path / "run.py").write_text(program)
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    path = tmp_path / "found.json"
    names = ["crash", "hang", "wrong", "last"]
    assert run.run_in_processes(names, [str(path)], 4.0, path) == 1
    found = json.loads(path.read_text())
    assert list(found["figures"]) == names
    assert found["failures"] == {
        "crash": "ended with exit code -9",
        "hang": "took longer than 4 s",
        "wrong": "ValueError",
    }
    assert "hang: took longer" in capsys.readouterr().out
    time.sleep(2)
    assert not (tmp_path / "late").exists()  # what it had started is ended too


def test_the_fastest_right_tile_gets_into_the_table(monkeypatch, tmp_path):
    """A program that is wrong or fails is no candidate, however fast."""
    taken = {Tile(64): 3.0, Tile(32): 2.0, Tile(128): 1.0}
    known = {}

    def program(tile, *_):
        known[tile] = partial(lambda *_, tile: tile, tile=tile)
        return None if tile == Tile(128) else known[tile]

    monkeypatch.setattr(kernels, "right_program", program)
    monkeypatch.setattr(kernels, "seconds", lambda runs, rounds: {"": taken[runs[""]()]})
    table = tmp_path / "tiles.json"
    table.write_text('{"another card": {"bfloat16": {"72": [32, 4, 2]}}}')
    shapes = ((64, 1, 12),)
    figures = list(kernels.tiles(shapes, ("float32",), 1, table, (Tile(128), Tile(32))))
    assert [figure.value for figure in figures] == [3000.0, 2000.0]
    assert "block 32, 4 warps" in figures[1].note
    found = json.loads(table.read_text())
    assert found["another card"] == {"bfloat16": {"72": [32, 4, 2]}}
    assert found[jax.devices()[0].device_kind] == {"float32": {"12": [32, 4, 2]}}


def test_a_wrong_or_failing_tile_is_left_out():
    inputs, expected = kernels.case((64, 1, 12), "float32")
    assert kernels.right_program(Tile(64), inputs, expected, 1e-4) is not None
    assert kernels.right_program(Tile(64), inputs, [2 * x for x in expected], 1e-4) is None
    assert kernels.right_program(Tile(0), inputs, expected, 1e-4) is None


@pytest.mark.slow
def test_rows_of_the_study_are_read(tmp_path):
    shutil.copy(plans.OUT.parent / "study" / "flow-dmd_none.json", tmp_path)
    cells = "flow/dmd_none", "flow/dmd_reg"
    figures = {figure.name: figure for figure in training.study(cells, 1, 0.0, tmp_path)}
    assert figures["cells finished"].value == 1
    assert 0.5 < figures["flow/dmd_none: seed alignment"].value < 0.7


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
