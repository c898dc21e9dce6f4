"""Every variant of configs/methods.py as a user runs it: planned, trained, exported and sampled."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from train_runs import read_vector, rows

from gadjax.formats.diffusers_folder import INDEX
from gadjax.parallel.hardware import Chip, Topology
from gadjax.plan.plan import _held, _operations
from gadjax.plan.programs import build_programs
from gadjax.training.config import read_config
from gadjax.training.setup import prepare

FILE = Path(__file__).parents[2] / "configs" / "methods.py"
_spec = importlib.util.spec_from_file_location("methods", FILE)
methods = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(methods)

FEW = {
    "steps": 2,
    "batch": 4,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "log.every": 1,
    "preview.every": 0,
}
every_variant = pytest.mark.parametrize("variant", methods.VARIANTS)


def arguments(variant: str) -> list[str]:
    """Flags of a run of two updates."""
    few = FEW | ({"data.cache": 8} if variant in methods.WITH_PICTURES else {})
    changes = [f"--config.{key}={value}" for key, value in few.items()]
    return [f"--config={FILE}:{variant}", *changes]


@pytest.mark.slow
@every_variant
def test_a_variant_trains_exports_and_samples(variant, prompts, tmp_path, gadjax):
    run, student = tmp_path / "run", tmp_path / "student"
    gadjax("train", *arguments(variant), "--workdir", run)
    logged = rows(run)
    assert [row["step"] for row in logged] == [1, 2]
    for name, value in logged[-1].items():
        assert not isinstance(value, float) or math.isfinite(value), name
    assert logged[-1]["student/bad"] == 0 and logged[-1]["student/grad_norm"] > 0
    # The rate of the first update is that of the start of a warm-up.
    assert (read_vector(run, "student", 1) != read_vector(run, "student", 2)).mean() > 0.5
    gadjax("export", "--workdir", run, "--out", student)
    verified = json.loads((student / "gadjax.json").read_text())["verified"]
    assert verified["max_difference"] <= 2 / 255, verified
    assert json.loads((student / INDEX).read_text())["transformer"]
    for name, model in (("by_run", run), ("by_folder", student)):
        gadjax("sample", "--model", model, "--prompts", prompts, "--out", tmp_path / name)
    for name in ("00000-0.png", "00001-0.png"):
        ours, theirs = ((tmp_path / by / name).read_bytes() for by in ("by_run", "by_folder"))
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["f_distill", "sprint", "flash_dmd", "cdm", "disback", "embedding", "tscd"]
)
def test_a_resumed_variant_is_the_same_run(variant, tmp_path, gadjax):
    """Memories of terms, discriminators, critics that follow, stages by the clock."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    gadjax("train", *arguments(variant), "--workdir", whole)
    for steps in (1, 2):
        gadjax("train", *arguments(variant), f"--config.steps={steps}", "--workdir", parts)
    for part in ("student", "ema"):
        np.testing.assert_array_equal(read_vector(whole, part), read_vector(parts, part))


@pytest.mark.slow
@every_variant
def test_a_variant_is_planned(variant):
    """At its own batch: what a chip holds, and operations of both updates, traced alone."""
    config = read_config(arguments(variant) + ["--config.batch=16"])
    run = prepare(config, abstract=True, devices=jax.devices()[:1])
    programs = build_programs(run, Topology("", Chip("", 2**40, 1e12), 1, False))
    held = _held(programs, 16)
    assert held["student parameters"] > 0 and all(size >= 0 for size in held.values())
    needs = run.step_spec.objective.needs
    assert set(programs.steps) == {"student"} | (
        {"critic"} if needs.critic or needs.discriminator else set()
    )
    assert all(_operations(programs, step, 16) > 0 for step in programs.steps)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["flash_dmd", "sprint"])
def test_the_command_plans_a_variant(variant, gadjax):
    """Pixels, a discriminator on blocks, pictures: compiled for another chip."""
    options = "--config.data.prompts=", "--config.batch=4"
    out = gadjax("plan", "--topology=gpu:1", "--json", *arguments(variant), *options)
    planned = json.loads(out)
    assert planned["memory"]["fits"] and planned["updates"] == {"critic": 2, "student": 1}
    assert planned["flops"]["update"] > 0
