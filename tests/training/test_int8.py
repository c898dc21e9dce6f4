"""Runs on a frozen teacher of 8-bit kernels: whole weights and adapters."""

import re

import jax
import numpy as np
import pytest
from train_runs import losses, read_vector, rows, train

from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.models.params import flatten
from gadjax.ops.linear import Quantized, is_quantized
from gadjax.parallel.hardware import Chip, Topology
from gadjax.plan.plan import _held
from gadjax.plan.programs import build_programs
from gadjax.training.config import read_config
from gadjax.training.setup import prepare

INT8 = ("--config.int8=/(attn|ff)",)
LORA = "--config.student.lora.rank=4", "--config.student.lora.alpha=2.0"


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("int8") / "run"
    assert train(config, workdir, *INT8, *LORA) == 0
    return workdir


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(config, trained, tmp_path):
    assert train(config, tmp_path / "run", *INT8, *LORA, "--config.steps=2") == 0
    assert train(config, tmp_path / "run", *INT8, *LORA) == 0
    for part in ("student", "critic", "ema"):
        np.testing.assert_array_equal(
            read_vector(tmp_path / "run", part), read_vector(trained, part)
        )
    assert losses(tmp_path / "run") == losses(trained)


@pytest.mark.slow
def test_another_base_is_another_run(config, trained, capsys):
    assert train(config, trained, *LORA, "--config.steps=5") == 2
    assert "int8: found '/(attn|ff)', asked for ''" in capsys.readouterr().err


@pytest.mark.slow
def test_the_card_names_the_base(trained, tmp_path):
    out = tmp_path / "out"
    assert main(["export", "--lora", "--workdir", str(trained), "--out", str(out)]) == 0
    assert "| base in training | 8 bits in /(attn|ff) |" in (
        (out / "README.md").read_text().replace("\\", "")
    )


def test_the_teacher_of_whole_weights_alone_is_in_8_bits(config):
    run = prepare(read_config([f"--config={config}", *INT8]))
    teacher = flatten(run.frozen["transformer"])
    assert sum(map(is_quantized, teacher.values())) == 10
    student = jax.tree.leaves(run.initial_params)
    assert all(x.dtype == np.float32 for x in student)
    assert not any(
        isinstance(x, Quantized) for x in flatten(run.initial_params["student"]).values()
    )


def test_what_is_held(config):
    """`gadjax plan`: a byte a number of these kernels, and a float32 an output."""
    chip = Topology("", Chip("", 2**30, 1e12), 1, False)
    plain, low = (
        prepare(read_config([f"--config={config}", *LORA, *flags]), abstract=True)
        for flags in ((), INT8)
    )
    held = [_held(build_programs(run, chip), 8)["teacher"] for run in (plain, low)]
    kernels = [x for x in flatten(low.frozen["transformer"]).values() if is_quantized(x)]
    saved = sum(3 * x.values.size - 4 * x.scales.size for x in kernels)
    assert held[0] - held[1] == saved > 0.3 * held[0]


@pytest.mark.slow
def test_the_first_loss_is_near_the_float_teachers(config, trained, tmp_path):
    assert train(config, tmp_path / "run", *LORA, "--config.steps=1") == 0
    one, other = rows(tmp_path / "run")[0], rows(trained)[0]
    for name in ("loss/gad", "loss/anchor"):
        assert one[name] != other[name]
        assert other[name] == pytest.approx(one[name], rel=0.1, abs=1e-3)


@pytest.fixture
def on_pictures(config):
    """Config of a run that evaluates no teacher."""
    flags = f"--config={config}", *INT8, "--config.data.prompts="
    given = read_config([*flags, "--config.data.world=gadjax.worlds.shapes"])
    given.objective, given.teacher, given.guidance = {"denoising": {}}, "asset:shapes_teacher", 4.0
    given.preview.every = 0
    return given


def test_a_start_alone_is_in_8_bits(on_pictures):
    """Adapters on their own start, which is then the only frozen base."""
    on_pictures.student.init = "asset:shapes_teacher"
    on_pictures.student.lora.rank = 2
    run = prepare(on_pictures)
    assert run.bases == {"student": "start"} and "transformer" not in run.frozen
    start = flatten(run.frozen["start"])
    kernels = [path for path in start if re.search("/(attn|ff).*/kernel$", path)]
    assert kernels and all(is_quantized(start[path]) for path in kernels)


def test_a_run_without_a_teacher_refuses_it(on_pictures):
    with pytest.raises(InputError, match="int8: found '/.attn.ff.' in a run without a frozen"):
        prepare(on_pictures)
