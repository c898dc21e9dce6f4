"""`gadjax plan` against sums over shapes and a real compilation for absent chips."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from published import write_folder

from gadjax.errors import InputError
from gadjax.models.params import flatten
from gadjax.ops.flops import flops
from gadjax.parallel import hardware
from gadjax.parallel.hardware import CHIPS, GIB, TOPOLOGIES, Chip, Topology, find_topology
from gadjax.plan import plan as planning
from gadjax.plan.plan import plan
from gadjax.plan.plan_table import table
from gadjax.plan.programs import Compiled, Programs
from gadjax.plan.traffic import traffic
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.config import read_config
from gadjax.training.setup import prepare
from gadjax.training.steps import critic_step, student_step

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = (
    "--config.batch=16",
    "--config.mesh.data=1",
    "--config.student.steps=1",
    "--config.student.timesteps=(999,)",
)


def shapes_config(*more, variant="dmd", fsdp=4):
    mesh = f"--config.mesh.fsdp={fsdp}"
    return read_config([f"--config={CONFIGS}/shapes_gad.py:{variant}", *SMALL, mesh, *more])


@pytest.fixture(scope="module")
def made():
    """A plan of the bundled teacher for four chips of a v5e, with its log lines."""
    pytest.importorskip("libtpu")
    lines = []
    return plan(shapes_config(), "v5e:2x2", utilisation=0.5, log=lines.append), lines


@pytest.fixture(scope="module")
def run():
    return prepare(shapes_config(fsdp=1), abstract=True, devices=jax.devices()[:1])


@pytest.mark.slow
def test_memory_held_by_a_chip(made, run):
    held = made[0]["memory"]["held"]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(run.initial_params["student"]))
    state = ("student parameters", "critic parameters", "optimizer moments", "EMA")
    biases = sum(
        v.size for k, v in flatten(run.initial_params["student"]).items() if k.endswith("bias")
    )
    assert biases < 0.02 * numbers
    # Student and critic, two moments of each, and the average. Every chip has all of the biases.
    assert numbers / 4 < sum(held[name] for name in state) / (4 * 7) < numbers / 4 + biases
    assert numbers / 4 < held["teacher"] / 4 < numbers / 4 + biases
    memory = made[0]["memory"]
    assert memory["peak"] == max(memory["step_peak"].values())
    for name in ("critic", "student"):
        assert memory["step_peak"][name] >= sum(held.values()) + memory["temporary"][name]
    assert 0 <= memory["padding"] < 0.1 * GIB
    assert memory["fits"] and memory["spare"] == memory["capacity"] - memory["peak"]


@pytest.mark.slow
def test_offloaded_arrays_are_not_on_the_chip():
    pytest.importorskip("libtpu")
    config = shapes_config("--config.offload=('optimizer','ema')", variant="regression")
    memory = plan(config, "v5e:2x2")["memory"]
    assert memory["held"]["EMA"] == memory["held"]["optimizer moments"] == 0 and memory["fits"]


@pytest.mark.slow
def test_operations_are_those_of_the_steps(made, run):
    state = jax.eval_shape(run.start, run.initial_params)
    raw = run.source.batch(0, 16)
    found = made[0]["flops"]
    for name, step in {"critic": critic_step, "student": student_step}.items():

        def update(state, frozen, raw, step=step):
            batch = make_batch(run.pipeline, frozen, raw, make_key(0), 0)
            return step(run.step_spec, state, run.networks(frozen), batch)

        assert found["step"][name] == flops(update, state, run.frozen, raw)
    assert made[0]["updates"] == {"critic": 2, "student": 1}
    assert found["update"] == 2 * found["step"]["critic"] + found["step"]["student"]
    assert found["image"] == found["update"] / 16
    speed = 0.5 * 197e12 / found["image"]
    assert made[0]["images_per_second_per_chip"] == pytest.approx(speed)
    assert made[0]["images_per_second"] == pytest.approx(4 * speed)


@pytest.mark.slow
def test_traffic_of_a_step(made, run):
    sent, numbers = (
        made[0]["traffic"],
        sum(leaf.size for leaf in jax.tree.leaves(run.initial_params["student"])),
    )
    assert sent["unknown_loops"] == 0
    for step in sent["step"].values():
        assert step["all-gather"] > 0 and step["all-reduce"] > 0
        # Gradients, but no partial sums of activations: 1.5 numbers for each of theirs.
        assert step["all-reduce"] < 2 * 4 * numbers
    per_step = {name: sum(step.values()) for name, step in sent["step"].items()}
    assert sent["update"] == 2 * per_step["critic"] + per_step["student"]
    replicated = made[0]["replicated"]
    assert 0 < replicated["elements"] < 2**16 and "/" in replicated["name"]


def test_the_table_and_json_agree(made):
    found, lines = made
    assert json.loads(json.dumps(found)) == found
    text = table(found)
    for words in ("at 50% of its peak", "fits, with", "GiB sent", "EMA", "largest parameter"):
        assert words in text
    assert "ESTIMATE" not in text and not found["estimate"]
    assert [line.split()[0] for line in lines] == ["compiling"] * 2 + ["compiled"] * 2


def test_topologies_have_the_chips_of_their_table():
    pytest.importorskip("libtpu")
    for chip, sizes in TOPOLOGIES.items():
        for size in sizes:
            target = find_topology(f"{chip}:{size}")
            assert len(target.devices()) == target.count, target
            assert target.chip == CHIPS[chip] and not target.estimate


def test_cards_are_an_estimate_without_a_plugin_for_them(monkeypatch):
    monkeypatch.setattr(hardware, "CUDA_PLUGINS", ("jax_plugins.none",))
    assert find_topology("gpu:8") == Topology("gpu:8", CHIPS["h100"], 8, True)
    assert len(jax.devices()) < 4096
    with pytest.raises(InputError, match="expected 4096, one for each card"):
        find_topology("a100-80:4096").devices()


def test_cards_are_compiled_for_where_a_plugin_is(monkeypatch):
    monkeypatch.setattr(hardware, "CUDA_PLUGINS", ("json.decoder",))
    assert not find_topology("h200:16").estimate
    assert hardware.TARGETS.keys() == set(hardware.GPUS)

    def asked(platform, target_config, topology):
        assert platform == "cuda" and "major: 9" in target_config
        assert 'device_description_str: "NVIDIA H200"' in target_config
        raise NotImplementedError(f"no {topology}\nhere")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", asked)
    text = refused(shapes_config(), "h200:16")
    assert "does not compile for h200:16 without a card (no 1x2x8 here)" in text
    assert "(no 1x1x12 here)" in refused(shapes_config(), "h200:12")


@pytest.mark.slow
def test_a_program_for_absent_cards():
    if not hardware._has_cuda():
        pytest.skip("no CUDA plugin of JAX: 180 MB that no requirement asks for")
    found = plan(shapes_config(fsdp=8), "h100:8")
    assert not found["estimate"] and found["memory"]["fits"] and found["memory"]["peak"] > 0
    assert found["traffic"]["step"]["student"]["all-gather"] > 0
    assert found["flops"] == plan(shapes_config(fsdp=8), "v5e:2x4")["flops"]


def refused(config, topology, **options) -> str:
    with pytest.raises(InputError) as error:
        plan(config, topology, log=lambda text: pytest.fail(text), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e", "gpu:0", "gpu", "h200:x", "tpu:2x2", ""])
def test_an_unknown_topology(name):
    text = refused(shapes_config(), name)
    assert f"--topology: found {name!r}; expected" in text and "8x16" in text and "b200" in text


@pytest.mark.parametrize("share", [0, -1, 1.01, 40, math.nan])
def test_an_invalid_share_of_the_peak(share):
    assert "--utilisation: found" in refused(shapes_config(), "v5e:2x2", utilisation=share)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "(pip install libtpu)" in refused(shapes_config(), "v5e:2x2")


def test_a_mesh_that_does_not_divide():
    pytest.importorskip("libtpu")
    assert "(mesh.fsdp=4 would, where 3 does not)" in refused(shapes_config(fsdp=3), "v5e:2x2")


def test_a_state_larger_than_the_chip(monkeypatch):
    monkeypatch.setitem(CHIPS, "h100", Chip("h100", 2**20, 1e12))
    text = refused(shapes_config(fsdp=1), "gpu:1")
    assert "that every chip has to hold (optimizer moments" in text and "raise mesh.fsdp" in text


class FakePrograms:
    """Programs that take `a + c * batch / 8` of a chip of 100 bytes, from 4 shares."""

    def __init__(self, run, a, c, reports=True):
        self.run, self.a, self.c, self.reports = run, a, c, reports
        self.target = Topology("", Chip("", 100, 1), 8, False)
        self.compiled = []

    def compile(self, name, batch, log):
        self.compiled.append(batch)
        peak = self.a + self.c * batch / 8
        return Compiled(peak <= 100, peak if peak <= 100 or self.reports else None, 1, 1, "", 0.0)


@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("first", [8, 24, 800])
def test_the_largest_batch(first, reports):
    mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    run = SimpleNamespace(mesh=mesh, step_spec=SimpleNamespace(microbatches=1))
    programs = FakePrograms(run, 20.5, 7, reports)
    done = {"critic": programs.compile("critic", 8, None)._replace(peak=1.0)}
    done["student"] = programs.compile("student", first, None)
    found = planning._largest(programs, first, done, None)
    assert found["step"] == "student" and found["batch"] % 8 == 0
    if reports:
        assert found["batch"] == 88  # 20.5 + 7 * 11 = 97.5
    assert 8 <= found["batch"] <= 88 and found["peak"] == 20.5 + 7 * found["batch"] / 8
    assert len(programs.compiled) <= 3 + planning.MAX_TRIES
    if first == 24:  # two for the line, and one that the line predicts
        assert programs.compiled == [8, 24, 48, 88]


def test_nothing_fits():
    mesh = jax.sharding.AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor"))
    run = SimpleNamespace(mesh=mesh, step_spec=SimpleNamespace(microbatches=2))
    programs = FakePrograms(run, 200, 7)
    found = planning._largest(programs, 16, {"student": programs.compile("", 16, None)}, None)
    assert found["batch"] == 0 and found["peak"] is None


@pytest.mark.parametrize(
    "text,size",
    [
        ("required for HLO temporaries (600.50G) exceeds available HBM (15.75G).", 600.5),
        ("Ran out of memory in memory space hbm. Used 22.0G of 15.75G hbm. Exceeded", 22.0),
        ("Ran out of memory", None),
    ],
)
def test_a_program_that_the_compiler_refuses(text, size):
    """A result, not an error: the compiler's message, and the memory it asked for."""

    class Step:
        def lower(self, *arguments):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}\nmore")

    run = SimpleNamespace(mesh=jax.make_mesh((1,), ("data",)))
    target = Topology("", Chip("", 100, 1), 1, False)
    programs = Programs(run, {"student": Step()}, (None, None), lambda batch: {}, target)
    found = programs.compile("student", 8, lambda text: None)
    assert not found.fits and found.text == f"RESOURCE_EXHAUSTED: {text}"
    assert found.peak == (size and size * GIB)


def test_a_compiler_that_fails_is_one_line():
    class Step:
        def lower(self, *arguments):
            raise jax.errors.JaxRuntimeError("INTERNAL: a value overlaps with another\nmore")

    run = SimpleNamespace(mesh=jax.make_mesh((1,), ("data",)))
    target = Topology("", Chip("", 100, 1), 1, False)
    programs = Programs(run, {"student": Step()}, (None, None), lambda batch: {}, target)
    with pytest.raises(InputError, match="^batch: found 8, for which the compiler fails on the"):
        programs.compile("student", 8, lambda text: None)


PROGRAM = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%deep (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %middle = bf16[16] fusion(%start), kind=kCustom, calls=%hidden.2
  %r = f32[8]{0:T(128)} all-reduce(%x), replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %r)
}

%deep_condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%hidden.1 (p: bf16[4]) -> (bf16[4], bf16[16]) {
  %a = bf16[16]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %t = (bf16[4], bf16[16]) custom-call(%p, %a), custom_call_target="AsyncCollectiveStart"
}

%hidden.2 (p: bf16[4]) -> bf16[16] {
  ROOT %a = bf16[16] all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
}

%body (p: (s32[], f32[8], /*index=2*/f32[2])) -> (s32[], f32[8], f32[2]) {
  %start = (bf16[4], bf16[16]) fusion(%w), kind=kCustom, calls=%hidden.1
  %end = bf16[16] fusion(%start), kind=kCustom, calls=%hidden.2
  %inner = (s32[], f32[8]) while(%t), condition=%deep_condition, body=%deep
  ROOT %t = (s32[], f32[8], f32[2]) tuple(%i, %x, %y)
}

%condition (p: (s32[], f32[8], f32[2])) -> pred[] {
  ROOT %c = pred[] compare(%i, %j), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8], f32[2]) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"28"},"flag_configs":[]}
  %g = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %h = f32[8]{0} all-gather-done(%g)
  %s = f32[2,3]{1,0} reduce-scatter(%q), replica_groups={{0,1},{2,3}}, to_apply=%add
  %m = (f32[8]{0}, bf16[8]{0}) all-reduce(%p, %b), replica_groups={{0,1,2,3}}, to_apply=%add
  %x = (f32[5], f32[5], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %y = f32[5] collective-permute-done(%x)
  ROOT %o = f32[8] add(%h, %h)
}
"""


def test_traffic_of_a_program():
    found = traffic(PROGRAM, 4)
    assert found.unknown == 0
    assert found.sent == {
        "all-gather": 28 * 16 * 2 * 3 / 4 + 8 * 4 * 3 / 4,
        "reduce-scatter": 6 * 4 * 1,
        # Five times in each of the 28, on rings of two; then on one of four.
        "all-reduce": 28 * 5 * (2 * 8 * 4 / 2) + 2 * (8 * 4 + 8 * 2) * 3 / 4,
        "collective-permute": 5 * 4,
    }
    unknown = traffic(PROGRAM.replace('"known_trip_count":{"n":"28"},', ""), 4)
    assert unknown.unknown == 1
    assert unknown.sent["all-gather"] == 16 * 2 * 3 / 4 + 8 * 4 * 3 / 4


def test_a_program_of_this_machine_sends_nothing():
    done = jax.jit(lambda x: jnp.sum(x @ x)).lower(jnp.ones((8, 8))).compile()
    assert traffic(done.as_text(), 1) == ({}, 0)


@pytest.mark.slow
def test_a_published_network_within_minutes(tmp_path):
    """PixArt-XL-2-512x512 from its configurations, on sixteen chips."""
    pytest.importorskip("libtpu")
    folder = write_folder("PixArt-XL-2-512x512", tmp_path)
    config = read_config(
        [
            f"--config={CONFIGS}/pixart_gad.py",
            f"--config.teacher={folder}",
            "--config.batch=16",
            "--config.microbatch=16",
            "--config.mesh.data=1",
            "--config.mesh.fsdp=16",
        ]
    )
    start = time.perf_counter()
    found = plan(config, "v5e:4x4", log=print)
    print(table(found))
    print(f"{time.perf_counter() - start:.0f} s")
    held = found["memory"]["held"]
    assert held["student parameters"] == pytest.approx(4 * 610_856_096 / 16, rel=0.02)
    assert held["teacher"] == pytest.approx(2 * 610_856_096 / 16, rel=0.02)
    assert found["memory"]["fits"]
    assert found["replicated"]["elements"] < 2**20
