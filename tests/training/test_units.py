"""Counts of steps, updates and samples in runs with several critic updates per step."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formula_run import Texts, prepare_with, write_config
from train_runs import rows, train

from gadjax.checkpoints.steps import committed_steps
from gadjax.objectives import Denoising
from gadjax.ops.flops import flops
from gadjax.parallel.sharding import put_on_mesh
from gadjax.seeds import make_key
from gadjax.training import loop
from gadjax.training.backward_simulation import stratified_step_indices
from gadjax.training.batch import make_batch
from gadjax.training.compile import compile_steps
from gadjax.training.config import read_config
from gadjax.training.loop import host_batches, restore_or_init
from gadjax.training.nonfinite import Update, merge_scalars
from gadjax.training.previews import Preview
from gadjax.training.run_record import write_record
from gadjax.training.setup import update_order

B, UPDATES = 8, 3  # of the critic for one of the student


@pytest.fixture(scope="module", autouse=True)
def in_haste():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def run(path):
    config = read_config([f"--config={path}", f"--config.critic.updates={UPDATES}"])
    return prepare_with(Texts())(config)


@pytest.fixture(scope="module")
def two_steps(run):
    """The states and the updates of two steps: [(number, prompts, state, metrics)]."""
    steps = compile_steps(run)
    _, state = restore_or_init(run, steps, lambda shapes: None)
    frozen, batches, result = (
        put_on_mesh(run.frozen, steps.frozen),
        host_batches(run, steps, 0, 2),
        [],
    )
    for _ in range(2):
        for step in steps.order:
            number, batch = next(batches)
            state, metrics = step(state, frozen, batch, number)
            result.append(jax.device_get((number, batch["which"], state, metrics)))
    assert next(batches, None) is None
    return result


def test_a_step_is_the_critics_updates_and_one_of_the_student(two_steps):
    roles = ["critic", "critic", "critic", "student"] * 2
    assert [next(r for r in roles if f"{r}/loss" in m) for *_, m in two_steps] == roles
    counts = []
    for *_, state, _ in two_steps:
        per_network = {role: int(optax.tree.get(opt, "count")) for role, opt in state.opt.items()}
        counts.append((int(state.step), per_network["student"], per_network["critic"]))
    first = [(0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 1, 3)]
    assert counts == first + [(1, 1, 4), (1, 1, 5), (1, 1, 6), (2, 2, 6)]


def test_the_critic_may_follow(run):
    """The student's update, then the critic's on what it has become; data as numbered."""
    steps = compile_steps(replace(run, order=("student",) + ("critic",) * UPDATES))
    assert steps.order == (steps.student, *[steps.critic] * UPDATES)
    _, state = restore_or_init(run, steps, lambda shapes: None)
    frozen = put_on_mesh(run.frozen, steps.frozen)
    batches = list(host_batches(run, steps, 0, 1))
    assert [int(number) for number, _ in batches] == [0, 1, 2, 3]
    number, batch = batches[0]
    state, metrics = steps.order[0](state, frozen, batch, number)
    counts = {role: int(optax.tree.get(opt, "count")) for role, opt in state.opt.items()}
    assert "student/loss" in metrics and counts == {"student": 1, "critic": 0}


def test_the_order_of_updates(run, path):
    assert run.order == ("critic",) * UPDATES + ("student",)
    config = read_config([f"--config={path}", "--config.critic.updates=2"])
    config.critic.first = False
    assert update_order(config, run.step_spec.objective) == ("student", "critic", "critic")
    assert update_order(config, 1.0 * Denoising()) == ("student",)


def test_data_and_draws_are_numbered_by_update(run, two_steps):
    """No two updates share prompts or noises, and a resumed run continues where it was."""
    assert [int(number) for number, *_ in two_steps] == list(range(8))
    for number, which, *_ in two_steps:
        expected = Texts().batch(int(number) * B, B)["which"]
        np.testing.assert_array_equal(which, expected)
    resumed = [int(number) for number, _ in host_batches(run, compile_steps(run), 1, 2)]
    assert resumed == [4, 5, 6, 7]


def test_the_ema_follows_the_students_updates_alone(two_steps):
    emas = [state.ema["step1"]["matrix"] for *_, state, _ in two_steps]
    student = [state.params["student"]["step1"]["matrix"] for *_, state, _ in two_steps]
    for k in (1, 2, 5, 6):
        np.testing.assert_array_equal(emas[k], emas[k - 1])
    for step, k in ((0, 3), (1, 7)):
        decay = (1 + step) / (10 + step)
        expected = decay * emas[k - 1] + (1 - decay) * student[k]
        np.testing.assert_allclose(emas[k], expected, rtol=1e-5, atol=1e-7)


def test_a_row_has_the_last_of_the_critics_updates(two_steps):
    begun = [Update(0, None, metrics) for *_, metrics in two_steps[4:]]
    row = merge_scalars(begun)
    losses = [float(metrics["critic/loss"]) for *_, metrics in two_steps[4:7]]
    assert float(row["critic/loss"]) == losses[2] and len(set(losses)) == 3


def test_the_students_steps_are_drawn_evenly_over_its_updates(run):
    """One of every four draws is the student's, and the grid has four steps."""
    raw = {name: jnp.asarray(v) for name, v in Texts().batch(0, 2).items()}
    steps = jax.jit(
        lambda n: stratified_step_indices(
            make_batch(run.pipeline, run.frozen, raw, make_key(0), n).stratum, 4
        )
    )
    for student_update in range(UPDATES + 1):
        drawn = np.concatenate([steps(n) for n in range(student_update, 400, UPDATES + 1)])
        assert np.bincount(drawn, minlength=4).min() > 30  # of 200, where 50 are expected


def test_the_operations_of_a_step_count_every_update(run, tmp_path):
    a, b = jnp.ones((4, 8)), jnp.ones((8, 16))
    student, critic = jax.jit(lambda a, b: a @ b), jax.jit(lambda a, b: (a @ b) @ b.T)
    steps = SimpleNamespace(order=(*[critic] * UPDATES, student))
    write_record(run, steps, tmp_path, a, b)
    result = json.loads((tmp_path / "run.json").read_text())
    per_network = flops(student, a, b), flops(critic, a, b)
    assert per_network[1] == 2 * per_network[0]
    assert result["flops_per_step"] == per_network[0] + UPDATES * per_network[1]
    assert result["images_per_step"] == B


class Broken(Texts):
    """Source whose texts are not finite from a sample on."""

    def batch(self, index, size):
        result = super().batch(index, size)
        result["text"][np.arange(index, index + size) >= self.since] = np.nan
        return result


def test_updates_of_one_network_in_a_row_stop_a_run(path, tmp_path, monkeypatch, capsys):
    """Two of the critic's a step: bad from step 4 on, it has three of them in step 5, where the
    student has its second. Rows and checkpoints are counted in steps."""
    bad = 3 * (2 + 1) * B
    monkeypatch.setattr(loop, "prepare", prepare_with(Broken(since=bad)))
    options = {"critic.updates": 2, "stop_after_bad": 3, "log.every": 3, "checkpoint.every": 3}
    result = train(path, tmp_path / "run", *(f"--config.{k}={v}" for k, v in options.items()))
    words = capsys.readouterr().err
    assert result == 3 and "step 5: the last 3 updates of the critic were not finite" in words
    by_step = {row["step"]: row for row in rows(tmp_path / "run")}
    assert list(by_step) == [3, 6]  # step 6 was running when step 5 was checked
    assert [row["critic/bad"] for row in by_step.values()] == [0, 6]
    assert by_step[6]["student/bad"] == 3
    assert committed_steps(tmp_path / "run" / "checkpoints") == [3]


def test_previews_are_counted_in_steps():
    is_due = [s for s in range(1, 8) if Preview.is_due(SimpleNamespace(every=3, last=7), s)]
    assert is_due == [3, 6, 7]
