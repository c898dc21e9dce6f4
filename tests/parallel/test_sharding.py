import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from several import run_on_devices

from gadjax.errors import InputError
from gadjax.models import layers, pixart
from gadjax.models.adapters import Lora, abstract_adapters
from gadjax.models.module import functional
from gadjax.models.params import flatten
from gadjax.models.quantized import quantized
from gadjax.parallel.placement import batch_shards
from gadjax.parallel.sharding import AXES, check_batch, make_mesh, path_name, shardings
from gadjax.training.state import create_state

B, LENGTH, TEXT = 32, 5, 8
CONFIG = pixart.FAMILY.config(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    sample_size=4,
    caption_channels=TEXT,
)
# eps: biases of keys have no gradient, and Adam would turn their rounding into steps.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-3))


def tiny_run(mesh, microbatches, offload=(), rank=0):
    """Run with PixArts of two blocks as teacher, student and critic; random prompt embeddings.

    rank: of the adapters of student and critic, on a base whose attentions are in 8 bits; 0: whole
      networks.
    """
    from gadjax.diffusion.denoiser import Denoiser
    from gadjax.diffusion.schedules import DDPM
    from gadjax.objectives import DMD, GAD, Anchor
    from gadjax.training.state import StepSpec
    from gadjax.types import Cond

    net = functional(pixart.FAMILY.build(CONFIG, remat=False))
    rng = np.random.default_rng(0)
    trained = abstract_adapters(net.abstract, Lora(rank, 2.0)) if rank else net.abstract
    teacher, student = (
        jax.tree.map(lambda p: np.float32(0.2 * rng.normal(size=p.shape)), shapes)
        for shapes in (net.abstract, trained)
    )
    pipeline = SimpleNamespace(
        folder=SimpleNamespace(components={"transformer": SimpleNamespace(family=pixart.FAMILY)}),
        latent=(4, 4, 4),
        cond=lambda text, mask, pooled: Cond(text, mask),
        backbone="transformer",
    )
    optimizers = {"student": OPTIMIZER, "critic": OPTIMIZER}
    step_spec = StepSpec(
        denoiser=Denoiser(
            pixart.FAMILY.predictor(net.apply, CONFIG),
            DDPM(),
            "eps",
            text_kv=partial(net.apply, method=pixart.FAMILY.text_kv),
        ),
        objective=DMD() + 0.5 * GAD(steps=2) + 0.05 * Anchor(steps=2),
        times=(899.0, 449.0, -1.0),
        guidance=3.0,
        optimizers=optimizers,
        ema=0.9,
        microbatches=microbatches,
        batch_shards=batch_shards(mesh),
    )
    teacher = quantized(teacher, "/attn" if rank else "")
    null = {"text": rng.normal(size=(1, LENGTH, TEXT)), "mask": np.ones((1, LENGTH))}
    frozen = {"null": jax.tree.map(np.float32, null), "transformer": teacher}
    names = "teacher", *(("student/base", "critic/base") if rank else ())
    # The attributes of a Run that compile_steps reads.
    return SimpleNamespace(
        seed=3,
        order=("critic", "student"),
        offload=offload,
        kernels="",
        pipeline=pipeline,
        step_spec=step_spec,
        mesh=mesh,
        frozen=frozen,
        initial_params={"student": student},
        networks=lambda frozen: dict.fromkeys(names, frozen["transformer"]),
        start=lambda p: create_state(
            {role: jax.tree.map(jnp.copy, p["student"]) for role in optimizers}, optimizers
        ),
    )


def prompts(update):
    rng = np.random.default_rng([1, update])
    text = rng.normal(size=(B, LENGTH, TEXT)).astype(np.float32)
    return {"text": text, "mask": np.ones((B, LENGTH), np.float32)}


LORA = "lora on "  # before the mesh of a run with adapters
# Mesh (as AXES) -> microbatches, roles (one is enough for the last two, for compilation's sake),
# what is offloaded to the host's memory.
MESHES = {
    "1x1x1x1": (1, ("student", "critic"), ()),
    "2x2x2x1": (1, ("student", "critic"), ()),
    "8x1x1x1": (2, ("student",), ("teacher", "optimizer", "ema")),
    "1x2x2x2": (1, ("student",), ()),
    f"{LORA}1x1x1x1": (1, ("student", "critic"), ()),
    f"{LORA}2x2x2x1": (2, ("student", "critic"), ("teacher",)),
}


def worker(out: Path, adapted: bool) -> None:
    """Run two student updates, then two of the critic, on every mesh with adapters or without."""
    from gadjax.parallel.sharding import batch_sharding
    from gadjax.training.compile import compile_steps

    assert len(jax.devices()) == 8
    for name in meshes(adapted):
        microbatches, roles, offload = MESHES[name]
        sizes = name.removeprefix(LORA).split("x")
        sizes = dict(zip(AXES, map(int, sizes), strict=True))
        mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
        run = tiny_run(mesh, microbatches, offload, rank=4 if LORA in name else 0)
        steps = compile_steps(run)
        state = jax.device_put(run.start(run.initial_params), steps.state)
        frozen = jax.device_put(run.frozen, steps.frozen)
        metrics, flops = {}, {}
        # Eight devices compute a hidden layer in parts, one device at once.
        layers.MAX_CHUNK_ELEMENTS = 2**24 if mesh.size == 1 else 2**4
        for role in roles:
            step = None
            for update in range(2):
                raw = jax.device_put(prompts(update), batch_sharding(mesh))
                inputs = state, frozen, raw, jnp.uint32(update)
                step = step or getattr(steps, role).lower(*inputs).compile()
                state, more = step(*inputs)
                metrics |= {f"{update}/{k}": np.asarray(v).tolist() for k, v in more.items()}
            flops[role] = step.cost_analysis()["flops"]
        specs = {path_name(p): str(v.sharding.spec) for p, v in leaves(state)}
        actual = {path_name(p): np.asarray(v) for p, v in leaves(state)}
        np.savez(out / f"{name}.npz", **{k.replace("/", "|"): v for k, v in actual.items()})
        kinds = {path_name(p): v.sharding.memory_kind for p, v in leaves(state)}
        (out / f"{name}.json").write_text(json.dumps([metrics, specs, flops, kinds]))


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def meshes(adapted: bool) -> list[str]:
    """Meshes of the runs with adapters, or of those without."""
    return [name for name in MESHES if (LORA in name) == adapted]


def results(out: Path, adapted: bool) -> dict[str, tuple]:
    """Results of these meshes: state by path, metrics, PartitionSpecs, FLOPs per device."""
    run_on_devices(8, __file__, out, *(["adapted"] if adapted else []))
    actual = {}
    for name in meshes(adapted):
        arrays = np.load(out / f"{name}.npz")
        state = {key.replace("|", "/"): arrays[key] for key in arrays.files}
        actual[name] = state, *json.loads((out / f"{name}.json").read_text())
    return actual


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return results(tmp_path_factory.mktemp("sharded"), False)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return results(tmp_path_factory.mktemp("adapted"), True)


@pytest.mark.parametrize("name", ["2x2x2x1", "8x1x1x1", "1x2x2x2"])
def test_eight_devices_equal_one(trained, name):
    check_equals_one(trained, name)


@pytest.mark.slow
def test_eight_devices_equal_one_with_adapters(adapted):
    name = f"{LORA}2x2x2x1"
    check_equals_one(adapted, name)
    specs, kernel = adapted[name][2], "blocks/attn1/to_q/kernel"
    for state in ("params/student/", "params/critic/", "ema/", "opt/student/1/0/mu/"):
        assert specs[f"{state}{kernel}/a"] == str(P(None, "fsdp", None))
        assert specs[f"{state}{kernel}/b"] == str(P(None, None, "tensor"))
    assert not any(path.endswith(("kernel", "bias")) for path in specs)


def check_equals_one(trained, name):
    alone = f"{LORA}1x1x1x1" if LORA in name else "1x1x1x1"
    (one, metrics, *_), (eight, same, *_) = trained[alone], trained[name]
    net = functional(pixart.FAMILY.build(CONFIG, remat=False))
    count = 2 * 10 if LORA in name else len(flatten(net.abstract))  # a and b of ten kernels
    assert len(one) == len(eight) > 7 * count
    largest = max(float(np.abs(v).max()) for k, v in one.items() if "/mu/" in k)
    checked = 0
    for key, a in one.items():
        if "critic" not in MESHES[name][1] and "critic" in key:
            continue
        size = np.abs(a).max()
        if "/mu/" in key or "/nu/" in key:
            # Gradients that cancel, as those of key biases, consist of rounding.
            floor = largest if "/mu/" in key else largest**2
            np.testing.assert_allclose(eight[key], a, rtol=0, atol=1e-5 * size + 1e-6 * floor)
        else:
            np.testing.assert_allclose(eight[key], a, rtol=0, atol=1e-6 * size, err_msg=key)
        checked += 1
    assert checked >= 4 * count
    assert int(one["step"]) == int(eight["step"]) == 2
    for key, value in same.items():
        # A single sample's loss has more rounding than their mean.
        more = 1e-5 * np.abs(metrics[key]).max() if key.endswith("loss_B") else 0
        np.testing.assert_allclose(value, metrics[key], rtol=1e-5, atol=more, err_msg=key)


def test_state_keeps_its_shardings(trained):
    specs = trained["2x2x2x1"][2]
    kernel = "blocks/attn1/to_q/kernel"
    assert specs[f"params/student/{kernel}"] == str(P(None, "fsdp", "tensor"))
    assert specs[f"params/student/{kernel}"] == specs[f"ema/{kernel}"]
    assert sum("fsdp" in spec for spec in specs.values()) > 50


def test_offloaded_arrays_are_in_host_memory(trained):
    for key, kind in trained["8x1x1x1"][4].items():
        assert (kind == "pinned_host") == key.startswith(("opt/", "ema/")), key
    assert set(trained["2x2x2x1"][4].values()) == {"device"}


def test_flops_are_split_over_devices(trained):
    """Each device does an eighth of the FLOPs, up to those per parameter and those that both
    devices of "tensor" do (norms, modulation; a third of so small a network's other work); with
    microbatches (whose loop is counted once) an eighth of a microbatch's."""
    alone = trained["1x1x1x1"][3]
    for role in ("student", "critic"):
        assert trained["2x2x2x1"][3][role] < 1.5 * alone[role] / 8
    assert trained["8x1x1x1"][3]["student"] < 1.6 * alone["student"] / 16


MESH = AbstractMesh((2, 4), ("data", "fsdp"))
BIG, SMALL = jax.ShapeDtypeStruct((512, 256), np.float32), jax.ShapeDtypeStruct((6, 4), np.float32)


def spec_of(tree, rules, mesh=MESH):
    return jax.tree.map(lambda s: s.spec, shardings(tree, rules, mesh))


def test_first_matching_rule_decides():
    rules = ((r"^a/w$", P("fsdp", None)), (r"w$", P(None, "fsdp")), (r"(^|/)b$", P()))
    tree = {"a": {"w": BIG, "b": SMALL}, "x": {"a": {"w": BIG}, "w": BIG}}
    actual = spec_of(tree, rules)
    assert actual["a"] == {"w": P("fsdp", None), "b": P()}
    # A network's path is nested in a state's path.
    assert actual["x"] == {"a": {"w": P("fsdp", None)}, "w": P(None, "fsdp")}
    assert spec_of({"w": BIG}, ((r"w", P("tensor", "fsdp")),)) == {"w": P(None, "fsdp")}


def test_large_replicated_leaf_is_sharded():
    def actual(*shape):
        return spec_of({"b": jax.ShapeDtypeStruct(shape, np.float32)}, ((r"b", P()),))["b"]

    assert actual(30, 2304) == P(None, "fsdp")  # fsdp = 4 divides it
    assert actual(28, 2305, 2) == P("fsdp")
    assert actual(31, 2305) == P()
    assert actual(28, 2304) == P()  # 64,512 elements


def test_large_leaf_without_rule_is_refused():
    assert spec_of({"a": SMALL}, ()) == {"a": P()}
    with pytest.raises(InputError, match=r"found no rule for b/c \(512, 256\)"):
        shardings({"a": SMALL, "b": {"c": BIG}}, ((r"^c$x", P()),), MESH)


def test_indivisible_axis_is_refused():
    odd = jax.ShapeDtypeStruct((510, 256), np.float32)
    with pytest.raises(InputError, match=r"mesh.fsdp: found 4; expected a divisor of 510 \(w\)"):
        shardings({"w": odd}, ((r"w", P("fsdp", None)),), MESH)
    # Small leaves are replicated instead.
    assert spec_of({"w": SMALL}, ((r"w", P("fsdp", None)),)) == {"w": P()}


def test_moments_and_ema_are_sharded_like_parameters():
    run = tiny_run(MESH, 1)
    state = jax.eval_shape(run.start, run.initial_params)
    actual = {
        path_name(path): s.spec for path, s in leaves(shardings(state, pixart.FAMILY.rules, MESH))
    }
    params_specs = {
        path_name(path): s.spec
        for path, s in leaves(shardings(state.params["student"], pixart.FAMILY.rules, MESH))
    }
    assert sum("fsdp" in str(spec) for spec in params_specs.values()) > 10
    for path, spec in params_specs.items():
        same = [s for key, s in actual.items() if f"/{path}" in key and key.endswith(path)]
        exact = [
            actual[f"{before}{path}"]
            for before in (
                "params/student/",
                "params/critic/",
                "ema/",
                "opt/student/1/0/mu/",
                "opt/student/1/0/nu/",
                "opt/critic/1/0/mu/",
                "opt/critic/1/0/nu/",
            )
        ]
        assert exact == [spec] * 7 and len(same) >= 7


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3, "fsdp": 1},
        {"data": -1, "fsdp": 2},
        {"data": -1, "fsdp": 0},
        {"data": -1, "fsdp": -1},
        {"data": -2, "fsdp": -4},
    ],
)
def test_mesh_of_another_size_is_refused(sizes):
    count = 8 if sizes["data"] == -2 else 1
    with pytest.raises(InputError, match=f"expected sizes that multiply to {count} devices"):
        make_mesh(sizes, jax.devices()[:1] * count)


def test_one_mesh_size_is_inferred():
    mesh = make_mesh({"data": 1, "fsdp": -1}, jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}


def test_indivisible_batches_are_refused():
    assert check_batch(64, 16, MESH) == 4 and check_batch(64, 64, MESH) == 1
    with pytest.raises(InputError, match=r"found 24; expected a divisor of batch \(64\)"):
        check_batch(64, 24, MESH)
    with pytest.raises(InputError, match="found 0; expected a divisor"):
        check_batch(64, 0, MESH)
    with pytest.raises(InputError, match="found 4; expected a multiple of the mesh's 8 shares"):
        check_batch(64, 4, MESH)


def test_negative_prompt_embeddings_need_no_rule():
    """Those of T5-XXL are half a million numbers, but no parameters."""
    from gadjax.training.compile import compile_steps

    run = tiny_run(make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1]), 1)
    run.frozen["null"]["text"] = np.zeros((1, 120, 4096), np.float32)
    assert compile_steps(run).frozen["null"]["text"].spec == P()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), "adapted" in sys.argv[2:])


def test_slices_split_the_data_axis():
    pytest.importorskip("libtpu")
    from gadjax.parallel.hardware import find_topology

    devices = find_topology("2*v5e:2x2").devices()
    mesh = make_mesh({"data": -1, "fsdp": 2}, devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    assert [{d.slice_index for d in share.flat} for share in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(InputError, match="mesh.data: found 1; expected a multiple of the 2 slices"):
        make_mesh({"data": 1, "fsdp": 8}, devices)
