"""Students and critics that start at a LoRA of the teacher, and critics at another network."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from train_runs import losses, read_vector, train
from workdirs import make_workdir

from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.lora_names import layers_of
from gadjax.models.adapters import adapted
from gadjax.models.params import flatten
from gadjax.ops.linear import dense
from gadjax.pipelines.adapted import merge_loras
from gadjax.training.config import read_config
from gadjax.training.setup import prepare
from gadjax.training.workdir import read_trained

RANK = 4
LORA = f"--config.student.lora.rank={RANK}", "--config.student.lora.alpha=2.0"
RATE = "--config.optim.lr=0.03", "--config.critic.lr=0.03", "--config.steps=2"


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return read_pipeline(tiny_pipeline)


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    """Factors of rank 3 for some of the layers, with alphas."""
    rng = np.random.default_rng(0)
    layers = {n: x for n, x in layers_of(folder.components["transformer"]).items() if ".attn" in n}
    tensors = {}
    for name, layer in list(layers.items())[::3]:
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = rng.normal(size=(3, layer.shape[1]))
        tensors[f"{stem}.lora_up.weight"] = rng.normal(size=(layer.shape[0], 3))
        tensors[f"{stem}.alpha"] = np.array(1.5)
    path = tmp_path_factory.mktemp("loras") / "a.safetensors"
    save_file({key: x.astype(np.float32) for key, x in tensors.items()}, path)
    return path


def prepared(config, *flags):
    return prepare(read_config([f"--config={config}", *flags]))


def kernels(params):
    """Parameters with dense kernels, by path."""
    return {path: np.asarray(dense(leaf)) for path, leaf in flatten(params).items()}


def merged(folder, lora):
    params = {name: part.params for name, part in folder.components.items()}
    return kernels(merge_loras(folder, params, [(lora, 1.0)])[0]["transformer"])


@pytest.mark.parametrize("role", ["student", "critic"])
def test_adapters_go_on_from_a_lora(config, folder, lora, role):
    """On the teacher's base: kernels are those of the teacher with the LoRA; others still move."""
    run = prepared(config, *LORA, f"--config.{role}.init={lora}")
    assert run.bases == {"student": "transformer", "critic": "transformer"}
    assert "start" not in run.frozen and list(run.initial_params) == [role]
    state = jax.jit(run.start)(run.initial_params)
    other = "critic" if role == "student" else "student"
    complete = adapted(run.frozen["transformer"], state.params[role])
    expected = merged(folder, lora)
    for path, kernel in kernels(complete).items():
        np.testing.assert_allclose(kernel, expected[path], rtol=0, atol=1e-5, err_msg=path)
    assert all(not x.b.any() for x in flatten(state.params[other]).values())
    for adapter in flatten(state.params[role]).values():
        # Every column of every layer can learn: a or b is not zero.
        sizes = np.abs(adapter.a).sum(-2) + np.abs(adapter.b).sum(-1)
        assert adapter.rank == RANK and sizes.min() > 0
    assert run.inputs[f"{role}.init"] != run.fingerprint


def test_whole_weights_start_at_a_lora(config, folder, lora):
    run = prepared(config, f"--config.student.init={lora}")
    state = jax.jit(run.start)(run.initial_params)
    expected = merged(folder, lora)
    for path, value in flatten(state.params["student"]).items():
        np.testing.assert_array_equal(value, expected[path])
    plain = kernels(folder.components["transformer"].params)
    for path, value in flatten(state.params["critic"]).items():
        np.testing.assert_array_equal(value, plain[path])


@pytest.mark.slow
def test_a_critic_starts_at_another_network(config, tiny_pipeline, tmp_path):
    workdir = make_workdir(tmp_path / "run", tiny_pipeline)
    trained = read_trained(workdir).params
    init = f"--config.critic.init={workdir}"
    state = (run := prepared(config, init)).start(run.initial_params)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (state.params["critic"], trained))))
    assert not all(map(np.array_equal, *map(jax.tree.leaves, (state.params["student"], trained))))
    # Adapters are on it, once where the student's are on it too.
    run = prepared(config, init, *LORA)
    assert run.bases == {"student": "transformer", "critic": "critic/start"}
    run = prepared(config, init, *LORA, f"--config.student.init={workdir}")
    assert run.bases == {"student": "start", "critic": "start"} and "critic/start" not in run.frozen


@pytest.mark.slow
def test_a_run_from_a_lora(config, lora, tiny_pipeline, tmp_path):
    """It resumes to the bit, and its export is a LoRA of the teacher, read back as its start."""
    flags = *LORA, *RATE, f"--config.student.init={lora}"
    assert train(config, tmp_path / "run", *flags) == 0
    assert train(config, tmp_path / "half", *flags, "--config.steps=1") == 0
    assert train(config, tmp_path / "half", *flags) == 0
    for part in ("student", "critic", "ema"):
        np.testing.assert_array_equal(
            read_vector(tmp_path / "half", part), read_vector(tmp_path / "run", part)
        )
    assert losses(tmp_path / "half") == losses(tmp_path / "run")
    trained = read_trained(tmp_path / "run")
    assert trained.base == tiny_pipeline and not trained.on_start
    out = tmp_path / "out"
    assert main(["export", "--lora", "--workdir", str(tmp_path / "run"), "--out", str(out)]) == 0
    run = prepared(config, *LORA, f"--config.student.init={out}")
    start = kernels(adapted(run.frozen["transformer"], run.initial_params["student"]))
    _, params, _ = read_params(tmp_path / "run" / "checkpoints", "ema")
    flat = flatten(params)
    plain = kernels(run.frozen["transformer"])
    for path in {path.rsplit("/", 1)[0] for path in flat}:
        product = 0.5 * flat[f"{path}/a"] @ flat[f"{path}/b"]
        np.testing.assert_allclose(start[path] - plain[path], product, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_adapters_on_a_start_in_8_bits_resume_to_the_bit(config, tiny_pipeline, tmp_path):
    """As a repair trains them: the base is the start's, and another one's run is refused."""
    start = make_workdir(tmp_path / "start", tiny_pipeline)
    flags = *LORA, *RATE, "--config.int8=/(attn|ff)", f"--config.student.init={start}"
    assert train(config, tmp_path / "run", *flags) == 0
    assert train(config, tmp_path / "half", *flags, "--config.steps=1") == 0
    assert train(config, tmp_path / "half", *flags) == 0
    for part in ("student", "critic", "ema"):
        np.testing.assert_array_equal(
            read_vector(tmp_path / "half", part), read_vector(tmp_path / "run", part)
        )
    assert losses(tmp_path / "half") == losses(tmp_path / "run")
    assert train(config, tmp_path / "run", *flags[:-1], "--config.steps=3") == 2


def test_another_file_at_the_start_is_refused(config, lora, tmp_path, capsys):
    path, run = shutil.copy(lora, tmp_path / "a.safetensors"), tmp_path / "run"
    flags = f"{config}:regression", run, *LORA, f"--config.student.init={path}"
    assert train(*flags, "--config.steps=1") == 0
    tensors = load_file(path)
    save_file({key: np.asarray(2 * x) for key, x in tensors.items()}, path)
    assert train(*flags, "--config.steps=2") == 2
    assert f"student.init {path}: found other contents (fingerprint" in capsys.readouterr().err


def test_plan_reads_no_lora(config, lora):
    given = read_config([f"--config={config}", *LORA, f"--config.student.init={lora}"])
    run = prepare(given, abstract=True)
    assert run.bases["student"] == "transformer"
    assert jax.eval_shape(run.start, run.initial_params).params["student"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--config.student.lora.rank=2"], "student.init: found an adapter of .* of rank 3 in"),
        (
            ["--config.student.lora.targets=/ff/"],
            "of .* that the run does not train in .* expected",
        ),
        (
            ["--config.critic.init=nowhere"],
            "critic.init: found 'nowhere'; expected a diffusers fold",
        ),
        (
            ["--config.critic.init=asset:shapes_teacher", "--config.objective={'regression': {}}"],
            "critic.init: found 'asset:shapes_teacher'; expected none: no critic",
        ),
    ],
)
def test_what_is_refused(config, lora, flags, message):
    with pytest.raises(InputError, match=message):
        prepared(config, *LORA, f"--config.student.init={lora}", *flags)


def test_a_lora_of_a_text_encoder_is_no_start(config, folder, tmp_path):
    name, part = next((n, p) for n, p in folder.components.items() if n.startswith("text"))
    module, layer = next(iter(layers_of(part).items()))
    a, b = np.ones((2, layer.shape[1]), np.float32), np.ones((layer.shape[0], 2), np.float32)
    stem = f"{name}.{module}"
    path = tmp_path / "a.safetensors"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, path)
    with pytest.raises(InputError, match=f"student.init: found adapters of the {name} in"):
        prepared(config, *LORA, f"--config.student.init={path}")
