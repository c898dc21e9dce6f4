"""Every text encoder on eight devices against one, with its parameters sharded by its rules.

In float64, so that sums in another order do not hide an error.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from several import run_on_devices

from gadjax.models.module import functional
from gadjax.models.text import clip, gemma2, qwen3, t5
from gadjax.parallel.placement import BATCH_AXES, Placement, current_placement
from gadjax.parallel.sharding import AXES, make_mesh, shardings

pytestmark = pytest.mark.slow
VOCABULARY, LENGTH, SAMPLES = 40, 6, 4
CAUSAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
ENCODERS = {
    "clip": (
        clip.FAMILY,
        {
            "architectures": ["CLIPTextModelWithProjection"],
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 8,
            "projection_dim": 8,
            "hidden_act": "quick_gelu",
            "eos_token_id": 2,
        },
    ),
    "t5": (
        t5.FAMILY,
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "gemma2": (
        gemma2.FAMILY,
        CAUSAL
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": None,
            "sliding_window": 64,
        },
    ),
    "qwen3": (qwen3.FAMILY, CAUSAL | {"hidden_act": "silu"}),
}
# As AXES; each takes eight devices.
MESHES = (2, 2, 2, 1), (1, 8, 1, 1), (1, 2, 2, 2)


def worker(out: Path, name: str) -> None:
    jax.config.update("jax_enable_x64", True)
    family, cfg = ENCODERS[name]
    net = functional(family.build(family.config.from_dict(cfg), dtype=jnp.float64))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape), net.abstract)
    ids = rng.integers(3, VOCABULARY, (SAMPLES, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) < np.array([6, 3, 5, 2])[:, None]).astype(np.int32)
    alone = jax.device_get(jax.jit(net.apply)(params, ids, mask))
    results = {}
    for sizes in MESHES:
        mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
        placed_at = shardings(params, family.rules, mesh)
        of_batch = jax.NamedSharding(mesh, jax.P(BATCH_AXES if sizes[1] < 8 else None))
        with current_placement(Placement(mesh)):
            given = jax.device_put((params, ids, mask), (placed_at, of_batch, of_batch))
            outputs = jax.device_get(jax.jit(net.apply)(*given))
        pairs = list(zip(*map(jax.tree.leaves, (outputs, alone)), strict=True))
        error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)
        split = sum(not s.is_fully_replicated for s in jax.tree.leaves(placed_at))
        results["x".join(map(str, sizes))] = {"error": float(error), "split": split}
    out.write_text(json.dumps(results))


@pytest.mark.parametrize("name", ENCODERS)
def test_eight_devices_equal_one(name, tmp_path):
    run_on_devices(8, __file__, tmp_path / "results.json", name)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(MESHES)
    for sizes, result in results.items():
        assert result["error"] <= 1e-12 and result["split"] >= 5, (sizes, result)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
