"""Frozen networks by source, the student's start, and what steps have beside them: grids drawn
anew, latents of the data, a critic that follows, memories of terms."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import DDPM_WORLD, FLOW_WORLD, gaussian_params, make_batch, mixture_params
from formula_steps import NETWORKS, STEP_SPEC, B, equal, start
from train_runs import read_vector, rows, train
from workdirs import make_workdir

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.diffusion.rollout import rollout
from gadjax.errors import InputError
from gadjax.objectives import DMD, GAD, TERMS, Needs, Sum, build
from gadjax.objectives.compose import Addable
from gadjax.parallel.sharding import shapes_with_shardings
from gadjax.training.backward_simulation import draw_grid
from gadjax.training.config import default_config, with_absolute_paths
from gadjax.training.context import Roles, make_context
from gadjax.training.setup import prepare
from gadjax.training.state import create_state
from gadjax.training.steps import student_step
from gadjax.training.workdir import read_trained


@pytest.fixture(scope="module")
def workdir(tiny_pipeline, tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("sources") / "run", tiny_pipeline)


@pytest.fixture
def short(tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red circle\ngreen square\n")
    config = default_config()
    config.teacher = str(tiny_pipeline)
    config.data.update(prompts=str(prompts), length=8)
    config.batch = 2
    return config


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_every_source_is_read_once_and_held_once(short, workdir):
    """The teacher's own weights under whatever name; a workdir's EMA, or a part of a step."""
    path = (
        f"{workdir}@student@1",
        str(workdir),
        str(workdir),
        str(short.teacher),
        "teacher",
        "start",
    )
    short.objective = {"disback": {"path": path}}
    run = prepare(short)
    assert list(run.sources.values()) == [*path[:4], "transformer", "transformer"]
    assert set(run.frozen) >= {"transformer", *path[:4]} and "start" not in run.frozen
    networks = run.networks(run.frozen)
    assert networks["disback/1"] is networks["disback/2"]
    assert networks["disback/4"] is networks["disback/5"] is networks["teacher"]
    assert same(networks["disback/0"], read_trained(workdir, "student", 1).params)
    assert same(networks["disback/1"], read_trained(workdir).params)
    assert run.inputs["objective.disback.path"].count(" ") == 3
    assert same(networks["disback/3"], networks["teacher"])


def test_a_student_starts_where_it_is_told_and_its_critic_at_the_teacher(short, workdir):
    short.objective = {"disback": {"path": ("start",)}}
    short.student.init = str(workdir)
    run = prepare(short)
    state = jax.jit(run.start)(run.initial_params)
    trained, teacher = read_trained(workdir).params, run.frozen["transformer"]
    assert same(state.params["student"], trained) and same(state.ema, trained)
    assert same(state.params["critic"], teacher) and not same(trained, teacher)
    assert same(run.networks(run.frozen)["disback/0"], trained)
    assert run.inputs["student.init"] != run.fingerprint
    short.student.init = "teacher"
    run = prepare(short)
    assert list(run.initial_params) == ["student"] and "student.init" not in run.inputs
    assert same(jax.jit(run.start)(run.initial_params).params["critic"], teacher)


@pytest.mark.parametrize(
    "source,message",
    [
        ("nowhere", "objective.disback.path: found 'nowhere'; expected a diffusers folder, a"),
        (
            "{workdir}@other",
            "objective.disback.path: found '{workdir}@other'; expected WORKDIR@PART",
        ),
        ("{workdir}@ema@x", "objective.disback.path: found '{workdir}@ema@x'; expected WORKDIR@"),
        ("{workdir}@critic", "found no critic; expected a run that trains one"),
        ("{workdir}@ema@7", "found 2, 1; expected 7"),
        (
            "asset:shapes_teacher",
            "asset:shapes_teacher: found a PixArtTransformer2DModel of another",
        ),
    ],
)
def test_refused_sources(short, workdir, source, message):
    short.objective = {"disback": {"path": (source.format(workdir=workdir),)}}
    with pytest.raises(InputError) as error:
        prepare(short)
    assert message.format(workdir=workdir) in str(error.value) and "\n" not in str(error.value)


def test_a_network_of_another_schedule_is_refused(short):
    short.teacher, short.data.length = "asset:shapes_flow_teacher", 16
    short.data.prompts = "asset:shapes_prompts.txt"
    short.student.timesteps = (999.0, 749.25, 499.5, 249.75)
    short.objective = {"disback": {"path": ("asset:shapes_teacher",)}}
    with pytest.raises(InputError, match="found DDPM.* and 'eps'; expected Flow.* and 'flow'"):
        prepare(short)


def test_two_terms_with_a_network_of_one_name():
    config = {"disback": {"path": ("a",)}, "disback_2": {"path": ("b",)}}
    with pytest.raises(InputError, match="the network 'disback/0' from a and from b; expected one"):
        build(config, TERMS, FLOW_WORLD.times[:-1])


def test_sources_are_absolute_in_a_workdirs_config(tiny_pipeline, tmp_path, monkeypatch):
    config = default_config()
    config.student.init = "one"
    config.objective = {"disback": {"path": ("runs/a@critic@3", "teacher", "asset:shapes_teacher")}}
    monkeypatch.chdir(tmp_path)
    absolute = with_absolute_paths(config)
    assert absolute.student.init == str(tmp_path / "one")
    expected = str(tmp_path / "runs" / "a@critic@3"), "teacher", "asset:shapes_teacher"
    assert tuple(absolute.objective.disback.path) == expected
    assert with_absolute_paths(absolute) == absolute


@pytest.mark.slow
def test_a_run_with_other_networks_resumes_to_the_bit(config, workdir, tmp_path, capsys):
    more = (
        f"--config.student.init={workdir}",
        "--config.critic.follow=0.1",
        "--config.student.redraw=(0.2,0.9)",
    )
    assert train(config, tmp_path / "whole", *more) == 0
    assert train(config, tmp_path / "parts", *more, "--config.steps=2") == 0
    assert train(config, tmp_path / "parts", *more) == 0
    for part in ("student", "ema", "critic"):
        whole, parts = (read_vector(tmp_path / name, part) for name in ("whole", "parts"))
        np.testing.assert_array_equal(whole, parts)
    assert "loss/dmd" in rows(tmp_path / "whole")[-1]
    assert train(config, tmp_path / "parts", *more[1:]) == 2
    assert "student.init: found" in capsys.readouterr().err


FEW = replace(STEP_SPEC, objective=Sum(((1.0, DMD()),)), redraw=(0.25, 0.95))


def test_grids_are_drawn_anew_for_every_sample():
    """First and last times stay, inner ones fall, uniform between the shares of the span."""
    batch = make_batch(4096)
    grid = np.asarray(draw_grid(FEW, batch))
    first, *_, clean = FEW.times
    assert grid.shape == (5, 4096) and set(grid[0]) == {first} and set(grid[-1]) == {clean}
    assert np.all(np.diff(grid, axis=0) <= 0)
    shares = np.sort((grid[1:-1].ravel() - clean) / (first - clean))
    even = 0.25 + 0.7 * (np.arange(len(shares)) + 0.5) / len(shares)
    np.testing.assert_allclose(shares, even, atol=0.02)
    again = np.asarray(draw_grid(FEW, make_batch(8)._replace(key=batch.key[8:16])))
    np.testing.assert_array_equal(again, grid[:, 8:16])
    assert draw_grid(STEP_SPEC, batch) is None


@pytest.mark.parametrize("world", [FLOW_WORLD, DDPM_WORLD], ids=["flow", "ddpm"])
def test_a_drawn_step_starts_where_its_own_grid_has_led(world):
    """For each sample alone: a rollout along its grid, up to its step."""
    step_spec = world.step_spec(DMD(), redraw=(0.25, 0.95))
    student, batch = world.student_params(bend=0.2), make_batch(8)

    @jax.jit
    def run():
        roles = Roles(student, gaussian_params(), mixture_params(3))
        context = make_context(step_spec, DMD().needs, roles, batch)
        predict = partial(world.denoiser, student)
        trajectory = rollout(
            lambda x, t: predict(x, t, batch.cond), world.schedule, batch.noise, context.grid_NB
        )
        return context.grid_NB, context.step_B, context.t_B, context.x_BHWC, trajectory.x

    grid, step, t, x, states = map(np.asarray, run())
    assert set(step) == {0, 1, 2, 3}
    for i, k in enumerate(step):
        assert t[i] == grid[k, i]
        np.testing.assert_allclose(x[i], states[k, i], rtol=1e-5, atol=1e-5)


def test_latents_of_the_data_are_noised_to_the_drawn_steps():
    world, rng = FLOW_WORLD, np.random.default_rng(0)
    batch = make_batch(8)
    batch = batch._replace(x0=jnp.asarray(rng.normal(size=batch.noise.shape), jnp.float32))
    step_spec = world.step_spec(DMD(), latents="data")
    roles = Roles(world.student_params(), gaussian_params(), mixture_params(3))
    context = make_context(step_spec, DMD().needs, roles, batch)
    sigma = np.asarray(context.t_B)[:, None, None, None] / 1000
    expected = (1 - sigma) * np.asarray(batch.x0) + sigma * np.asarray(batch.noise)
    np.testing.assert_allclose(context.x_BHWC, expected, rtol=1e-6, atol=1e-6)


def test_a_critic_takes_over_its_share_of_the_student():
    """After the student's update, and not after one that was skipped."""
    step_spec = replace(STEP_SPEC, critic_follow=0.25, objective=1.0 * DMD())
    plain = replace(step_spec, critic_follow=0.0)
    params = FLOW_WORLD.student_params(bend=0.2)
    old = create_state({"student": params, "critic": jax.tree.map(jnp.ones_like, params)},
                       STEP_SPEC.optimizers)  # fmt: skip

    @partial(jax.jit, static_argnums=0)
    def update(follows, batch):
        return student_step(step_spec if follows else plain, old, NETWORKS, batch)[0]

    new, other = update(True, make_batch(B)), update(False, make_batch(B))
    assert equal(new.params["student"], other.params["student"])
    assert equal(other.params["critic"], old.params["critic"])
    expected = jax.tree.map(
        lambda c, s: c + 0.25 * (s - c), old.params["critic"], new.params["student"]
    )
    for a, b in zip(*map(jax.tree.leaves, (new.params["critic"], expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    batch = make_batch(B)
    bad = update(True, batch._replace(noise=batch.noise.at[0].set(jnp.nan)))
    assert equal(bad.params["critic"], old.params["critic"]) and int(bad.bad["student"]) == 1


@dataclass(frozen=True)
class Counted(Addable):
    """Mean of the squares so far, over all samples that were seen: the memory."""

    needs = Needs(student=True)

    def init_memory(self):
        return {"sum": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}

    def __call__(self, context):
        size_B = jnp.mean(context.student[0].x0 ** 2, (1, 2, 3))
        seen = context.memory["sum"] / jnp.maximum(context.memory["count"], 1)
        return size_B + seen, {"size_B": size_B, "seen": seen}

    def remember(self, memory, metrics):
        size_B = metrics["size_B"]
        return {"sum": memory["sum"] + size_B.sum(), "count": memory["count"] + len(size_B)}


def remembering(**more):
    names = {"names": ("counted",)}
    objective = Sum(((1.0, Counted()),), **names)
    optimizers = {"student": optax.sgd(1e-2)}
    step_spec = FLOW_WORLD.step_spec(objective, optimizers=optimizers, **more)
    params = {"student": FLOW_WORLD.student_params(bend=0.2)}
    return step_spec, create_state(params, optimizers, objective.init_memory())


def test_a_term_remembers_the_whole_batch():
    """In microbatches as at once; and nothing of an update that was skipped."""
    batch, ends = make_batch(8), []
    for parts in (1, 4):
        step_spec, state = remembering(microbatches=parts)
        update = jax.jit(partial(student_step, step_spec))
        seen = []
        for _ in range(2):
            state, metrics = update(state, {}, batch)
            seen.append(float(metrics["counted/seen"]))
        memory = state.memory["counted"]
        assert seen[0] == 0 and seen[1] > 0 and int(memory["count"]) == 16
        ends.append((seen[1], float(memory["sum"])))
        skipped, _ = update(state, {}, batch._replace(noise=batch.noise.at[0].set(jnp.nan)))
        assert equal(skipped.memory["counted"], memory)
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)


def test_a_memory_is_saved_and_restored(tmp_path):
    step_spec, first = remembering()
    state, _ = jax.jit(partial(student_step, step_spec))(first, {}, make_batch(8))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {"note": 1})
    shardings = jax.tree.map(lambda x: x.sharding, state)
    _, restored, _ = checkpoints.restore(shapes_with_shardings(first, shardings))
    checkpoints.close()
    assert equal(restored, state) and int(restored.memory["counted"]["count"]) == 8
    plain = create_state({"student": first.params["student"]}, step_spec.optimizers)
    assert plain.memory == {}


def test_terms_without_a_memory_have_none():
    total = DMD() + 0.5 * GAD()
    assert total.init_memory() == {} and start().memory == {}


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"student.redraw": (0.5, 0.2)},
            "student.redraw: found (0.5, 0.2); expected two shares in",
        ),
        ({"student.redraw": (0.5,)}, "student.redraw: found (0.5,); expected two shares in order"),
        ({"student.latents": "other"}, "student.latents: found 'other'; expected"),
        ({"student.latents": "data"}, "data.world, data.images, data.latents: found nothing"),
        ({"critic.follow": 1.5}, "critic.follow: found 1.5; expected a share from 0 to 1"),
        (
            {"student.init": "nowhere"},
            "student.init: found 'nowhere'; expected 'teacher', 'random'",
        ),
    ],
)
def test_refused_settings(short, changes, message):
    short.objective = {"dmd": {}}
    for key, value in changes.items():
        group, name = key.split(".")
        short[group][name] = value
    with pytest.raises(InputError) as error:
        prepare(short)
    assert str(error.value).startswith(message)


def test_refused_without_what_they_change(short):
    short.objective = {"regression": {}}
    short.critic.follow = 0.1
    with pytest.raises(InputError, match="^critic.follow: found 0.1; expected 0 in a run without"):
        prepare(short)
    short.objective = {"dmd": {}}
    short.student.lora.rank, short.critic.lora.rank = 2, 0
    with pytest.raises(InputError, match="^critic.follow: found 0.1 and adapters of the student"):
        prepare(short)
    short.student.lora.rank, short.critic.lora.rank = 0, None
    short.critic.follow = 0.0
    short.student.update(redraw=(0.2, 0.9), steps=1, timesteps=(899,))
    with pytest.raises(InputError, match="^student.redraw: found one step; expected at least 2"):
        prepare(short)
