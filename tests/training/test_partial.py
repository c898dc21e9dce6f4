"""Students and critics that train a part of their network."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import state
from several import run_on_devices
from train_runs import losses, read_vector, rows, train
from workdirs import make_workdir

from gadjax import load
from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.experiments.study_runs import evaluations
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.models.params import flatten, split_frozen
from gadjax.ops.linear import is_quantized
from gadjax.parallel.hardware import Chip, Topology
from gadjax.plan.plan import _held
from gadjax.plan.programs import build_programs
from gadjax.training.checks import validate
from gadjax.training.config import default_config, read_config
from gadjax.training.partial import trained_patterns
from gadjax.training.setup import prepare
from gadjax.training.workdir import read_trained

PATTERN = "/attn2/"
PART = (f"--config.student.trained={PATTERN}",)
RATE = "--config.optim.lr=0.01", "--config.optim.clip=0.0"
PARTS = "student", "critic", "ema"


def prepared(config, *flags, abstract=False):
    return prepare(read_config([f"--config={config}", *flags]), abstract=abstract)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run of four steps of DMD, GAD and anchor."""
    workdir = tmp_path_factory.mktemp("partial") / "run"
    assert train(config, workdir, *PART) == 0
    return workdir


@pytest.fixture(scope="module")
def backbone(tiny_pipeline):
    return read_pipeline(tiny_pipeline, components=("transformer",)).components["transformer"]


def sizes(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def chosen(params, pattern=PATTERN):
    return {path: x for path, x in flatten(params).items() if pattern in path}


def test_the_state_has_the_part_alone_and_the_rest_is_the_teachers(config, backbone):
    run = prepared(config, *PART)
    assert run.bases == {"student": "transformer", "critic": "transformer"}
    assert set(run.frozen) == {"null", "text_encoder", "transformer"}
    state = jax.jit(run.start)(run.initial_params)
    part = chosen(backbone.params)
    for tree in (state.params["student"], state.params["critic"], state.ema):
        assert flatten(tree).keys() == part.keys()
        assert all(np.array_equal(x, part[path]) for path, x in flatten(tree).items())
    # Student, critic and average, two moments of each but the last; counters are single numbers.
    numbers = sum(x.size for x in jax.tree.leaves(state) if x.size > 1)
    assert numbers == 7 * sizes(part) < 7 * 0.3 * sizes(backbone.params)
    for role in ("student", "critic"):
        assert run.base(role, run.frozen) is run.frozen["transformer"]


def test_what_is_held(config, backbone):
    """`gadjax plan`: 4 bytes of each number of the part's state, and the teacher once."""
    chip = Topology("", Chip("", 2**30, 1e12), 1, False)
    whole, part = (
        _held(build_programs(prepared(config, *flags, abstract=True), chip), 8)
        for flags in ((), PART)
    )
    numbers = sizes(chosen(backbone.params))
    assert part["student parameters"] == part["critic parameters"] == part["EMA"] == 4 * numbers
    assert part["optimizer moments"] == pytest.approx(4 * 4 * numbers, rel=1e-3)
    same = "teacher", "text encoders", "vae", "other frozen", "batches", "counters"
    assert all(part[name] == whole[name] for name in same)


@pytest.fixture
def on_pictures(config):
    """Config of a run that evaluates no teacher."""
    given = read_config([f"--config={config}", "--config.data.prompts="])
    given.data.world = "gadjax.worlds.shapes"
    given.objective, given.teacher, given.guidance = {"denoising": {}}, "asset:shapes_teacher", 4.0
    given.student.trained, given.preview.every = PATTERN, 0
    return given


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_teacher_the_rest_alone_is_held(on_pictures, dtype):
    on_pictures.dtype = dtype
    run = prepare(on_pictures)
    assert run.bases == {"student": "untrained"} and "transformer" not in run.frozen
    rest = flatten(run.frozen["untrained"])
    assert not chosen(rest) and {str(x.dtype) for x in rest.values()} == {dtype}
    whole = flatten(run.pipeline.networks["transformer"].abstract)
    assert rest.keys() | flatten(run.initial_params["student"]).keys() == whole.keys()
    assert 1 < evaluations(run) < 4  # its network is whole


def test_of_another_start_the_rest_alone_is_held(config, tiny_pipeline, backbone):
    """Once for both; adapters on it need it whole."""
    init = f"--config.student.init={tiny_pipeline}"
    run = prepared(config, *PART, init)
    assert run.bases == {"student": "start", "critic": "transformer"}
    rest = flatten(run.frozen["start"])
    assert not chosen(rest) and len(rest) == len(flatten(backbone.params)) - len(
        chosen(backbone.params)
    )
    both = *PART, init, f"--config.critic.init={tiny_pipeline}"
    run = prepared(config, *both, "--config.critic.trained=/attn1/")
    assert run.bases == {"student": "start", "critic": "start"}
    assert len(flatten(run.frozen["start"])) == len(flatten(backbone.params))  # none train the same
    run = prepared(config, *both, "--config.critic.lora.rank=2")
    assert run.bases == {"student": "start", "critic": "start"}
    assert len(flatten(run.frozen["start"])) == len(flatten(backbone.params))


def test_the_critic_has_its_own_part(config):
    run = prepared(config, *PART, "--config.critic.trained=/ff/")
    assert {
        r: set(chosen(p, "/ff/")) == set(flatten(p)) for r, p in run.initial_params.items()
    } == {
        "student": False,
        "critic": True,
    }
    run = prepared(config, *PART, "--config.critic.trained=")  # all
    assert run.bases == {"student": "transformer"}
    state = jax.eval_shape(run.start, run.initial_params)
    assert sizes(state.params["critic"]) > 3 * sizes(state.params["student"])


def test_the_rest_may_be_in_8_bits_as_the_teacher_is(config):
    run = prepared(config, *PART, "--config.int8=/(attn|ff)")
    assert run.base("student", run.frozen) is run.frozen["transformer"]
    rest = {path: x for path, x in flatten(run.frozen["transformer"]).items() if "/attn1/" in path}
    assert any(map(is_quantized, rest.values()))
    assert {x.dtype for x in jax.tree.leaves(run.initial_params)} == {np.dtype("float32")}


def test_it_is_exported_whole(tiny_pipeline, tmp_path, backbone):
    """Checked by the export against diffusers, as it is sampled here."""
    workdir = make_workdir(tmp_path / "run", tiny_pipeline, student={"trained": PATTERN})
    assert flatten(read_trained(workdir).params).keys() == chosen(backbone.params).keys()
    out = tmp_path / "out"
    assert main(["export", "--workdir", str(workdir), "--out", str(out)]) == 0
    before, after = state(tiny_pipeline, "transformer"), state(out, "transformer")
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {key for key in before if ".attn2." in key} and before.keys() == after.keys()
    verified = json.loads((out / "gadjax.json").read_text())["verified"]
    assert verified["max_difference"] <= verified["allowed"]
    assert load(workdir).fingerprint == load(out).fingerprint != load(tiny_pipeline).fingerprint
    card = (out / "README.md").read_text().replace("\\", "")
    assert "| trained parameters | /attn2/ |" in card
    assert main(["export", "--lora", "--workdir", str(workdir), "--out", str(tmp_path / "no")]) == 2


@pytest.mark.slow
def test_it_resumes_to_the_bit(config, trained, tmp_path, capsys):
    assert train(config, tmp_path / "run", *PART, "--config.steps=2") == 0
    assert train(config, tmp_path / "run", *PART) == 0
    for part in PARTS:
        np.testing.assert_array_equal(
            read_vector(tmp_path / "run", part), read_vector(trained, part)
        )
    assert losses(tmp_path / "run") == losses(trained)
    assert train(config, trained, "--config.student.trained=/ff/", "--config.steps=5") == 2
    assert "student.trained: found '/attn2/', asked for '/ff/'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_first_step_is_that_of_the_whole_network(config, backbone, tmp_path):
    """Loss and gradient; the rest does not move."""
    config = f"{config}:regression"
    flags = *RATE, "--config.steps=1"
    assert train(config, tmp_path / "part", *flags, *PART, "--config.preview.every=1") == 0
    assert train(config, tmp_path / "whole", *flags) == 0
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    part, whole = (
        flatten(read_params(tmp_path / name / "checkpoints", "student")[1])
        for name in ("part", "whole")
    )
    before = flatten(backbone.params)
    assert part.keys() == chosen(before).keys()
    for path, x in part.items():
        np.testing.assert_allclose(x, whole[path], rtol=0, atol=2e-6)
        assert np.abs(x - before[path]).max() > 5e-3
    complete = flatten(read_trained(tmp_path / "part", "student").full_params(backbone))
    moved = {path for path, x in complete.items() if not np.array_equal(x, before[path])}
    assert moved == part.keys() and complete.keys() == before.keys()
    assert len(list((tmp_path / "part" / "previews").iterdir())) == 2


@pytest.mark.slow
def test_microbatches_are_the_batch(config, trained, tmp_path):
    assert train(config, tmp_path / "run", *PART, "--config.microbatch=4", "--config.steps=2") == 0
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(losses(trained)[step], rel=1e-5)
    found, expected = rows(tmp_path / "run")[1], rows(trained)[1]
    for name in ("student/grad_norm", "critic/grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.slow
def test_on_another_start(config, tiny_pipeline, tmp_path):
    """It resumes to the bit, and its export is that start with another part."""
    start = tmp_path / "start"
    workdir = make_workdir(tmp_path / "first", tiny_pipeline)
    assert main(["export", "--workdir", str(workdir), "--out", str(start)]) == 0
    flags = *PART, *RATE, f"--config.student.init={start}"
    assert train(config, tmp_path / "run", *flags, "--config.steps=2") == 0
    assert train(config, tmp_path / "half", *flags, "--config.steps=1") == 0
    assert train(config, tmp_path / "half", *flags, "--config.steps=2") == 0
    np.testing.assert_array_equal(
        read_vector(tmp_path / "half", "ema"), read_vector(tmp_path / "run", "ema")
    )
    out = tmp_path / "out"
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(out)]) == 0
    before, after = state(start, "transformer"), state(out, "transformer")
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {key for key in before if ".attn2." in key}
    critic = read_trained(tmp_path / "run", "critic")
    whole = read_pipeline(start).components["transformer"]
    with pytest.raises(InputError, match="found a critic whose frozen rest is on 'teacher'; expe"):
        critic.full_params(whole)


def worker(config: str, out: str) -> None:
    """Train on all devices, in float32."""
    assert len(jax.devices()) == 8
    mesh = "--config.mesh.data=2", "--config.mesh.fsdp=4"
    offload = "--config.offload=('optimizer', 'ema')"
    assert train(config, Path(out), *PART, *mesh, offload, "--config.steps=2") == 0


@pytest.mark.slow
def test_eight_devices_do_what_one_does(config, trained, tmp_path):
    run_on_devices(8, __file__, config, tmp_path / "eight")
    for step, loss in losses(tmp_path / "eight").items():
        assert loss == pytest.approx(losses(trained)[step], rel=1e-5)
    for name in ("student/grad_norm", "critic/grad_norm"):
        found, expected = rows(tmp_path / "eight")[1][name], rows(trained)[1][name]
        assert found == pytest.approx(expected, rel=1e-4)


def changed(critic=None, **student):
    config = default_config()
    config.objective = {"dmd": {}}
    config.student.update(student)
    config.critic.update(critic or {})
    return config


def test_what_is_none_for_the_critic_is_the_students():
    assert trained_patterns(default_config()) == {}
    both = {"student": "attn", "critic": "attn"}
    assert trained_patterns(changed(trained="attn")) == both
    assert trained_patterns(changed({"trained": ""}, trained="attn")) == {"student": "attn"}
    assert trained_patterns(changed({"trained": "ff"})) == {"critic": "ff"}
    assert trained_patterns(changed({"lora": {"rank": 2}}, trained="attn")) == {"student": "attn"}
    assert trained_patterns({"student": {"timesteps": [1]}}) == {}  # an older workdir's


@pytest.mark.parametrize(
    "config,message",
    [
        (changed(trained="("), r"student.trained: found '\(' \(.*\); expected a regex"),
        (changed({"trained": "["}), r"critic.trained: found '\[' \(.*\); expected a regex"),
        (
            changed(trained="attn", lora={"rank": 2}),
            "student.trained: found 'attn' and adapters; expected '', as student.lora.targets has",
        ),
        (
            changed({"trained": "attn", "lora": {"rank": 2}}),
            "critic.trained: found 'attn' and adapters; expected '', as critic.lora.targets has",
        ),
        (
            changed(trained="attn", init="random"),
            "student.trained: found 'attn' with student.init 'random'; expected '', as the rest",
        ),
        (
            changed({"trained": "attn"}, init="random"),
            "critic.trained: found 'attn' with student.init 'random'; expected ''",
        ),
        (
            changed(trained="attn", layers=(0, 1)),
            r"student.trained: found 'attn' with student.layers \(0, 1\); expected '' or \(\)",
        ),
    ],
)
def test_settings_that_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        trained_patterns(config)


@pytest.mark.parametrize(
    "flags,message",
    [
        (("student.trained=to_x",), "student.trained: found 'to_x', which matches none of .* such"),
        (("critic.trained=to_x",), "critic.trained: found 'to_x', which matches none of"),
        (
            ("student.trained=attn", "critic.trained=ff", "critic.follow=0.1"),
            "critic.follow: found 0.1 and trained parameters of the student that are not the crit",
        ),
        (
            ("critic.trained=ff", "objective={'regression': {}}"),
            "critic.trained: found 'ff'; expected none: no critic",
        ),
    ],
)
def test_what_a_run_refuses(config, flags, message):
    with pytest.raises(InputError, match=message):
        prepared(config, *(f"--config.{flag}" for flag in flags), abstract=True)


def test_a_start_whose_rest_no_reader_finds_is_refused(config, tiny_pipeline, tmp_path):
    workdir = make_workdir(tmp_path / "run", tiny_pipeline)
    given = read_config([f"--config={config}", *PART, f"--config.student.init={workdir}"])
    with pytest.raises(InputError, match="student.trained: found .* expected a start at a pipelin"):
        validate(given)


def test_a_critic_of_the_same_part_follows(config):
    run = prepared(config, *PART, "--config.critic.follow=0.1", abstract=True)
    state = jax.eval_shape(run.start, run.initial_params)
    assert jax.tree.structure(state.params["critic"]) == jax.tree.structure(state.ema)


def test_a_pattern_of_several_is_what_all_train(backbone):
    """The rest that two roles share has what one of them does not train."""
    one, both = (split_frozen(backbone.params, (), p)[1] for p in (("/attn",), ("/attn", "2/")))
    assert not chosen(one, "/attn") and not chosen(both, "/attn2/") and chosen(both, "/attn1/")
    trained, rest = split_frozen(backbone.params, ("bias$",), ("/attn2/",))
    assert chosen(trained).keys() == flatten(trained).keys() and not chosen(trained, "bias")
    assert len(flatten(trained)) + len(flatten(rest)) == len(flatten(backbone.params))


if __name__ == "__main__":
    worker(*sys.argv[1:])
