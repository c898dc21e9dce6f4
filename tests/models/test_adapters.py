"""Adapters of a network: which kernels have one, what they start as, where they are placed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from gadjax.errors import InputError
from gadjax.models import mmdit, pixart, sana, unet
from gadjax.models.adapters import (
    Lora,
    abstract_adapters,
    adaptable,
    adapted,
    adapter_rules,
    adapters_from_arrays,
    init_adapters,
    is_adapter,
    merged,
)
from gadjax.models.module import functional
from gadjax.models.params import flatten
from gadjax.ops.linear import Adapter
from gadjax.parallel.sharding import AXES, shardings

# As published, but for the depth.
NETWORKS = {
    "pixart": (pixart.FAMILY, {"num_layers": 3}),
    "sana": (sana.FAMILY, {"num_layers": 3}),
    "mmdit": (mmdit.FAMILY, {"num_layers": 3, "dual_attention_layers": (0,)}),
    "unet": (
        unet.FAMILY,
        {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": (8, 8, 8, 8),
            "transformer_layers_per_block": (1, 1, 1, 1),
        },
    ),
}
BASE = {"blocks": {"to_q": {"kernel": np.ones((2, 6, 4), np.float16), "bias": np.ones((2, 4))}}}


@pytest.fixture(scope="module")
def abstract():
    made = {}

    def get(name):
        if name not in made:
            family, options = NETWORKS[name]
            config = family.config(**options)
            made[name] = functional(family.build(config)).abstract
        return made[name]

    return get


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_and_feed_forward_have_adapters(abstract, name):
    """By default: as people train them. Not modulation, embeddings, convolutions of a U-Net."""
    net = abstract(name)
    paths = flatten(abstract_adapters(net, Lora(8))).keys()
    ends = {"/".join(path.split("/")[-3:-1]) for path in paths}
    attention = {f"attn{i}/to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out")}
    streams = ("attn", "attn_context", "attn2")
    expected = {
        "pixart": attention | {"ff/linear_1", "ff/linear_2"},
        "unet": attention | {"ff/linear_1", "ff/linear_2"},
        "sana": attention | {"ff/conv_inverted", "ff/conv_point"},
        "mmdit": {f"{s}/to_{x}" for s in streams for x in ("q", "k", "v", "out")}
        | {f"{ff}/linear_{i}" for ff in ("ff", "ff_context") for i in (1, 2)},
    }
    assert ends == expected[name]
    # Depthwise convolutions have no low-rank difference over channels.
    every = flatten(abstract_adapters(net, Lora(8, targets=""))).keys()
    kernels = {path for path in flatten(net) if path.endswith("kernel")}
    assert kernels - every == {path for path in kernels if "conv_depth" in path}
    assert len(every) > len(paths)


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_split_as_their_kernels(abstract, name):
    """a along the kernel's inputs, b along its outputs, wherever the kernel is."""
    family, net = NETWORKS[name][0], abstract(name)
    mesh = AbstractMesh((1, 4, 2, 1), AXES)
    adapters = abstract_adapters(net, Lora(64, targets=""))
    kernels = {path: s.spec for path, s in flatten(shardings(net, family.rules, mesh)).items()}
    placed = flatten(shardings({"params": adapters}, adapter_rules(family.rules), mesh)["params"])
    split = 0
    for path, place in placed.items():
        ndim = len(flatten(net)[path].shape)
        *before, inputs, outputs = (*kernels[path], *(None,) * (ndim - len(kernels[path])))
        for found, expected, factor in (
            (place.a.spec, P(*before, inputs, None), flatten(adapters)[path].a),
            (place.b.spec, P(*before, None, outputs), flatten(adapters)[path].b),
        ):
            if factor.size < 2**16 or not any(expected):
                continue
            assert found == expected, path
            split += 1
    assert split > 5


@pytest.mark.parametrize("name", NETWORKS)
def test_no_half_is_whole_on_every_chip_where_fsdp_is_the_only_axis(abstract, name):
    """Half of them lie along the axis of a mesh's "tensor", which then splits nothing."""
    family, net = NETWORKS[name][0], abstract(name)
    adapters = abstract_adapters(net, Lora(64, targets=""))
    mesh = AbstractMesh((1, 8, 1, 1), AXES)
    placed = flatten(shardings({"params": adapters}, adapter_rules(family.rules), mesh)["params"])
    sizes = flatten(adapters)
    for path, place in placed.items():
        for half in ("a", "b"):
            large = getattr(sizes[path], half).size >= 2**16
            assert not large or "fsdp" in getattr(place, half).spec, (path, half)


def test_a_is_uniform_and_b_zero():
    net = {
        "x": {"kernel": jax.ShapeDtypeStruct((3, 400, 5), jnp.float32)},
        "y": {"kernel": jax.ShapeDtypeStruct((3, 3, 50, 5), jnp.float32)},
    }
    adapters = flatten(
        init_adapters(jax.random.key(0), abstract_adapters(net, Lora(16, 8.0, "kernel")))
    )
    for path, inputs in (("x/kernel", 400), ("y/kernel", 450)):
        adapter = adapters[path]
        assert adapter.scale == 0.5 and adapter.rank == 16 and not adapter.b.any()
        bound = 1 / np.sqrt(inputs)
        assert 0.99 * bound < np.abs(adapter.a).max() <= bound
        assert np.std(adapter.a) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert adapters["x/kernel"].b.shape == (3, 16, 5)
    assert adapters["y/kernel"].b.shape == (1, 1, 16, 5)


def test_merging_is_in_float32():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 3)), 1e-3 * rng.normal(size=(2, 3, 4))
    adapters = {"blocks": {"to_q": {"kernel": Adapter(*map(np.float32, (a, b)), 0.5)}}}
    whole = flatten(merged(BASE, adapters))
    assert all(leaf.dtype == np.float32 for leaf in whole.values())
    np.testing.assert_allclose(whole["blocks/to_q/kernel"], 1 + 0.5 * a @ b, rtol=3e-7)
    assert (
        flatten(adapted(BASE, adapters))["blocks/to_q/kernel"].base
        is BASE["blocks"]["to_q"]["kernel"]
    )


def test_targets_that_match_nothing():
    with pytest.raises(InputError, match="lora.targets: found 'to_x', which matches none of 1"):
        abstract_adapters(BASE, Lora(2, targets="to_x"))
    assert list(adaptable(BASE)) == ["blocks/to_q/kernel"]


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"a": np.ones((2, 6, 3))}, "found a; expected a and b"),
        ({"a": np.ones((2, 6, 3)), "b": np.ones((2, 3, 5))}, "found an adapter of shapes"),
        ({"a": np.ones((2, 6, 3)), "b": np.ones((2, 4, 4))}, "found an adapter of shapes"),
    ],
)
def test_adapters_of_another_network(arrays, message):
    with pytest.raises(InputError, match=f"blocks/to_q/kernel: {message}"):
        adapted(BASE, adapters_from_arrays({"blocks": {"to_q": {"kernel": arrays}}}, 1.0))
    arrays = {"a": np.ones((2, 6, 3)), "b": np.ones((2, 3, 4))}
    with pytest.raises(InputError, match="blocks/to_v/kernel: found an adapter; expected one of 1"):
        adapted(BASE, adapters_from_arrays({"blocks": {"to_v": {"kernel": arrays}}}, 1.0))
    assert is_adapter(adapters_from_arrays({"kernel": arrays}, 2.0)["kernel"])
