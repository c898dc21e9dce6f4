"""`gadjax train --reproduce-step`: a bit-identical replay and its report."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from formula_run import Texts, prepare_with, write_config
from several import run_on_devices
from train_runs import rows, train

from gadjax.training import loop, replay

ARGUMENTS = "--reproduce-step"


@pytest.fixture(scope="module", autouse=True)
def in_haste():
    """Fast compilation: programs with callbacks are not cached, and are compiled every time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def formulas(monkeypatch):
    """`prepare` of a run without a fault; a test may replace its source."""
    for module in (loop, replay):
        monkeypatch.setattr(module, "prepare", prepare_with(Texts()))


@pytest.fixture(scope="module")
def formula(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def done(formula, tmp_path_factory):
    """The workdir of a run of 8 steps with checkpoints 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "done"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", prepare_with(Texts()))
        assert train(formula, workdir) == 0
    return workdir


def rows_by_step(workdir):
    return {row["step"]: row for row in rows(workdir)}


def files(workdir):
    """Everything in a folder, with times and sizes, which any write would change."""
    paths = sorted(workdir.rglob("*"))
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]


def test_a_replayed_step_is_bit_identical_and_reported(formula, done, capsys):
    before = files(done)
    assert train(formula, done, ARGUMENTS, "7") == 0
    text = capsys.readouterr().out
    assert text.startswith("replaying 0 steps from checkpoint 6\n") and files(done) == before
    assert text.endswith("step 7 is as metrics.jsonl has it, to the last digit\n")
    for name in ("critic/loss", "student/loss", "loss/gad", "student/grad_norm"):
        assert f"  {name}: {rows_by_step(done)[7][name]!r}\n" in text
    critic, student = re.split(r"update \d+, of the ", text)[1:]
    assert critic.startswith("critic\n") and student.startswith("student\n")
    batch = Texts().batch(13 * 8, 8)["which"]
    assert f"  prompts: {', '.join(map(str, batch))}\n" in student
    for name in ("batch", "student", "critic", "teacher", "teacher's tangents"):
        assert f"  {name}: finite\n" in student
    assert "  batch: finite\n" in critic and "NOT" not in text
    # Captions are text that others wrote.
    assert "\x1b" not in text and r"  'a\x1b[31m crab'" in text
    # The groups are the whole: their squares sum to the norm's.
    total, groups = re.search(r"gradient of the student: (\S+)\n((?:    .*\n)+)", student).groups()
    norms = [float(line.split(": ")[1]) for line in groups.splitlines()]
    assert len(norms) == 4 and np.hypot.reduce(norms) == pytest.approx(float(total), rel=1e-5)
    # The losses of a term average to the step's metric; the worst ones come first.
    for name in ("gad", "dmd"):
        loss, block = re.search(rf"term {name}: (\S+);.*\n((?:    .*\n)+)", student).groups()
        worst = [float(line.split()[1]) for line in block.splitlines()]
        assert worst == sorted(worst, reverse=True) and len(worst) == 5
        assert (
            worst[0]
            >= float(loss)
            == pytest.approx(rows_by_step(done)[7][f"loss/{name}"], rel=1e-6)
        )


@pytest.mark.slow
def test_a_step_with_offloaded_moments(formula, tmp_path, capsys):
    offload, workdir = "--config.offload=('optimizer','ema')", tmp_path / "run"
    assert train(formula, workdir, offload, "--config.steps=4") == 0
    assert train(formula, workdir, offload, "--config.steps=4", ARGUMENTS, "4") == 0
    out = capsys.readouterr().out
    assert "replaying 0 steps from checkpoint 3\n" in out
    assert "  gradient of the student: " in out and "step 4 is as metrics.jsonl has it" in out


def test_a_step_that_differs_is_reported(formula, done, tmp_path, capsys):
    workdir = tmp_path / "changed"
    workdir.mkdir()
    (workdir / "config.json").symlink_to(done / "config.json")
    row = rows_by_step(done)[2]
    row["loss/gad"] = np.nextafter(np.float32(row["loss/gad"]), np.float32(9)).item()
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 8, "lo')
    assert train(formula, workdir, ARGUMENTS, "2") == 0
    out = capsys.readouterr().out
    assert out.startswith("replaying 1 step from the start\n")
    assert "step 2 differs from metrics.jsonl in loss/gad:" in out
    assert f"(it was {row['loss/gad']})" in out


@pytest.mark.slow
def test_a_skipped_update_is_reproduced(formula, tmp_path, capsys, monkeypatch):
    """Prompt 4 is not a number from update 8 on: step 5's critic, the first that draws it."""
    for module in (loop, replay):
        monkeypatch.setattr(module, "prepare", prepare_with(Texts(bad=4, since=8 * 8)))
    workdir = tmp_path / "run"
    assert train(formula, workdir, "--config.stop_after_bad=2", "--config.log.every=3") == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"gadjax: stopped: step 6: the last 2 updates of the critic were not finite and were "
        r"skipped, the newest for critic/loss of prompts 4(, 4)*; expected finite losses \(lower "
        r"optim.lr, or debug it with --reproduce-step 6\)",
        error,
    )
    # The first one is logged when it happens, whatever log.every is.
    log = (workdir / "train.log").read_text()
    for line in ("critic was not finite and was skipped: critic/loss", "student was not finite"):
        assert f"step 5: an update of the {line}" in log
    assert json.loads((workdir / "status.json").read_text())["step"] >= 6
    before = files(workdir)
    assert train(formula, workdir, "--config.stop_after_bad=2", "--config.log.every=3",
                 ARGUMENTS, "6") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert out.startswith("replaying 2 steps from checkpoint 3\n")
    assert out.count("  skipped, for ") == 2 and files(workdir) == before
    student = out.partition("of the student\n")[2]
    assert "skipped, for loss/dmd, loss/gad of prompts 4" in student
    for name in ("batch", "teacher", "student"):
        assert re.search(rf"^  {name}: \d+ of \d+ NOT finite$", student, re.MULTILINE), name
    assert re.search(r"term gad: nan; the worst of prompts\n    4: nan  'a whale'\n", student)
    assert "step 6 is as metrics.jsonl has it, to the last digit" in out


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("0", "--reproduce-step: found '0'; expected a step, 1 or more"),
        ("-3", "--reproduce-step"),
        ("2.5", "--reproduce-step: found '2.5'"),
        ("", "--reproduce-step: found ''"),
        ("9", "--reproduce-step: found 9; expected 1 to 8"),
        ("9" * 40, "--reproduce-step: found '999"),
    ],
)
def test_bad_steps_are_one_line(formula, done, capsys, step, words):
    before = files(done)
    assert train(formula, done, f"{ARGUMENTS}={step}") == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1 and files(done) == before


def test_bad_workdirs_are_one_line_and_left_alone(formula, done, tmp_path, capsys):
    for more, words in (
        ([str(tmp_path / "none")], "none: found no such folder; expected a workdir"),
        ([str(tmp_path)], "found no config.json; expected a workdir"),
        ([str(done), "--config.seed=3"], "seed"),
        ([str(done), "--profile=1:1"], "--profile: found it beside --reproduce-step"),
    ):
        assert train(formula, *more, ARGUMENTS, "1") == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_skipped(formula, done, tmp_path, monkeypatch, capsys, caplog):
    """Three steps are replayed instead, bit-identically."""
    workdir = tmp_path / "damaged"
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "checkpoints/3"):
        (workdir / name).symlink_to(done / name)
    before = files(workdir)
    monkeypatch.chdir(tmp_path)
    assert train(formula, Path("damaged"), ARGUMENTS, "7") == 0
    assert "checkpoints/6: damaged checkpoint skipped" in caplog.text
    out = capsys.readouterr().out
    assert out.startswith("replaying 3 steps from checkpoint 3\n")
    assert "step 7 is as metrics.jsonl has it" in out and files(workdir) == before


@pytest.mark.slow
def test_on_a_mesh_with_microbatches(tmp_path):
    run_on_devices(4, __file__, tmp_path)


def main(folder: Path) -> None:
    """Prompt 4 is not a number from update 3 on, which is step 2's student's."""
    for module in (loop, replay):
        module.prepare = prepare_with(Texts(bad=4, since=3 * 8))
    config, workdir = write_config(folder), folder / "run"
    more = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.microbatch=4"]
    more += ["--config.steps=2"]
    assert train(config, workdir, *more) == 0
    before = files(workdir)
    assert train(config, workdir, *more, ARGUMENTS, "2") == 0
    assert files(workdir) == before
    assert (
        "student was not finite and was skipped: loss/dmd, loss/gad of prompts 4"
        in (workdir / "train.log").read_text()
    )


@pytest.mark.slow
def test_of_a_pipeline(config, tmp_path, monkeypatch, capsys):
    """Real networks: text encoder, transformer, the prompts of a file."""
    monkeypatch.undo()
    variant = f"{config}:tdm"
    assert train(variant, tmp_path / "run") == 0
    capsys.readouterr()
    assert train(variant, tmp_path / "run", ARGUMENTS, "4") == 0
    out = capsys.readouterr().out
    assert out.startswith("replaying 1 step from checkpoint 2\n") and "'green square'" in out
    assert out.endswith("step 4 is as metrics.jsonl has it, to the last digit\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
