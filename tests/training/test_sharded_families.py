"""Every backbone's loss of a tangent, and its gradient: eight devices against one, sharded over
samples and, except for the U-Net, over positions.

In float64: SANA's linear attention divides by sums of rectified products, and a sum taken in
another order moves its float32 gradients by 1e-4 of the largest.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from several import run_on_devices

from gadjax.diffusion import geometry
from gadjax.models import flux, flux2, layers, lumina2, mmdit, pixart, sana, unet, zimage
from gadjax.models.module import functional
from gadjax.models.params import flatten
from gadjax.parallel.placement import Placement, current_placement
from gadjax.parallel.sharding import AXES, make_mesh, shardings
from gadjax.types import Cond

pytestmark = pytest.mark.slow  # compiles every loss twice in float64
TEXT, SIDE, SAMPLES = 12, 8, 4
# Every sharded dimension divides by two, and leaves are as small as that lets them be.
FAMILIES = {
    "unet": (
        unet.FAMILY,
        {
            "sample_size": SIDE,
            "block_out_channels": [16, 24],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [2, 2],
            "transformer_layers_per_block": [1, 2],
            "cross_attention_dim": TEXT,
            "norm_num_groups": 4,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 10 + 36,
        },
    ),
    "sana": (
        sana.FAMILY,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 6,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": TEXT,
            "sample_size": SIDE,
            "patch_size": 1,
            "qk_norm": "rms_norm_across_heads",
        },
    ),
    "mmdit": (
        mmdit.FAMILY,
        {
            "sample_size": SIDE,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 6,
            "num_attention_heads": 4,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 6,
            "dual_attention_layers": [0],
            "qk_norm": "rms_norm",
        },
    ),
    "flux": (
        flux.FAMILY,
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 6,
            "num_attention_heads": 4,
            "axes_dims_rope": [2, 2, 2],
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": 10,
        },
    ),
    "flux2": (
        flux2.FAMILY,
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "axes_dims_rope": [2, 2, 2, 2],
            "joint_attention_dim": TEXT,
            "timestep_guidance_channels": 16,
            "guidance_embeds": False,
        },
    ),
    "pixart": (
        pixart.FAMILY,
        {
            "num_attention_heads": 4,
            "attention_head_dim": 6,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_size": SIDE,
            "caption_channels": TEXT,
            "norm_type": "ada_norm_single",
        },
    ),
    "lumina2": (
        lumina2.FAMILY,
        {
            "in_channels": 4,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "multiple_of": 16,
            "cap_feat_dim": TEXT,
            "axes_dim_rope": [2, 2, 2],
            "axes_lens": [40, 16, 16],
        },
    ),
    "zimage": (
        zimage.FAMILY,
        {
            "in_channels": 4,
            "dim": 24,
            "n_heads": 4,
            "n_kv_heads": 4,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "cap_feat_dim": TEXT,
            "axes_dims": [2, 2, 2],
            "axes_lens": [40, 16, 16],
        },
    ),
}


# As AXES; each takes eight devices. The text's five tokens stay together in the last two.
SAMPLEWISE, *POSITIONWISE = (2, 2, 2, 1), (1, 2, 2, 2), (1, 2, 1, 4)


def meshes(name):
    unsplittable = FAMILIES[name][0].no_sequence_sharding
    return (SAMPLEWISE,) if unsplittable else (SAMPLEWISE, *POSITIONWISE)


def worker(out: Path, name: str) -> None:
    assert len(jax.devices()) == 8
    jax.config.update("jax_enable_x64", True)
    family, cfg = FAMILIES[name]
    config = family.config.from_dict(cfg)
    net = functional(family.build(config, dtype=jnp.float64))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.2 * rng.normal(size=p.shape), net.abstract)
    extras = family.extras(config, SAMPLES, 64, 64, rng.normal(size=(SAMPLES, 10)))
    x, v = rng.normal(size=(2, SAMPLES, SIDE, SIDE, 4))
    text = rng.normal(size=(SAMPLES, 5, TEXT))
    cond = Cond(text, np.ones((SAMPLES, 5), np.int32), extras)
    predict = family.predictor(net.apply, config)

    method = family.text_kv

    def loss(ahead, params, x, v, cond):
        if ahead and method:
            cond = cond._replace(text=net.apply(params, cond.text, method=method))
        t_B = jnp.full(len(x), 500.0)
        value, moved = geometry.tangent(lambda x: predict(params, x, t_B, cond), x, v)
        return jnp.mean(value**2) + jnp.mean(moved**2)

    results, alone = {}, None
    for sizes in ((1, 1, 1, 1), *meshes(name)):
        devices = jax.devices()[: math.prod(sizes)]
        mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), devices)
        placed_at = shardings(params, family.rules, mesh)
        given = jax.device_put(params, placed_at)
        with current_placement(Placement(mesh)):
            # On one device the text is read where it is used, on all others ahead.
            of = partial(loss, alone is not None)
            value, grads = jax.jit(jax.value_and_grad(of))(given, x, v, cond)
        grads = {k: np.asarray(g) for k, g in flatten(grads).items()}
        if alone is None:
            one, alone = value, grads
            layers.MAX_CHUNK_ELEMENTS = 1  # from now on hidden layers are made in parts
            continue
        size = max(np.abs(g).max() for g in alone.values())
        error = max(np.abs(alone[k] - grads[k]).max() for k in alone) / size
        # The rules leave small leaves whole where they do not divide; most are split.
        split = sum(not s.is_fully_replicated for s in jax.tree.leaves(placed_at))
        result = {"value": abs(float(one) / float(value) - 1), "gradient": float(error)}
        results["x".join(map(str, sizes))] = result | {"split": split}
    (out / f"{name}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")

    def get(name):
        if not (out / f"{name}.json").exists():
            run_on_devices(8, __file__, out, name)
        return json.loads((out / f"{name}.json").read_text())

    return get


@pytest.mark.parametrize(
    "name,sizes", [(name, sizes) for name in FAMILIES for sizes in meshes(name)]
)
def test_eight_devices_equal_one(results, name, sizes):
    errors = results(name)["x".join(map(str, sizes))]
    assert errors["value"] <= 1e-12 and errors["gradient"] <= 1e-11, errors
    assert errors["split"] >= 10


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
