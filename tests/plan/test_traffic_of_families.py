"""What chips send one another in an update: of every family by its roles and adapters, and on the
devices of one process and of two."""

import json
import sys
from pathlib import Path

import jax
import pytest
from families import EMBEDDED, LENGTH, TIMES
from several import TESTS_PATH, start
from tiny_run import config_file

from gadjax.parallel.hardware import find_topology
from gadjax.plan.programs import build_programs
from gadjax.plan.traffic import traffic
from gadjax.runtime.distributed import initialize_distributed
from gadjax.runtime.supervisor import free_port
from gadjax.training.config import read_config
from gadjax.training.setup import prepare

pytestmark = pytest.mark.slow  # compiles up to three updates of every family for a TPU
CHIPS = 8
FAMILIES = "pixart_sigma", "sd15", "sana", "sd35", "flux_dev", "z_image", "lumina2", "flux2_klein"
# One teacher evaluation and no critic; and both with a second one of the teacher.
ALONE = {"regression": {"steps": 1}}
ROLES = {"dmd": {}, "gad": {"steps": 1}, "anchor": {"steps": 1}}


def sent(programs, name: str) -> tuple[dict[str, float], int]:
    """Bytes that a chip sends in an update, by kind, and loops of unknown length."""
    arguments = programs.arguments(programs.run.batch)
    text = programs.steps[name].lower(*arguments).compile().as_text()
    return traffic(text, CHIPS)


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture
def student_update(folders, tmp_path):
    """(family, objective, rank) -> bytes that a chip sends, and the parameters of each role."""
    pytest.importorskip("libtpu")

    def get(family, objective, rank=0):
        (tmp_path / "prompts.txt").write_text("a red circle\na blue square above the green one\n")
        path = config_file(
            tmp_path / "config.py",
            teacher=str(folders(family)),
            guidance=2.0,
            student={
                "steps": len(TIMES[family]),
                "timesteps": TIMES[family],
                "guidance": EMBEDDED.get(family, 1.0),
                "lora": {"rank": rank},
            },
            objective=objective,
            batch=CHIPS,
            data={"prompts": str(tmp_path / "prompts.txt"), "length": LENGTH.get(family, 77)},
            mesh={"data": 1, "fsdp": CHIPS},
        )
        target = find_topology("v5e:2x4")
        run = prepare(read_config([f"--config={path}"]), abstract=True, devices=target.devices())
        found, unknown = sent(build_programs(run, target), "student")
        assert not unknown
        roles = jax.eval_shape(run.start, run.initial_params).params
        return sum(found.values()), roles

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_traffic_grows_by_roles_and_adapters_by_no_more_than_their_size(student_update, family):
    (alone, networks), (whole, roles) = (student_update(family, part) for part in (ALONE, ROLES))
    adapted, adapters = student_update(family, ROLES, 2)
    network = size(networks["student"])
    assert roles.keys() == adapters.keys() == {"student", "critic"}
    # With -s: the row of docs/performance.md.
    print(family, network, size(adapters["student"]), alone, whole, adapted)
    # The critic is gathered once, and the teacher once more.
    assert alone > 0 and whole - alone < 2 * network
    # Each is gathered at most forward and in reverse, and the student's gradient is summed.
    assert adapted - whole < 4 * size(adapters["student"])


def worker(config: str, out: str) -> None:
    """Write what an update sends between all processes' devices."""
    initialize_distributed()
    flags = f"--config={config}:all", "--config.mesh.data=2", "--config.mesh.fsdp=4"
    assert len(jax.devices()) == CHIPS
    programs = build_programs(prepare(read_config(flags), abstract=True), None)
    found = {name: sent(programs, name) for name in programs.steps}
    Path(f"{out}-{jax.process_index()}").write_text(json.dumps(found))


def test_two_processes_send_what_one_does(config, tmp_path):
    found = {}
    for count in (1, 2):
        out, port = tmp_path / f"of_{count}", free_port()
        command = [__file__, str(config), str(out)]
        processes = [
            start(command, i, count, port, CHIPS // count, PYTHONPATH=TESTS_PATH)
            for i in range(count)
        ]
        for process in processes:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
        found[count] = [json.loads(path.read_text()) for path in tmp_path.glob(f"of_{count}-*")]
    assert len(found[1]) == 1 and found[2] == 2 * found[1]
    for kinds, unknown in found[1][0].values():
        assert kinds["all-gather"] > 0 and not unknown


if __name__ == "__main__":
    worker(*sys.argv[1:])
