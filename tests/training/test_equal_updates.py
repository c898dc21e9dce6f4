"""Updates of every term in float64: equal in microbatches, and on eight devices and one."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from all_terms import OBJECTIVES, objective_of, setting
from several import run_on_devices

from gadjax.parallel.placement import batch_shards
from gadjax.parallel.sharding import batch_sharding, make_mesh
from gadjax.training.steps import critic_step, student_step

CLOSE = 1e-11


def update(step_spec, state, networks, batch):
    """Critic's update and student's, and what they report."""
    needs, metrics = step_spec.objective.needs, {}
    if needs.critic or needs.discriminator:
        state, metrics = critic_step(step_spec, state, networks, batch)
    state, more = student_step(step_spec, state, networks, batch)
    changed = {"params": state.params, "ema": state.ema, "memory": state.memory}
    return changed, metrics | {f"student's {key}": value for key, value in more.items()}


def difference(a, b) -> dict[str, float]:
    """Largest difference by leaf, relative to the leaf's largest magnitude."""
    pairs = zip(*map(jax.tree_util.tree_leaves_with_path, (a, b)), strict=True)
    return {
        jax.tree_util.keystr(path): float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-6))
        for (path, x), (_, y) in pairs
    }


def worker(out: Path) -> None:
    """Run the updates of every objective: at once, in microbatches, on eight devices."""
    assert len(jax.devices()) == 8
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}, jax.devices())
    results = {}
    for name in OBJECTIVES:
        spec, state, networks, batch = setting(name)
        parts = (1,) if objective_of(name).needs.joint else (1, 2, 4)

        def in_parts(*given, spec=spec, parts=parts):
            return [update(spec(microbatches=n), *given) for n in parts]

        whole, *others = jax.device_get(jax.jit(in_parts)(state, networks, batch))
        split = jax.device_put(batch, batch_sharding(mesh))
        on_mesh = jax.jit(partial(update, spec(batch_shards=batch_shards(mesh))))
        on_mesh = jax.device_get(on_mesh(state, networks, split))
        results[name] = {
            "moved": difference(whole[0]["params"], jax.device_get(state.params)),
            "microbatches": [difference(whole, other) for other in others],
            "devices": [difference(whole, on_mesh)],
        }
    out.write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("equal") / "results.json"
    run_on_devices(8, __file__, out)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_updates_are_equal_in_microbatches_and_on_eight_devices(results, name):
    result, joint = results[name], objective_of(name).needs.joint
    # Of a student, the steps that are drawn at times of the loss's own law.
    moved = {key.split("'")[1] for key, size in result["moved"].items() if size > 0}
    assert moved == {key.split("'")[1] for key in result["moved"]}  # every network
    assert len(result["microbatches"]) == (0 if joint else 2)
    for leaves in result["microbatches"] + result["devices"]:
        wrong = {key: size for key, size in leaves.items() if not size < CLOSE}
        assert not wrong, wrong


def test_terms_that_compare_samples_are_those_that_refuse_microbatches():
    joint = {name for name in OBJECTIVES if objective_of(name).needs.joint}
    assert joint == {"embedding", "f_distill", "ladd mismatched"}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    worker(Path(sys.argv[1]))
