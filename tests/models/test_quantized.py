"""8-bit kernels of networks: the dequantised network, its tangents, shardings, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from gadjax.diffusion.geometry import tangent
from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.models.adapters import TARGETS, adaptable
from gadjax.models.params import cast, flatten
from gadjax.models.quantized import quantized, quantized_rules
from gadjax.ops.linear import Quantized, dense, is_quantized
from gadjax.parallel.sharding import shardings
from gadjax.pipelines.pipeline import make_pipeline


@pytest.mark.parametrize("pattern", ["", TARGETS, "kernel"])
def test_which_kernels(tiny_pipeline, pattern):
    folder = read_pipeline(tiny_pipeline, components=("transformer",))
    params = folder.components["transformer"].params
    result = flatten(quantized(params, pattern))
    chosen = {path for path, leaf in result.items() if is_quantized(leaf)}
    if pattern == "kernel":
        assert chosen == adaptable(params).keys()
    assert bool(chosen) == bool(pattern)
    for path, leaf in flatten(params).items():
        if path not in chosen:
            assert result[path] is leaf


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sana", "sd15", "sd35"])
def test_a_network_is_the_dequantised_one(folders, family):
    """Outputs, tangents in the noise and gradients through both, in float64."""
    pipeline = make_pipeline(read_pipeline(folders(family)), dtype=jnp.float64)
    part, rng = pipeline.folder.components[pipeline.backbone], np.random.default_rng(0)
    low = quantized(part.params, "kernel")
    with jax.enable_x64(True):
        text = {name: cast(c.params, jnp.float64) for name, c in pipeline.folder.components.items()}
        cond = pipeline.encode_text(text, *pipeline.tokens(["a red circle"], 8))
        x, u = (jnp.asarray(rng.normal(size=(1, *pipeline.latent))) for _ in range(2))
        t = jnp.full(1, 400.0)

        @jax.jit
        def run(params):
            def both(x):
                return tangent(lambda x: pipeline.denoiser.raw(params, x, t, cond), x, u)

            def scalar(x):
                return sum(jnp.sum(jnp.sin(y)) for y in both(x))

            return both(x), jax.grad(scalar)(x)

        params = cast(low, jnp.float64)
        # Products of int8 and float32 are exact in float64.
        whole = jax.tree.map(
            lambda leaf: leaf.values * jnp.float64(leaf.scales.reshape(
                *leaf.scales.shape[:-1], *(1,) * (leaf.values.ndim - leaf.scales.ndim),
                leaf.scales.shape[-1]))
            if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
        )  # fmt: skip
        found, expected = (jax.tree.leaves(run(p)) for p in (params, whole))
        for one, other in zip(found, expected, strict=True):
            limit = 1e-10 * np.abs(other).max()
            np.testing.assert_allclose(one, other, rtol=0, atol=limit)
    assert any(not np.array_equal(dense(v), flatten(part.params)[k])
               for k, v in flatten(low).items() if isinstance(v, Quantized))  # fmt: skip


@pytest.mark.parametrize("family", ["sana", "sd15", "sd35"])
def test_values_are_sharded_as_the_kernel(folders, family):
    folder = read_pipeline(folders(family), components=())
    part = folder.components[folder.backbone]
    mesh = AbstractMesh((2, 2, 2, 1), ("data", "fsdp", "tensor", "sequence"))
    rules = tuple(part.family.rules)
    low = quantized(part.abstract, "kernel")
    placed = flatten(shardings({"params": low}, quantized_rules(rules) + rules, mesh)["params"])
    plain = flatten(shardings({"params": part.abstract}, rules, mesh)["params"])
    checked = 0
    for path, leaf in flatten(low).items():
        if not isinstance(leaf, Quantized):
            assert placed[path].spec == plain[path].spec
            continue
        assert placed[path].values.spec == plain[path].spec, path
        spec = placed[path].scales.spec
        assert len(spec) <= leaf.scales.ndim
        checked += spec != P()
    assert checked or family == "sd15"


@pytest.mark.parametrize(
    "pattern,message", [("(", "int8: found '\\('"), ("to_x", "matches none of")]
)
def test_refused_patterns(tiny_pipeline, pattern, message):
    folder = read_pipeline(tiny_pipeline, components=())
    with pytest.raises(InputError, match=message):
        quantized(folder.components["transformer"].abstract, pattern)
