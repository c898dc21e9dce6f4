"""Report of a skipped update: its loss, samples and step."""

import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import FLOW_WORLD, gaussian_params, make_batch
from several import run_on_devices

from gadjax.errors import RunStopped
from gadjax.objectives import Needs
from gadjax.objectives.base import sample_mean
from gadjax.objectives.compose import Addable
from gadjax.parallel.sharding import batch_sharding, make_mesh, replicated
from gadjax.training.nonfinite import Update, check_nonfinite, merge_scalars, nonfinite_cause
from gadjax.training.state import create_state
from gadjax.training.steps import student_step

B, BAD = 16, 5


@dataclass(frozen=True)
class Plain(Addable):
    """Squared difference of the student's and the teacher's prediction."""

    needs = Needs(student=True, teacher=True)

    def __call__(self, context):
        error = context.student[0].x0 - context.teacher(context.x_BHWC, context.t_B).x0
        return sample_mean(error**2), {}


@dataclass(frozen=True)
class Division(Addable):
    """Infinite for a sample whose noise begins with 77; its gradient is not."""

    needs = Needs(student=True)

    def __call__(self, context):
        mark = context.batch.noise[:, 0, 0, 0] - 77
        return 0 * sample_mean(context.student[0].x0) + 1 / jnp.abs(mark), {}


@dataclass(frozen=True)
class Root(Addable):
    """Finite; its gradient is 0 / 0."""

    needs = Needs(student=True)

    def __call__(self, context):
        return jnp.sqrt(0 * sample_mean(context.student[0].x0)), {}


def make_step_spec(objective, **more):
    return FLOW_WORLD.step_spec(objective, optimizers={"student": optax.adam(1e-2)}, **more)


def start(step_spec):
    return create_state({"student": FLOW_WORLD.student_params(bend=0.2)}, step_spec.optimizers)


def update_of(objective, teacher=None, batch=None, which=None, **more):
    """A student's update as the loop keeps it, and the states before and after."""
    step_spec = make_step_spec(objective, **more)
    old = start(step_spec)
    batch = make_batch(B) if batch is None else batch
    new, metrics = jax.jit(partial(student_step, step_spec))(
        old, {"teacher": teacher or gaussian_params()}, batch
    )
    return Update(160, which, metrics), old, new


def spoilt(value):
    batch = make_batch(B)
    return batch._replace(noise=batch.noise.at[BAD, 0, 0, 0].set(value))


def prompt_with(value):
    """Batch with one prompt whose embedding is not finite."""
    batch = make_batch(B)
    text = batch.cond.text.at[BAD].set(value)
    return batch._replace(cond=batch.cond._replace(text=text))


@pytest.mark.parametrize(
    ("microbatches", "batch", "cause"),
    [
        (1, lambda: spoilt(77.0), "loss/division of samples 165"),
        (1, lambda: prompt_with(np.nan), "loss/division, loss/plain of samples 165"),
        (2, lambda: prompt_with(np.inf), "samples 165"),
    ],
    ids=["a division", "a prompt", "microbatches"],
)
def test_one_sample_is_named(microbatches, batch, cause):
    objective = Plain() + Division()
    update, old, new = update_of(objective, batch=batch(), microbatches=microbatches)
    assert nonfinite_cause(update, "student").endswith(cause)
    same = jax.tree.map(
        np.array_equal, (new.params, new.opt, new.ema), (old.params, old.opt, old.ema)
    )
    assert all(jax.tree.leaves(same)) and int(new.bad["student"]) == 1


def test_a_teacher_that_overflows_spoils_all_samples():
    huge = jax.tree.map(lambda x: x * 1e38, gaussian_params())
    update, *_ = update_of(1.0 * Plain(), teacher=huge)
    assert (
        nonfinite_cause(update, "student")
        == f"loss/plain of samples {', '.join(map(str, range(160, 176)))}"
    )


def test_the_gradient_of_a_finite_loss():
    which = jnp.arange(B, dtype=jnp.int32) % 3 + 40
    update, *_ = update_of(Plain() + Root(), which=which)
    assert np.isfinite(update.metrics["student/loss"])
    numbers = ", ".join(str(40 + i % 3) for i in range(B))
    cause = f"the gradient of a finite loss of the whole batch, prompts {numbers}"
    assert nonfinite_cause(update, "student") == cause


def made(role="critic", count=1, size=40, bad=(), **more):
    """An update with chosen metrics."""
    loss_B = np.ones(size, np.float32)
    loss_B[list(bad)] = np.nan
    loss = {f"{role}/loss": np.mean(loss_B), f"{role}/loss_B": loss_B}
    metrics = loss | {f"{role}/grad_norm": np.float32(1), f"{role}/bad": np.int32(count)} | more
    return Update(80, None, jax.tree.map(jnp.asarray, metrics))


def test_one_is_noted_and_several_in_a_row_stop_the_run():
    notes = []
    check = partial(check_nonfinite, most=3, note=notes.append)
    check([made(count=0), made("student", 0)], 7)
    assert not notes
    check([made(count=1, bad=[3]), made("student", 2, bad=[1, 2])], 8)
    assert notes == [
        f"step 8: an update of the {role} was not finite and was skipped: {role}/loss of {which}"
        for role, which in (("critic", "samples 83"), ("student", "samples 81, 82"))
    ]
    # Also where the last of a step's critic updates was good again.
    with pytest.raises(RunStopped) as stopped:
        check([made(count=3, bad=[0]), made(count=0), made("student", 0)], 9)
    assert str(stopped.value).startswith(
        "step 9: the last 3 updates of the critic were not finite and were skipped, the newest "
        "for critic/loss of samples 80; expected finite losses"
    )
    assert "--reproduce-step 9" in str(stopped.value) and len(notes) == 2


def test_a_line_stays_a_line():
    cause_of_all = nonfinite_cause(made(bad=range(40)), "critic")
    assert cause_of_all.endswith(" 94, 95 and 24 more") and len(cause_of_all) < 200
    odd = nonfinite_cause(made(**{"critic/grad_norm": np.float32(1)}), "critic")
    assert odd.startswith(
        "the optimizer's update for a finite gradient of the whole batch, samples"
    )


def test_step_metrics_are_the_scalars_of_every_networks_last_update():
    first, last, student = made(count=2), made(count=0), made("student", 0)
    actual = merge_scalars([first, last, student])
    assert {name: np.shape(x) for name, x in actual.items()} == {
        f"{role}/{name}": ()
        for role in ("critic", "student")
        for name in ("loss", "grad_norm", "bad")
    }
    assert int(actual["critic/bad"]) == 0


def test_on_a_mesh():
    run_on_devices(4, __file__)


def main():
    """The samples of four devices, in two microbatches, in the order of the batch."""
    mesh = make_mesh({"data": 2, "fsdp": 2})
    step_spec = make_step_spec(Plain() + Division(), microbatches=2)
    batch = spoilt(77.0)
    state = start(step_spec)
    places = replicated(mesh), replicated(mesh), batch_sharding(mesh)
    step = jax.jit(
        partial(student_step, step_spec), in_shardings=places, out_shardings=replicated(mesh)
    )
    _, metrics = step(state, {"teacher": gaussian_params()}, batch)
    which = jax.device_put(jnp.arange(B, dtype=jnp.int32) + 100, batch_sharding(mesh))
    update = Update(160, which, metrics)
    assert nonfinite_cause(update, "student") == "loss/division of prompts 105", nonfinite_cause(
        update, "student"
    )
    alone = jax.jit(partial(student_step, make_step_spec(Plain() + Division())))
    _, expected = alone(state, {"teacher": gaussian_params()}, batch)
    np.testing.assert_allclose(metrics["student/loss_B"], expected["student/loss_B"], rtol=1e-5)


if __name__ == "__main__":
    sys.exit(main())
