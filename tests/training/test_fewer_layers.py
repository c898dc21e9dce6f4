"""Students of fewer layers than their teacher: start, training, resume, sampling and export."""

import json
import shutil

import jax
import numpy as np
import pytest
from train_runs import read_vector, steps, train

from gadjax import load
from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.models.params import flatten
from gadjax.training.config import read_config
from gadjax.training.setup import prepare

LAYERS = "--config.student.layers=(1,)"


@pytest.fixture(scope="module")
def run(config):
    return prepare(read_config([f"--config={config}", LAYERS]))


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("layers") / "run"
    assert train(config, workdir, LAYERS) == 0
    return workdir


def test_the_student_starts_with_the_teachers_blocks_and_the_critic_whole(run, tiny_pipeline):
    state = jax.jit(run.start)(run.initial_params)
    teacher = flatten(read_pipeline(tiny_pipeline).components["transformer"].params)
    student, critic = (flatten(state.params[role]) for role in ("student", "critic"))
    for path, leaf in student.items():
        expected = teacher[path][1:] if path.startswith("blocks/") else teacher[path]
        assert np.array_equal(leaf, expected)
    assert all(np.array_equal(critic[path], teacher[path]) for path in critic)
    assert run.step_spec.student_layers == (1,)


def test_a_run_resumes_to_the_bit(config, trained, tmp_path):
    again = tmp_path / "again"
    flags = config, again, LAYERS, "--config.checkpoint.every=2"
    assert train(*flags) == 0
    shutil.rmtree(again / "checkpoints" / str(max(steps(again))))
    assert train(*flags) == 0
    assert np.array_equal(read_vector(again, "ema"), read_vector(trained, "ema"))


def test_it_is_sampled_and_exported_with_its_own_depth(trained, tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "student"
    assert main(["export", "--workdir", str(trained), "--out", str(out)]) == 0
    assert "not verified" not in capsys.readouterr().out
    made = json.loads((out / "transformer" / "config.json").read_text())
    teacher = json.loads((tiny_pipeline / "transformer" / "config.json").read_text())
    assert made == teacher | {"num_layers": 1}
    verified = json.loads((out / "gadjax.json").read_text())["verified"]
    assert verified["max_difference"] <= verified["allowed"]
    _, ema, _ = read_params(trained / "checkpoints", "ema")
    exported = load(str(out)).params["transformer"]
    assert all(np.array_equal(flatten(exported)[k], v) for k, v in flatten(ema).items())
    sampled = flatten(load(str(trained)).params["transformer"])
    assert {len(v) for k, v in sampled.items() if k.startswith("blocks/")} == {1}


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--config.student.layers=(2,)",), "student.layers: found .* teacher's 2 blocks"),
        (("--config.student.layers=(0, 1)",), "student.layers: found .* teacher's 2 blocks"),
        ((LAYERS, "--config.student.lora.rank=2"), "student.layers: found some of the blocks and"),
        ((LAYERS, "--config.critic.follow=0.1"), "critic.follow: found 0.1 and a student of fewer"),
        (
            ("--config.objective={'ppcl': {'images': False}}",),
            "student.layers: found \\(\\); expected",
        ),
    ],
)
def test_bad_options(config, flags, message):
    with pytest.raises(InputError, match=message):
        prepare(read_config([f"--config={config}", *flags]), abstract=True)


def test_a_network_of_a_term_is_of_the_teachers_depth(config, trained):
    source = f"--config.student.init={trained}"
    with pytest.raises(InputError, match="a student of 1 layers; expected a network of the"):
        prepare(read_config([f"--config={config}", source]))
