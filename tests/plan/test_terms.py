"""`gadjax plan` of every term, without compiling: what a chip holds, what updates compute."""

import jax
import pytest
from tiny_run import config_file

from gadjax.objectives import TERMS
from gadjax.ops.flops import flops
from gadjax.parallel.hardware import Chip, Topology
from gadjax.plan.plan import _held, _operations
from gadjax.plan.programs import build_programs
from gadjax.training.batch import make_batch
from gadjax.training.config import read_config
from gadjax.training.setup import prepare

ONE_STEP = {"steps": 1, "timesteps": (899,)}
FLOW_STEPS = {"steps": 4, "timesteps": (999, 749.25, 499.5, 249.75)}
PICTURES = {"world": "gadjax.worlds.shapes", "length": 16, "cache": 64}
PROMPTS = {"prompts": "asset:shapes_demo_prompts.txt", "length": 16}
FLOWS = "boot", "meanflow", "twinflow"
# Term -> options of its own, and other keys of the config.
OPTIONS = {
    "disback": {"path": ("teacher",)},
    "uni_dad": {"target": "teacher"},
    "ladd": {"blocks": (0, 2)},
    "dmm": {"teachers": ("teacher", "start")},
}
OTHERS = {
    "boot": {"student": ONE_STEP | {"timesteps": (999,)}},
    "meanflow": {"student": FLOW_STEPS},
    "twinflow": {"student": FLOW_STEPS},
    "tcm": {"student": ONE_STEP},
    "dmm": {"data": PROMPTS | {"styles": ("", ", in ink")}},
    "sfd": {"data": PROMPTS | {"forget": "red", "replacement": "blue"}},
    "ppcl": {"student": {"layers": (0, 3)}},
}
# Terms that train no critic and evaluate one, and terms that are beside others.
BESIDE = {"gad_lift": {"dmd": {}}, "gad_script": {"tdm": {}}}
# The others are traced in the slow tier.
QUICK = "flash_dmd", "gdd", "sfd", "twinflow", "dmm", "ppcl"


def programs_of(name, path):
    """Updates of a run with one term, abstractly, on one device."""
    settings = {
        "teacher": f"asset:shapes_{'flow_' if name in FLOWS else ''}teacher",
        "objective": {name: OPTIONS.get(name, {})} | BESIDE.get(name, {}),
        "data": PICTURES,
        "batch": 4,
        "preview": {"every": 0},
    }
    config = read_config(["--config", str(config_file(path, **settings | OTHERS.get(name, {})))])
    device = jax.devices()[0]
    run = prepare(config, abstract=True, devices=[device])
    return build_programs(run, Topology("", Chip("", 2**40, 1e12), 1, False))


def marked(name):
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in TERMS])
def test_a_plan_has_the_networks_and_operations_of_the_term(name, tmp_path):
    programs = programs_of(name, tmp_path / "config.py")
    run, held = programs.run, _held(programs, 4)
    needs = run.step_spec.objective.needs
    shapes = run.pipeline.networks["transformer"].abstract
    teacher = 4 * sum(x.size for x in jax.tree.leaves(shapes))
    assert held["student parameters"] == held["EMA"] > 0
    assert (held["student parameters"] < 0.8 * teacher) == needs.fewer_layers
    assert ("critic parameters" in held) == needs.critic
    assert ("discriminator parameters" in held) == needs.discriminator
    named = not {"teacher", "start"}.isdisjoint(needs.networks.values())
    assert (held["teacher"] > 0) == (needs.uses_teacher or named)
    assert (held["vae"] > 0) == (needs.images or needs.pixels)
    work = {step: _operations(programs, step, 4) for step in programs.steps}
    assert ("critic" in work) == (needs.critic or needs.discriminator)

    def evaluation(params, frozen, raw):
        batch = make_batch(run.pipeline, frozen, raw, jax.random.key(0), 0)
        return run.pipeline.denoiser.raw(params, batch.noise, 1.0, batch.cond)

    once = flops(evaluation, shapes, run.frozen, run.source.batch(0, 4))
    assert all(operations > (1 if needs.fewer_layers else 2) * once for operations in work.values())
