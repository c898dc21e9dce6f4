"""Students of fewer layers than their teacher: start, training, resume, sampling and export."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from train_runs import read_vector, steps, train

from gadjax import load
from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.orbax_folder import open_folder
from gadjax.models.depth import check_layers
from gadjax.models.params import flatten
from gadjax.pipelines.pipeline import make_pipeline
from gadjax.training.config import read_config
from gadjax.training.networks import base_keys, read_network
from gadjax.training.setup import prepare
from gadjax.training.workdir import read_trained

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


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(config, trained, tmp_path):
    again = tmp_path / "again"
    flags = config, again, LAYERS, "--config.checkpoint.every=2"
    assert train(*flags) == 0
    shutil.rmtree(again / "checkpoints" / str(max(steps(again))))
    assert train(*flags) == 0
    assert np.array_equal(read_vector(again, "ema"), read_vector(trained, "ema"))


@pytest.mark.slow
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


@pytest.mark.parametrize("family", ["z_image", "lumina2"])
def test_a_backbone_of_several_stacks_is_refused_as_what_it_is(folders, family):
    folder = open_folder(folders(family), components=())
    part = folder.components[folder.backbone]
    message = "found \\(0,\\) for a backbone whose blocks are not one stack of equal ones; expected"
    with pytest.raises(InputError, match=message):
        check_layers((0,), part.spec, part.abstract)


@pytest.mark.slow
def test_no_single_file_and_no_lora_of_it(trained, tmp_path, capsys):
    """A file does not tell its depth, and LoRAs name the teacher's blocks."""
    out = "--out", str(tmp_path / "out")
    assert main(["export", "--workdir", str(trained), *out, "--single-file"]) == 2
    assert "--single-file: found a student of 1 layers in" in capsys.readouterr().err
    assert main(["export", "--workdir", str(trained), *out, "--lora"]) == 2
    assert "found a student whose whole weights were trained" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="lora: found style .* a student of 1 layers; expected"):
        load(str(trained), lora=["style"])


@pytest.mark.slow
def test_its_critic_is_whole(trained, tiny_pipeline):
    """As a source; its adapters are its own too."""
    critic = read_trained(trained, "critic")
    student = read_trained(trained)
    assert critic.layers == () and student.layers == (1,)
    pipeline = make_pipeline(open_folder(tiny_pipeline, components=()))
    params, _ = read_network(f"{trained}@critic", pipeline, "objective.disback.path")
    assert all(np.array_equal(flatten(params)[k], v) for k, v in flatten(critic.params).items())
    settings = {**critic.config["critic"], "lora": {"rank": 3, "alpha": 6.0, "targets": ".*"}}
    adapted = replace(critic, config={**critic.config, "critic": settings})
    assert adapted.lora.rank == 3 and replace(adapted, part="student").lora is None
    settings = settings | {"init": str(tiny_pipeline)}
    adapted = replace(critic, config={**critic.config, "critic": settings})
    base = read_pipeline(tiny_pipeline).components["transformer"]
    with pytest.raises(InputError, match="found a critic whose adapters are on .* on 'teacher'"):
        adapted.full_params(base)


def test_a_critic_of_the_same_start_keeps_the_teachers_depth(config, tiny_pipeline):
    """Its adapters' base is not the student's start, which has fewer blocks."""
    path = str(tiny_pipeline)
    flags = f"--config.student.init={path}", f"--config.critic.init={path}"
    changed = read_config([f"--config={config}", *flags, "--config.critic.lora.rank=2"])
    inits = {"student": path, "critic": path}
    assert base_keys(changed, inits) == {"critic": "start"}
    changed.student.layers = (1,)
    assert base_keys(changed, inits) == {"critic": "critic/start"}


@pytest.mark.slow
def test_a_network_of_a_term_is_of_the_teachers_depth(config, trained):
    source = f"--config.student.init={trained}"
    with pytest.raises(InputError, match="a student of 1 layers; expected a network of the"):
        prepare(read_config([f"--config={config}", source]))
