"""Students that train some of their steps, with another network for the steps before."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import FLOW_WORLD, make_batch
from several import run_on_devices
from train_runs import losses, read_vector, rows, train
from workdirs import make_workdir

from gadjax import load, sample
from gadjax.api import with_sampling
from gadjax.cli.main import main
from gadjax.diffusion.experts import Experts
from gadjax.diffusion.rollout import rollout
from gadjax.errors import InputError
from gadjax.models.params import flatten
from gadjax.objectives import GAD, Anchor
from gadjax.training.backward_simulation import backward_simulate, draw_steps, trained_steps
from gadjax.training.config import read_config
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare
from gadjax.training.workdir import parse_run_metadata

FIRST_OF_TWO = {"steps": 2, "trained_steps": (0, 1)}
FIRST = ("--config.student.trained_steps=(0, 1)",)
SECOND = "--config.student.trained_steps=(1, 2)"
TERM = 1.0 * GAD(steps=1)


def spec(steps=(), **more):
    return FLOW_WORLD.step_spec(TERM, trained_steps=steps, **more)


@pytest.mark.parametrize("steps", [(0, 2), (2, 4), (1, 3), (3, 4), (0, 1), (0, 4)])
def test_steps_are_drawn_evenly_among_those_and_start_where_the_student_came(steps):
    """Against a rollout of all steps, with neighbours that share one and without."""
    with jax.enable_x64():
        batch = make_batch(12, dtype=float)
        student = FLOW_WORLD.student_params(bend=0.2, dtype=float)
        step_B = draw_steps(spec(steps), batch)
        first, end = steps
        counts = np.bincount(np.asarray(step_B), minlength=end)
        assert set(counts[first:]) == {12 // (end - first)} and not counts[:first].any()
        whole = rollout(
            lambda x, t: FLOW_WORLD.denoiser(student, x, t, batch.cond),
            FLOW_WORLD.schedule,
            batch.noise,
            jnp.asarray(FLOW_WORLD.times),
        ).x[step_B, np.arange(12)]
        for shards in (1, 12):
            found = backward_simulate(spec(steps, batch_shards=shards), student, batch, step_B)
            np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-12)


def test_without_the_setting_all_are_drawn():
    assert trained_steps(spec()) == (0, 4) and trained_steps(spec((1, 3))) == (1, 3)


def test_an_anchor_counts_the_steps_that_are_drawn():
    """Two of four: the anchor's weight is 2 at the first of them, the base's 2 at the second."""
    term = Anchor(target="x0", steps=1) + TERM
    batch = make_batch(8)
    student, teacher = (FLOW_WORLD.student_params(bend=b) for b in (0.2, 0.0))
    context = make_context(spec((0, 2)), term.needs, Roles(student, teacher), batch)
    (first,) = context.first_step.values()
    is_first = np.asarray(context.step_B) == 0
    np.testing.assert_array_equal(first.weight_B, 2.0 * is_first)
    np.testing.assert_array_equal(context.base_weight_B, 2.0 * ~is_first)


def test_the_earlier_expert_takes_the_steps_before():
    """Latents, and a drawn step that is the late expert's alone: with gradient for it only."""
    with jax.enable_x64():
        batch = make_batch(8, dtype=float)
        early, late, teacher = (
            FLOW_WORLD.student_params(bend=b, dtype=float) for b in (0.2, -0.1, 0.0)
        )
        experts = Experts(early, late, 800.0)
        step_spec = spec((2, 4))

        def drawn(params):
            context = make_context(step_spec, TERM.needs, Roles(params, teacher), batch)
            return context.student[0].x0, (context.x_BHWC, context.t_B)

        x0, vjp, (x, t_B) = jax.jit(lambda p: jax.vjp(drawn, p, has_aux=True))(experts)
        assert np.all(np.asarray(t_B) < 800)

        def by_hand(x, t):
            return FLOW_WORLD.denoiser(early if t[0] > 800 else late, x, t, batch.cond)

        latents, at = [batch.noise], FLOW_WORLD.times
        for t, s in zip(at[:3], at[1:], strict=False):
            predicted = by_hand(latents[-1], jnp.full(8, t))
            alpha, sigma = FLOW_WORLD.schedule.alpha_sigma(s)
            latents.append(alpha * predicted.x0 + sigma * predicted.eps)
        expected = jnp.stack(latents)[draw_steps(step_spec, batch), np.arange(8)]
        np.testing.assert_allclose(x, expected, rtol=1e-12)
        np.testing.assert_allclose(x0, FLOW_WORLD.denoiser(late, x, t_B, batch.cond).x0, rtol=1e-12)
        (grads,) = vjp(jnp.ones_like(x0))
        assert all(not np.any(g) for g in jax.tree.leaves(grads.early))
        assert any(np.any(g) for g in jax.tree.leaves(grads.late))


@pytest.fixture(scope="module")
def first(tiny_pipeline, tmp_path_factory):
    """A student that was trained on the first of two steps; its weights are noisy."""
    folder = tmp_path_factory.mktemp("experts") / "first"
    return make_workdir(folder, tiny_pipeline, timesteps=(900, 400), student=FIRST_OF_TWO)


def second(first):
    return SECOND, f"--config.student.earlier_expert={first}"


@pytest.fixture(scope="module")
def trained(config, first, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("experts") / "second"
    preview = "--config.preview.every=2"
    assert train(f"{config}:tdm", workdir, *second(first), preview) == 0
    return workdir


def test_a_run_holds_the_earlier_expert_once_and_trains_the_other(config, first, tiny_pipeline):
    flags = [f"--config={config}:tdm", *second(first)]
    run = prepare(read_config(flags))
    expert = load(first).params["transformer"]
    held = run.frozen["earlier"]
    assert held.boundary == 650 and held.late is None
    assert all(np.array_equal(flatten(held.early)[k], v) for k, v in flatten(expert).items())
    teacher = flatten(load(tiny_pipeline).params["transformer"])
    start = flatten(run.initial_params["student"])
    assert all(np.array_equal(v, teacher[k]) for k, v in start.items())
    abstract = prepare(read_config(flags), abstract=True).frozen["earlier"].early
    shapes = jax.tree.map(lambda x: x.shape, held.early)
    assert jax.tree.map(lambda x: x.shape, abstract) == shapes
    assert run.inputs["student.earlier_expert"] == load(first).fingerprint


@pytest.mark.slow
def test_it_is_previewed_and_sampled_with_both(trained, first, tmp_path):
    """A loaded model's pictures are those of a pipeline with both networks' parameters."""
    assert len(list((trained / "previews").glob("*.png"))) == 3
    model, late = load(trained), load(first)
    experts = model.params["transformer"]
    assert isinstance(experts, Experts) and experts.boundary == 650
    expert = flatten(late.params["transformer"])
    assert all(np.array_equal(flatten(experts.early)[k], v) for k, v in expert.items())
    drawn = sample(model, ["red circle"] * 4)
    only_late = replace(model, params=model.params | {"transformer": experts.late})
    assert np.any(drawn != sample(only_late, ["red circle"] * 4))
    assert np.any(drawn != sample(late, ["red circle"] * 4))
    out = str(tmp_path / "out")
    assert main(["export", "--workdir", str(trained), "--out", out]) == 0
    exported = load(out)
    assert exported.fingerprint == model.fingerprint
    np.testing.assert_array_equal(
        sample(exported, ["red circle"] * 4), sample(only_late, ["red circle"] * 4)
    )
    card = (Path(out) / "README.md").read_text()
    assert "steps 2 to 2 of 2" in card and "first" in card


@pytest.mark.slow
def test_it_resumes_to_the_bit_and_with_the_same_expert_alone(
    config, first, trained, tmp_path, capsys
):
    expert, again = tmp_path / "expert", tmp_path / "again"
    shutil.copytree(first, expert)
    flags = f"{config}:tdm", again, *second(expert)
    assert train(*flags, "--config.steps=2") == 0
    assert train(*flags) == 0
    for part in ("student", "critic", "ema"):
        np.testing.assert_array_equal(read_vector(again, part), read_vector(trained, part))
    shutil.rmtree(expert / "checkpoints" / "2")
    assert train(*flags, "--config.steps=5") == 2
    assert "student.earlier_expert" in capsys.readouterr().err


@pytest.mark.slow
def test_microbatches_are_the_batch(config, first, trained, tmp_path):
    more = *second(first), "--config.microbatch=4", "--config.steps=2"
    assert train(f"{config}:tdm", tmp_path / "run", *more) == 0
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(losses(trained)[step], rel=1e-5)


def away_from_the_teacher(config, first, start) -> tuple[str, ...]:
    """Flags of a regression that starts at another student: the loss is of the size of what it
    compares, and not a small difference, of which float32 keeps few digits."""
    init = f"--config.student.init={start}"
    return f"{config}:regression", *second(first), init, "--config.steps=2"


def worker(config: str, first: str, start: str, out: str) -> None:
    """Train on all devices, in float32."""
    assert len(jax.devices()) == 8
    mesh = "--config.mesh.data=2", "--config.mesh.fsdp=4"
    config, *more = away_from_the_teacher(config, first, start)
    assert train(config, Path(out), *more, *mesh) == 0


@pytest.mark.slow
def test_eight_devices_do_what_one_does(config, first, tiny_pipeline, tmp_path):
    steps = {"steps": 2}
    start = make_workdir(tmp_path / "start", tiny_pipeline, timesteps=(900, 400), student=steps)
    alone, eight = tmp_path / "one", tmp_path / "eight"
    variant, *more = away_from_the_teacher(config, first, start)
    assert train(variant, alone, *more) == 0
    run_on_devices(8, __file__, config, first, start, eight)
    for step, loss in losses(eight).items():
        assert loss == pytest.approx(losses(alone)[step], rel=1e-5)
    found, expected = (rows(workdir)[1]["student/grad_norm"] for workdir in (eight, alone))
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_expert_of_an_expert(config, tiny_pipeline, tmp_path):
    """Three networks; one of another grid, or of the same steps, is refused."""
    grid, steps = {"timesteps": (900, 600, 300)}, {"steps": 3}
    of_one = steps | {"trained_steps": (0, 1)}
    one = make_workdir(tmp_path / "one", tiny_pipeline, student=of_one, **grid)
    more = steps | {"trained_steps": (1, 2), "earlier_expert": str(one)}
    two = make_workdir(tmp_path / "two", tiny_pipeline, student=more, **grid)
    flags = f"--config={config}:tdm", f"--config.student.earlier_expert={two}"
    three = "--config.student.steps=3", "--config.student.trained_steps=(2, 3)"
    run = prepare(read_config([*flags, *three, "--config.student.timesteps=(900, 600, 300)"]))
    outer = run.frozen["earlier"]
    assert (outer.boundary, outer.early.boundary) == (450, 750)
    assert len(run.inputs["student.earlier_expert"].split()) == 2
    with pytest.raises(InputError, match="earlier_expert: found .* an expert of steps"):
        prepare(read_config([*flags, *three, "--config.student.timesteps=(900, 500, 300)"]))
    again = f"--config.student.earlier_expert={two}", "--config.student.trained_steps=(1, 2)"
    times = "--config.student.steps=3", "--config.student.timesteps=(900, 600, 300)"
    with pytest.raises(InputError, match="earlier_expert: found .* an expert of steps"):
        prepare(read_config([f"--config={config}:tdm", *times, *again]))


@pytest.mark.parametrize(
    "changes",
    [
        {"trained_steps": (1,)},
        {"trained_steps": (1, 0)},
        {"trained_steps": (0, 3)},
        {"trained_steps": (0.0, 1)},
        {"trained_steps": 1},
        {"earlier_expert": "runs/first"},
        {"earlier_expert": "runs/first", "trained_steps": (0, 1)},
        {"earlier_expert": 1, "trained_steps": (1, 2)},
    ],
)
def test_metadata_that_no_run_writes_is_refused(first, changes):
    config = json.loads((first / "config.json").read_text())
    parse_run_metadata({"config": config, "teacher": "f"}, "here")
    config["student"] |= changes
    with pytest.raises(InputError, match="here: found another config"):
        parse_run_metadata({"config": config, "teacher": "f"}, "here")


@pytest.mark.slow
def test_what_is_of_one_network_is_refused(first, trained, tiny_pipeline, tmp_path, capsys):
    with pytest.raises(InputError, match="lora: found style .*, experts; expected none"):
        load(trained, lora=["style"])
    with pytest.raises(InputError, match="nasa: found 0.5 for .*, experts; expected one network"):
        with_sampling(load(trained), negative="red", nasa=0.5)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red circle\n")
    command = ["repair", "--teacher", tiny_pipeline, "--student", first, "--prompts", prompts]
    assert main([*map(str, command), "--out", str(tmp_path / "out")]) == 2
    assert "an expert of steps (0, 1); expected a student of all" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--config.student.trained_steps=(1, 1)",), r"trained_steps: found \(1, 1\); expected"),
        (("--config.student.trained_steps=(0, 3)",), r"trained_steps: found \(0, 3\); expected"),
        (("--config.student.trained_steps=(0, 1.5)",), r"trained_steps: found \(0, 1.5\)"),
        (("--config.student.trained_steps=(1,)",), r"trained_steps: found \(1,\); expected"),
        (("--config.student.earlier_expert=/nowhere",), "earlier_expert: found '/nowhere'"),
        (("--config.student.earlier_expert=asset:shapes_teacher",), r"trained_steps: found \(\)"),
        (
            ("--config.student.earlier_expert=asset:shapes_teacher", *FIRST),
            r"trained_steps: found \(0, 1\); expected the steps after",
        ),
        (
            (
                "--config.student.earlier_expert=asset:shapes_teacher",
                SECOND,
                "--config.student.redraw=(0.1, 0.9)",
            ),
            r"student.redraw: found \(0.1, 0.9\) and an earlier expert",
        ),
        (
            (*FIRST, "--config.objective={'dmd': {'backprop': 'all'}}"),
            r"trained_steps: found \(0, 1\) and a loss of all steps, or of none",
        ),
        (
            (*FIRST, "--config.objective={'consistency': {}}"),
            r"trained_steps: found \(0, 1\) and a loss of all steps, or of none",
        ),
        (
            (SECOND, "--config.objective={'dmd': {}, 'anchor': {}}"),
            r"trained_steps: found \(1, 2\) and a loss of the first step",
        ),
        (
            (*FIRST, "--config.objective={'dmd': {}, 'anchor': {}}"),
            r"trained_steps: found \(0, 1\) and an anchor; expected another step",
        ),
    ],
)
def test_bad_settings(config, flags, message):
    with pytest.raises(InputError, match=message):
        prepare(read_config([f"--config={config}:tdm", *flags]), abstract=True)


if __name__ == "__main__":
    worker(*sys.argv[1:])
