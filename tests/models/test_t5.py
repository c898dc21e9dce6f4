import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models.module import functional
from gadjax.models.params import cast, flatten
from gadjax.models.text import t5

torch.set_num_threads(1)

SMALL = dict(
    vocab_size=50, d_model=24, d_kv=5, num_heads=3, d_ff=40, num_layers=2, layer_norm_epsilon=1e-5
)
LARGE = dict(
    vocab_size=97,
    d_model=48,
    d_kv=16,
    num_heads=5,
    d_ff=72,
    num_layers=3,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=60,
)
XXL = dict(vocab_size=32128, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24)


def torch_encoder(sizes, proj, seed=0):
    """The reference with random parameters, norm scales and tables too."""
    torch.manual_seed(seed)
    model = transformers.T5EncoderModel(
        transformers.T5Config(feed_forward_proj=proj, **sizes)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p))
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    return model


def ported(model, **options):
    config = t5.Config.from_dict(model.config.to_dict())
    net = functional(t5.build(config, **options))
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    return net, params_from_tensors(tensors, net.abstract, t5.KEYMAP)


@torch.no_grad()
def reference(model, ids, mask):
    return model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.numpy()


def batch(vocab, lengths, total):
    ids = np.random.default_rng(1).integers(3, vocab, (len(lengths), total)).astype(np.int32)
    mask = (np.arange(total) < np.array(lengths)[:, None]).astype(np.int32)
    return ids * mask, mask


@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
@pytest.mark.parametrize(
    "sizes, lengths, total", [(SMALL, (7, 1, 13), 13), (LARGE, (200, 131), 200)]
)
def test_matches_torch_at_every_position(sizes, lengths, total, proj):
    model = torch_encoder(sizes, proj)
    net, params = ported(model)
    ids, mask = batch(sizes["vocab_size"], lengths, total)
    ref = reference(model, ids, mask)
    out = np.asarray(jax.jit(net.apply)(params, ids, mask))
    assert out.shape == ref.shape and out.dtype == np.float32
    assert np.abs(out - ref).max() <= 1e-5 * np.abs(ref).max()


@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 60), (64, 200), (8, 1000)])
def test_buckets_are_torchs_at_every_distance(buckets, distance):
    length = 600
    relative = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    ref = T5Attention._relative_position_bucket(relative, True, buckets, distance)
    np.testing.assert_array_equal(t5.position_buckets(length, buckets, distance), ref.numpy())


def test_gradient_is_that_of_torch():
    model = torch_encoder(SMALL, "gated-gelu")
    net, params = ported(model)
    ids, mask = batch(50, (9, 4), 11)
    weights = np.random.default_rng(2).standard_normal((2, 11, 24)).astype(np.float32)
    hidden = model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state
    (hidden * torch.from_numpy(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, ids, mask) * weights)))(params)
    ours = dict(tensors_from_params(grads, t5.KEYMAP))
    expected = {k: p.grad.numpy() for k, p in model.named_parameters()}
    assert set(ours) == set(expected)
    for key, ref in expected.items():
        assert np.isfinite(ours[key]).all()
        assert np.abs(ours[key] - ref).max() <= 2e-5 * np.abs(ref).max(), key


def test_computes_in_bfloat16():
    model = torch_encoder(SMALL, "gated-gelu")
    net, params = ported(model, dtype=jnp.bfloat16, remat=False)
    ids, mask = batch(50, (9, 4), 11)
    out = jax.jit(net.apply)(cast(params, jnp.bfloat16), ids, mask)
    assert out.dtype == jnp.bfloat16
    ref = reference(model, ids, mask)
    assert np.abs(np.asarray(out, np.float32) - ref).max() <= 0.05 * np.abs(ref).max()


def test_xxl_inventory_is_that_of_torch():
    config = t5.Config.from_dict(XXL | {"feed_forward_proj": "gated-gelu"})
    abstract = functional(t5.build(config)).abstract
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 4_762_310_656
    with torch.device("meta"):
        model = transformers.T5EncoderModel(
            transformers.T5Config(feed_forward_proj="gated-gelu", **XXL)
        )
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    del expected["encoder.embed_tokens.weight"]
    ours = {k: shape for k, (_, _, shape) in expected_shapes(abstract, t5.KEYMAP).items()}
    assert ours == expected and len(ours) == 219


def test_one_rule_shards_every_leaf_of_xxl():
    mesh = {"fsdp": 128, "tensor": 64}
    for proj in t5.ACTIVATIONS:
        config = t5.Config.from_dict(XXL | {"feed_forward_proj": proj})
        for path, leaf in flatten(functional(t5.build(config)).abstract).items():
            found = [spec for pattern, spec in t5.RULES if re.search(pattern, path)]
            assert len(found) == 1, path
            assert len(found[0]) == leaf.ndim, path
            for size, axis in zip(leaf.shape, found[0], strict=True):
                assert axis is None or size % mesh[axis] == 0, path
            assert "fsdp" in found[0] or leaf.size <= 2**16, path


def test_tied_copy_is_ignored_and_never_written():
    model = torch_encoder(SMALL, "relu")
    net, params = ported(model)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    assert "encoder.embed_tokens.weight" in tensors
    written = dict(tensors_from_params(params, t5.KEYMAP))
    assert set(written) == set(tensors) - {"encoder.embed_tokens.weight"}
    for key, value in written.items():
        np.testing.assert_array_equal(value, tensors[key])


def test_fresh_parameters_have_t5s_scales():
    config = t5.Config.from_dict(SMALL | dict(d_model=256, d_kv=32, d_ff=512))
    params = flatten(jax.jit(functional(t5.build(config)).init)(jax.random.key(0)))
    for path, std in {
        "shared/embedding": 1.0,
        "blocks/attention/q/kernel": (256 * 32) ** -0.5,
        "blocks/attention/o/kernel": (3 * 32) ** -0.5,
        "blocks/feed_forward/wo/kernel": 512**-0.5,
    }.items():
        assert float(params[path].std()) == pytest.approx(std, rel=0.05)
    first, second = params["blocks/attention/q/kernel"]
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "key, value",
    [
        ("feed_forward_proj", "gated-silu"),
        ("dense_act_fn", "gelu"),
        ("model_type", "umt5"),
        ("is_decoder", True),
        ("d_model", "24"),
        ("num_layers", 0),
        ("d_kv", None),
        ("relative_attention_num_buckets", 30),
        ("relative_attention_max_distance", 8),
    ],
)
def test_unsupported_config_is_named(key, value):
    with pytest.raises(InputError, match=key):
        t5.Config.from_dict(SMALL | {key: value})


def test_absent_size_is_named():
    with pytest.raises(InputError, match="d_ff: found no such key"):
        t5.Config.from_dict({k: v for k, v in SMALL.items() if k != "d_ff"})
