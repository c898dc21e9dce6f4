"""Students and critics as low-rank adapters on the teacher's frozen weights."""

import shutil

import jax
import numpy as np
import pytest
from checkpoints import state
from train_runs import losses, read_vector, rows, train

from gadjax import load
from gadjax.checkpoints.leaves import leaves_by_name
from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.models.adapters import TARGETS, Lora
from gadjax.models.params import flatten
from gadjax.parallel.hardware import Chip, Topology
from gadjax.plan.plan import _held
from gadjax.plan.programs import build_programs
from gadjax.training.compile import compile_steps
from gadjax.training.config import default_config, read_config
from gadjax.training.lora import loras
from gadjax.training.setup import prepare
from gadjax.training.workdir import read_trained

RANK = 4
LORA = f"--config.student.lora.rank={RANK}", "--config.student.lora.alpha=2.0"
KERNELS = 10  # of the tiny network: two attentions of four, and two of the feed-forward
PARTS = "student", "critic", "ema"


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run of four steps of DMD, GAD and anchor."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    assert train(config, workdir, *LORA) == 0
    return workdir


@pytest.fixture(scope="module")
def run(config):
    return prepare(read_config([f"--config={config}", *LORA]))


def test_a_checkpoint_has_adapters_alone(trained, run, tiny_pipeline):
    for part in PARTS:
        _, params, _ = read_params(trained / "checkpoints", part)
        flat = flatten(params)
        assert len(flat) == 2 * KERNELS and all(x.dtype == np.float32 for x in flat.values())
        assert all(path.rsplit("/", 1)[0].endswith("/kernel") for path in flat)
        assert all(np.abs(x).max() > 0 for x in flat.values())  # b has moved from zero
    numbers = sum(x.size for x in flat.values())
    names = leaves_by_name(jax.eval_shape(run.start, run.initial_params))
    # Student, critic and average, two moments of each but the last; counters are single numbers.
    total = sum(leaf.size for leaf in names.values() if leaf.size > 1)
    assert total == 7 * numbers and run.initial_params == {}
    base = read_pipeline(tiny_pipeline, components=("transformer",)).components["transformer"]
    assert numbers < 0.25 * sum(x.size for x in jax.tree.leaves(base.params))


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_teacher(config, trained, tmp_path):
    """As of a run that trains whole weights: nothing is changed yet, to the bit."""
    assert train(config, tmp_path / "whole", "--config.steps=1") == 0
    whole, adapted = rows(tmp_path / "whole")[0], rows(trained)[0]
    names = [k for k in whole if k.startswith("loss/") or k.endswith("/loss") or "gad/" in k]
    # The critic has had one update before the student's first.
    before = [k for k in names if "dmd" not in k and k != "student/loss"]
    assert len(before) >= 5
    for name in before:
        assert adapted[name] == whole[name], name
    assert adapted["student/grad_norm"] != whole["student/grad_norm"]
    assert losses(trained)[4] != losses(trained)[1]


@pytest.mark.slow
def test_it_resumes_to_the_bit(config, trained, tmp_path):
    assert train(config, tmp_path / "run", *LORA, "--config.steps=2") == 0
    assert train(config, tmp_path / "run", *LORA) == 0
    for part in PARTS:
        np.testing.assert_array_equal(
            read_vector(tmp_path / "run", part), read_vector(trained, part)
        )
    assert losses(tmp_path / "run") == losses(trained)


def test_another_rank_or_base_is_refused(config, trained, tiny_pipeline, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert train(config, copy, "--config.student.lora.rank=8") == 2
    assert "student.lora.rank: found 4, asked for 8" in capsys.readouterr().err
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    network = read_pipeline(base, components=("transformer",)).components["transformer"]
    path = network.weights.files[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        InputError, match="found weights with fingerprint .*; expected .*, with which"
    ):
        load(trained, teacher=base)
    text = (copy / "config.json").read_text().replace(str(tiny_pipeline), str(base))
    (copy / "config.json").write_text(text)
    assert train(config, copy, *LORA, f"--config.teacher={base}", "--config.steps=5") == 2
    assert "found weights of fingerprint" in capsys.readouterr().err


@pytest.mark.slow
def test_microbatches_are_the_batch(config, trained, tmp_path):
    assert train(config, tmp_path / "run", *LORA, "--config.microbatch=4", "--config.steps=2") == 0
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(losses(trained)[step], rel=1e-5)
    found, expected = rows(tmp_path / "run")[1], rows(trained)[1]
    for name in ("student/grad_norm", "critic/grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_it_is_exported_merged(trained, tiny_pipeline, tmp_path):
    """In float32, checked by the export against diffusers, as it is sampled here."""
    out = tmp_path / "out"
    assert main(["export", "--workdir", str(trained), "--out", str(out)]) == 0
    before, after = state(tiny_pipeline, "transformer"), state(out, "transformer")
    _, params, _ = read_params(trained / "checkpoints", "ema")
    flat = flatten(params)
    for layer in range(2):
        key = f"transformer_blocks.{layer}.attn2.to_out.0.weight"
        a, b = (flat[f"blocks/attn2/to_out/kernel/{x}"][layer] for x in "ab")
        difference = (after[key] - before[key]).numpy()
        assert np.abs(difference).max() > 1e-5
        np.testing.assert_allclose(difference, 0.5 * (a @ b).T, rtol=0, atol=1e-7)
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert len(changed) == 2 * KERNELS
    assert load(trained).fingerprint == load(out).fingerprint != load(tiny_pipeline).fingerprint
    assert read_trained(trained).lora == Lora(RANK, 2.0, TARGETS)


def test_only_adapters_are_held_beside_one_base(run):
    """`gadjax plan`: the base once, and 4 bytes of each number of the adapters' state."""
    chip = Topology("", Chip("", 2**30, 1e12), 1, False)
    held = _held(build_programs(run, chip), 8)
    numbers = sum(x.size for x in jax.tree.leaves(jax.eval_shape(run.start, {}).params["student"]))
    base = sum(x.nbytes for x in jax.tree.leaves(run.frozen["transformer"]))
    assert held["student parameters"] == held["critic parameters"] == held["EMA"] == 4 * numbers
    assert held["optimizer moments"] == pytest.approx(4 * 4 * numbers, rel=1e-3)
    assert held["teacher"] == base and "untrained" not in run.frozen


@pytest.mark.slow
@pytest.mark.parametrize("student,critic", [(RANK, 0), (0, RANK), (RANK, 2 * RANK)])
def test_each_role_has_its_own_rank(config, tmp_path, student, critic):
    """Whole weights beside adapters, and adapters of two ranks, on one frozen base."""
    flags = f"--config.student.lora.rank={student}", f"--config.critic.lora.rank={critic}"
    assert train(config, tmp_path / "run", *flags, "--config.steps=2") == 0
    for part, rank in (("student", student), ("critic", critic)):
        _, params, _ = read_params(tmp_path / "run" / "checkpoints", part)
        flat = flatten(params)
        if rank:
            assert {x.shape[-1] for k, x in flat.items() if k.endswith("/a")} == {rank}
        else:
            assert "blocks/ff/linear_1/kernel" in flat and len(flat) > 2 * KERNELS
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run").values())


def test_a_base_without_a_teacher_in_the_loss(config):
    """Plain denoising has no teacher; its weights are the base all the same."""
    flags = (
        "--config.data.prompts=",
        "--config.data.world=gadjax.worlds.shapes",
        "--config.preview.every=0",
    )
    given = read_config([f"--config={config}", *LORA, *flags])
    given.objective = {"denoising": {}}
    given.teacher, given.guidance = "asset:shapes_teacher", 4.0
    run = prepare(given, abstract=True)
    assert not run.step_spec.objective.needs.uses_teacher
    assert run.pipeline.backbone in run.frozen and run.initial_params == {}
    assert compile_steps(run).critic is None


def changed(**student):
    config = default_config()
    config.student.update(student)
    return config


def test_what_is_none_for_the_critic_is_the_students():
    assert loras(default_config()) == {}
    config = changed(lora={"rank": 4, "alpha": 8.0})
    assert loras(config) == {"student": Lora(4, 8.0), "critic": Lora(4, 8.0)}
    assert loras(config)["student"].scale == 2
    config.critic.lora.update({"rank": 16, "targets": "attn"})
    assert loras(config)["critic"] == Lora(16, 8.0, "attn")
    config.critic.lora.rank = 0
    assert loras(config).keys() == {"student"}
    assert loras({"student": {"timesteps": [1]}}) == {}  # an older workdir's


@pytest.mark.parametrize(
    "student,message",
    [
        ({"lora": {"rank": -1}}, "student.lora.rank: found -1; expected 1 to 8192, or 0 to train"),
        ({"lora": {"rank": 4, "alpha": 0.0}}, "student.lora.alpha: found 0.0; expected a number"),
        ({"lora": {"rank": 4, "targets": "("}}, r"student.lora.targets: found '\('"),
        (
            {"lora": {"rank": 4}, "init": "random"},
            "student.init: found 'random' with student.lora.rank 4; expected the weights",
        ),
    ],
)
def test_settings_that_are_refused(student, message):
    with pytest.raises(InputError, match=message):
        loras(changed(**student))


def test_targets_that_match_nothing(config):
    given = read_config([f"--config={config}", *LORA, "--config.student.lora.targets=to_x"])
    with pytest.raises(InputError, match="lora.targets: found 'to_x', which matches none of"):
        prepare(given)
