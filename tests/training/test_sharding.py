import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from gadjax.errors import InputError
from gadjax.models import pixart
from gadjax.models.module import cast, flatten, functional
from gadjax.training.sharding import check_batch, make_mesh, path_name, shardings
from gadjax.training.state import create

B, LENGTH, TEXT = 32, 5, 8
CONFIG = pixart.Config(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    sample_size=4,
    caption_channels=TEXT,
)
# eps: a bias of the keys has no gradient, and Adam would make steps of its rounding.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-3))


def tiny_run(mesh, microbatches):
    """Teacher, student and critic as PixArts of two blocks; prompts as random embeddings."""
    from gadjax.denoiser import Denoiser
    from gadjax.objectives import DMD, GAD, Anchor
    from gadjax.schedules import DDPM
    from gadjax.training.setup import Run
    from gadjax.training.steps import Recipe
    from gadjax.types import Cond

    net = functional(pixart.build(CONFIG, remat=False))
    rng = np.random.default_rng(0)
    teacher, student = (
        jax.tree.map(lambda p: np.float32(0.2 * rng.normal(size=p.shape)), net.abstract)
        for _ in range(2)
    )
    pipeline = SimpleNamespace(
        folder=SimpleNamespace(components={"transformer": SimpleNamespace(module=pixart)}),
        latent=(4, 4, 4),
        cond=lambda text, mask: Cond(text, mask, None),
    )
    optimizers = {"student": OPTIMIZER, "critic": OPTIMIZER}
    recipe = Recipe(
        denoiser=Denoiser(pixart.predictor(net.apply, CONFIG), DDPM(), "eps"),
        objective=DMD() + 0.5 * GAD(steps=2) + 0.05 * Anchor(steps=2),
        times=(899.0, 449.0, -1.0),
        guidance=3.0,
        optimizers=optimizers,
        ema=0.9,
        microbatches=microbatches,
    )
    null = {"text": rng.normal(size=(1, LENGTH, TEXT)), "mask": np.ones((1, LENGTH))}
    frozen = {"null": jax.tree.map(np.float32, null), "transformer": teacher}
    start = partial(tiny_state, student, optimizers)
    return Run(ConfigDict({"seed": 3}), pipeline, recipe, mesh, None, frozen, start, "")


def tiny_state(student, optimizers):
    return create({role: jax.tree.map(jnp.array, student) for role in optimizers}, optimizers)


def prompts(update):
    rng = np.random.default_rng([1, update])
    text = rng.normal(size=(B, LENGTH, TEXT)).astype(np.float32)
    return {"text": text, "mask": np.ones((B, LENGTH), np.float32)}


def worker(out: Path) -> None:
    """Two updates of each role on one device, and on eight in two arrangements."""
    from gadjax.training.setup import compile_steps
    from gadjax.training.sharding import batch_sharding

    assert len(jax.devices()) == 8
    for name, data, fsdp, microbatches in (
        ("one", 1, 1, 1),
        ("2x4", 2, 4, 1),
        ("8x1", 8, 1, 2),
    ):
        mesh = make_mesh({"data": data, "fsdp": fsdp}, jax.devices()[: data * fsdp])
        run = tiny_run(mesh, microbatches)
        steps = compile_steps(run)
        state = jax.device_put(run.start(), steps.state)
        frozen = jax.device_put(run.frozen, steps.frozen)
        compiled, metrics = {}, {}
        for update in range(4):
            role = "student" if update % 2 else "critic"
            raw = jax.device_put(prompts(update), batch_sharding(mesh))
            given = state, frozen, raw, jnp.uint32(update)
            if role not in compiled:
                compiled[role] = getattr(steps, role).lower(*given).compile()
            state, more = compiled[role](*given)
            metrics |= {f"{update}/{key}": float(value) for key, value in more.items()}
        specs = {path_name(p): str(v.sharding.spec) for p, v in leaves(state)}
        found = {path_name(p): np.asarray(v) for p, v in leaves(state)}
        np.savez(out / f"{name}.npz", **{k.replace("/", "|"): v for k, v in found.items()})
        flops = {role: step.cost_analysis()["flops"] for role, step in compiled.items()}
        (out / f"{name}.json").write_text(json.dumps([metrics, specs, flops]))


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name of the mesh -> state by path, metrics, PartitionSpecs."""
    out = tmp_path_factory.mktemp("sharded")
    flags = "--xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, __file__, str(out)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in ("one", "2x4", "8x1"):
        arrays = np.load(out / f"{name}.npz")
        state = {key.replace("|", "/"): arrays[key] for key in arrays.files}
        found[name] = state, *json.loads((out / f"{name}.json").read_text())
    return found


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
