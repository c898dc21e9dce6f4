"""Sequence sharding: collectives of a tangent's loss, and networks that refuse it."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from several import run_on_devices

from gadjax.diffusion.geometry import tangent
from gadjax.errors import InputError
from gadjax.models import pixart, unet
from gadjax.models.module import functional
from gadjax.parallel.placement import Placement, current_placement
from gadjax.parallel.sharding import (
    AXES,
    batch_sharding,
    make_mesh,
    shapes_with_shardings,
    shardings,
)

LENGTH, TEXT, LATENT = 5, 8, 32
CONFIG = pixart.FAMILY.config(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    sample_size=LATENT,
    caption_channels=TEXT,
)


def tangent_program():
    """A loss of a tangent and its gradient where four devices share every sample's positions."""
    net = functional(pixart.FAMILY.build(CONFIG))
    mesh = make_mesh({"sequence": 4}, jax.devices()[:4])

    def loss(params, x, v, text):
        def call(x):
            return net.apply(params, x, jnp.full(len(x), 500.0), text, jnp.ones(text.shape[:2]))

        return sum(jnp.mean(y**2) for y in tangent(call, x, v))

    shapes = (2, LATENT, LATENT, 4), (2, LATENT, LATENT, 4), (2, LENGTH, TEXT)
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=batch_sharding(mesh)) for s in shapes]
    params = shapes_with_shardings(net.abstract, shardings(net.abstract, pixart.FAMILY.rules, mesh))
    with current_placement(Placement(mesh)):
        return jax.jit(jax.grad(loss)).lower(params, *arrays).compile()


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)\("
)


@pytest.mark.slow
def test_only_keys_and_values_leave_a_share_of_positions(tmp_path):
    """Besides sums over positions: gradients of parameters and of the conditioning."""
    out = tmp_path / "program.hlo"
    run_on_devices(4, __file__, out)
    text = out.read_text()
    tokens, collectives = (LATENT // 2) ** 2, COLLECTIVE.findall(text)
    gathered = [shape for shape, kind in collectives if kind == "all-gather"]
    keys = f"f32[2,{tokens},2,8]"
    # Keys, values and their tangents, once forward and once in reverse, in a loop over blocks.
    assert len(gathered) == 8 and all(shape.startswith(keys) for shape in gathered)
    assert sum(kind == "reduce-scatter" for _, kind in collectives) == 4
    others = " ".join(shape for shape, kind in collectives if kind != "all-gather")
    assert {kind for _, kind in collectives} == {"all-gather", "all-reduce", "reduce-scatter"}
    sizes = [math.prod(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]", others)]
    assert max(sizes) <= 2 * tokens * 16 / 4
    # Nothing but keys and values has all positions of a sample.
    full_length = set(re.findall(rf"\w+\[2,{tokens},[\d,]*\]", text))
    assert full_length <= {keys}, full_length


UNET = "mesh.sequence: found 2; expected 1 for a UNet2DConditionModel, whose convolutions"


def test_a_unet_has_a_sample_on_one_device():
    from gadjax.training.pipeline_checks import check_sequence

    def pipeline(family):
        components = {"body": SimpleNamespace(family=family)}
        return SimpleNamespace(backbone="body", folder=SimpleNamespace(components=components))

    one, two = (AbstractMesh((1, 1, 1, n), AXES) for n in (1, 2))
    check_sequence(pipeline(unet.FAMILY), one)
    check_sequence(pipeline(pixart.FAMILY), two)
    with pytest.raises(InputError, match=UNET):
        check_sequence(pipeline(unet.FAMILY), two)


@pytest.mark.slow  # has diffusers make a pipeline
def test_a_run_of_a_unet_is_refused_before_it_begins(tmp_path):
    from families import make

    from gadjax.training.config import default_config
    from gadjax.training.setup import prepare

    (tmp_path / "prompts.txt").write_text("red circle\n")
    config = default_config()
    config.teacher = str(make("sd15", tmp_path / "sd15"))
    config.data.prompts = str(tmp_path / "prompts.txt")
    config.objective = {"dmd": {}}
    config.mesh.sequence = 2
    with pytest.raises(InputError, match=UNET):
        prepare(config, devices=jax.devices()[:1] * 2)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(tangent_program().as_text())
