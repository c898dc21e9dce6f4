"""The T5 encoder against transformers' class: values, derivatives, key names, shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conformance import Published, Rules, torch_reference
from conformance_text import TextEncoderCase, TextEncoderSuite, TextSize, last_hidden_state
from transformers.models.t5.modeling_t5 import T5Attention

from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models.params import flatten
from gadjax.models.text import t5

# SD3's third text encoder.
XXL = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}
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
WITHOUT_GATES = dict(feed_forward_proj="relu", dense_act_fn="relu", is_gated_act=False)
TIED = "encoder.embed_tokens.weight"


def encoder(sizes, proj):
    return sizes | {"architectures": ["T5EncoderModel"], "feed_forward_proj": proj}


def torch_encoder(cfg):
    """transformers' network, with a table of positions that is as large as the other logits."""
    network = transformers.T5EncoderModel(transformers.T5Config(**cfg))
    with torch.no_grad():
        network.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    return network


def without_tied_copy(state):
    """Tensors as they are written: the table of tokens under one of its two keys."""
    assert TIED in state
    return {k: v for k, v in state.items() if k != TIED}


CASE = TextEncoderCase(
    family=t5.FAMILY,
    torch_network=torch_encoder,
    torch_outputs=last_hidden_state,
    file_keys=without_tied_copy,
    sizes={
        f"{name}, {proj}": TextSize(encoder(sizes, proj), lengths, total)
        for name, sizes, lengths, total in (
            ("small", SMALL, (7, 1, 13), 13),
            ("large", LARGE, (200, 131), 200),
        )
        for proj in t5.ACTIVATIONS
    },
    tiny=TextSize(encoder(SMALL, "gated-gelu"), (9, 4), 11),
    published={
        "XXL": Published(XXL, 4_762_310_656, 219),
        "XXL without gates": Published(XXL | WITHOUT_GATES, 3_755_677_696, 195),
    },
    rules=Rules(
        mesh={"fsdp": 128, "tensor": 64},
        complete=True,
        replicated=("relative_attention_bias/embedding",),
    ),
    refused_in=SMALL,
    refused=[
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


class TestT5(TextEncoderSuite):
    case = CASE


@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 60), (64, 200), (8, 1000)])
def test_buckets_are_torchs_at_every_distance(buckets, distance):
    length = 600
    relative = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    ref = T5Attention._relative_position_bucket(relative, True, buckets, distance)
    np.testing.assert_array_equal(t5.position_buckets(length, buckets, distance), ref.numpy())


def test_gradient_is_that_of_torch():
    model = CASE.random_torch_network(CASE.tiny.config)
    net, params = CASE.network(CASE.tiny.config), CASE.params(model, CASE.tiny.config)
    ((ids, mask),) = CASE.inputs(CASE.tiny)
    weights = np.random.default_rng(2).standard_normal((2, 11, 24)).astype(np.float32)
    hidden = model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state
    (hidden * torch.from_numpy(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, ids, mask) * weights)))(params)
    ours = dict(tensors_from_params(grads, t5.FAMILY.keymap))
    expected = {k: p.grad.numpy() for k, p in model.named_parameters()}
    assert set(ours) == set(expected)
    for key, ref in expected.items():
        assert np.isfinite(ours[key]).all()
        assert np.abs(ours[key] - ref).max() <= 2e-5 * np.abs(ref).max(), key


@pytest.mark.parametrize("size", CASE.sizes)
def test_config_of_transformers_is_read(size):
    written = torch_reference(CASE, size).config.to_dict()
    assert CASE.config(written) == CASE.config(CASE.sizes[size].config)


def test_fresh_parameters_have_t5s_scales():
    cfg = SMALL | dict(d_model=256, d_kv=32, d_ff=512)
    params = flatten(jax.jit(CASE.network(cfg).init)(jax.random.key(0)))
    for path, std in {
        "shared/embedding": 1.0,
        "blocks/attention/q/kernel": (256 * 32) ** -0.5,
        "blocks/attention/o/kernel": (3 * 32) ** -0.5,
        "blocks/feed_forward/wo/kernel": 512**-0.5,
    }.items():
        assert float(params[path].std()) == pytest.approx(std, rel=0.05)
    first, second = params["blocks/attention/q/kernel"]
    assert not np.array_equal(first, second)


def test_absent_size_is_named():
    with pytest.raises(InputError, match="d_ff: found no such key"):
        t5.Config.from_dict({k: v for k, v in SMALL.items() if k != "d_ff"})


def test_sd3s_t5_is_read_with_and_without_the_tied_copy():
    config = CASE.config(XXL)
    assert (config.num_layers, config.d_model, config.gated) == (24, 4096, True)
    small = XXL | dict(d_ff=40, d_kv=5, d_model=24, num_heads=3, num_layers=2, vocab_size=50)
    abstract, keymap = CASE.network(small).abstract, t5.FAMILY.keymap
    shapes = {k: shape for k, (_, _, shape) in expected_shapes(abstract, keymap).items()}
    r = np.random.default_rng(0)
    tensors = {k: r.standard_normal(shape).astype(np.float16) for k, shape in shapes.items()}
    assert "shared.weight" in tensors
    for more in ({}, {TIED: tensors["shared.weight"]}):
        params = params_from_tensors(tensors | more, abstract, keymap)
        np.testing.assert_array_equal(params["shared"]["embedding"], tensors["shared.weight"])
