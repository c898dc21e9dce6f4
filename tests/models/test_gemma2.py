"""Gemma 2 against transformers' class: values, positions, key names, shardings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conformance import Published, Rules, relative, torch_reference
from conformance_text import TextEncoderCase, TextEncoderSuite, TextSize, last_hidden_state

from gadjax.errors import InputError
from gadjax.models.module import functional
from gadjax.models.params import cast
from gadjax.models.text import causal, gemma2

# The config.json of all Sana repositories.
REAL = {
    "_name_or_path": "Efficient-Large-Model/gemma-2-2b-it",
    "architectures": ["Gemma2Model"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 256000,
}

SMALL = REAL | dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    query_pre_attn_scalar=7,
    attn_logit_softcapping=2.0,
    sliding_window=16,
)
# One head of keys for all queries, and none shared.
LARGE = SMALL | dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=1,
    head_dim=16,
    query_pre_attn_scalar=24,
    rms_norm_eps=1e-4,
    rope_theta=500.0,
    sliding_window=200,
)
UNSHARED = SMALL | dict(num_attention_heads=3, num_key_value_heads=3, attn_logit_softcapping=50.0)


def torch_config(cfg):
    return transformers.Gemma2Config(**{k: v for k, v in cfg.items() if k[0] != "_"})


def torch_encoder(cfg):
    """transformers' network, whose attention has the soft cap."""
    network = transformers.Gemma2Model(torch_config(cfg))
    assert network.config._attn_implementation == "eager"
    return network


def last_padded_on_the_left(cfg, ids, mask):
    mask[-1] = mask[-1, ::-1]
    return [(ids * mask, mask)]


CASE = TextEncoderCase(
    family=gemma2.FAMILY,
    torch_network=torch_encoder,
    torch_outputs=last_hidden_state,
    arguments=last_padded_on_the_left,
    sizes={
        "small": TextSize(SMALL, (7, 1, 16, 9), 16),
        "large": TextSize(LARGE, (200, 131, 190), 200),
        "unshared": TextSize(UNSHARED, (5, 3), 6),
    },
    tiny=TextSize(SMALL, (9, 4), 11),
    published={"2b": Published(REAL, 2_614_341_888, 288)},
    rules=Rules(mesh={"fsdp": 32, "tensor": 2}, complete=True),
    refused_in=SMALL,
    refused=[
        ("architectures", ["Gemma2ForCausalLM"]),
        ("model_type", "gemma3_text"),
        ("hidden_activation", "silu"),
        ("attention_bias", True),
        ("use_bidirectional_attention", True),
        ("attn_logit_softcapping", None),
        ("sliding_window", None),
        ("hidden_size", 24.0),
        ("num_key_value_heads", 3),
        ("head_dim", 9),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 2.0}),
    ],
)


class TestGemma2(TextEncoderSuite):
    case = CASE


def test_the_soft_cap_and_the_positions_matter():
    model = torch_reference(CASE, "small")
    params = CASE.params(model, SMALL)
    (arguments,) = CASE.inputs(TextSize(SMALL, (7, 9), 12))
    (expected,) = last_hidden_state(model, *arguments)
    for key, value in (("attn_logit_softcapping", 50.0), ("rope_theta", 100.0)):
        other = CASE.network(SMALL | {key: value})
        assert relative(other.apply(params, *arguments), expected) > 1e-4, key


@pytest.mark.parametrize("width, theta", [(256, 10_000.0), (10, 10_000.0), (16, 500.0)])
def test_frequencies_are_those_of_transformers(width, theta):
    config = torch_config(SMALL | dict(head_dim=width, rope_theta=theta))
    model = transformers.models.gemma2.modeling_gemma2.Gemma2RotaryEmbedding(config)
    ours = causal.frequencies(width, theta)
    assert ours.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, model.inv_freq.numpy(), 1)


def test_bfloat16_is_as_near_as_torchs():
    """The distance to float32 is at most 1.5 times torch's own."""
    model = torch_reference(CASE, "small")
    params = cast(CASE.params(model, SMALL), jnp.bfloat16)
    ((ids, mask),) = CASE.inputs(CASE.tiny)
    network = CASE.network(SMALL, dtype=jnp.bfloat16, remat=False)
    out = jax.jit(network.apply)(params, ids, mask)
    (expected,) = last_hidden_state(model, ids, mask)
    low = CASE.random_torch_network(SMALL).bfloat16()
    with torch.no_grad():
        theirs = low(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state
    error, theirs = relative(out, expected), relative(theirs.float().numpy(), expected)
    print(f"{error:.1e}, torch's {theirs:.1e}")
    assert error <= 1.5 * theirs


def test_embedding_factor_is_rounded_to_the_compute_dtype():
    cfg = SMALL | dict(hidden_size=3072, num_hidden_layers=1, intermediate_size=8)
    config = gemma2.Config.from_dict(cfg)
    with torch.device("meta"):
        table = transformers.Gemma2Model(torch_config(cfg)).embed_tokens
    assert float(torch.tensor(table.scalar_embed_scale).bfloat16()) == 55.5
    net = functional(gemma2.build(config, dtype=jnp.bfloat16, remat=False))
    jaxpr = jax.make_jaxpr(net.apply)(net.abstract, np.zeros((1, 2), np.int32), np.ones((1, 2)))
    assert " 55.5:bf16[]" in str(jaxpr)


def test_config_of_transformers_5_is_the_same():
    found = json.loads(torch_config(LARGE).to_json_string())
    assert found["rope_parameters"]["rope_theta"] == 500.0 and "rope_theta" not in found
    assert gemma2.Config.from_dict(found) == gemma2.Config.from_dict(LARGE)


def test_longer_than_the_window_is_named():
    net = functional(gemma2.build(gemma2.Config.from_dict(SMALL)))
    ids = jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(InputError, match="ids: found 17 tokens; expected at most 16, the sliding"):
        jax.eval_shape(net.apply, net.abstract, ids, ids)


def test_hidden_state_before_the_last_block_is_that_of_transformers():
    """Without a norm; what Lumina 2 reads."""
    model, params = (
        torch_reference(CASE, "large"),
        CASE.params(torch_reference(CASE, "large"), LARGE),
    )
    ((ids, mask),) = CASE.inputs(TextSize(LARGE, (31, 12, 1), 31))
    network = CASE.network(LARGE)
    (state,) = jax.jit(lambda p: network.apply(p, ids, mask, (2,)))(params)
    with torch.no_grad():
        out = model(
            torch.from_numpy(ids).long(), torch.from_numpy(mask), output_hidden_states=True
        ).hidden_states
    assert len(out) == 4 and relative(state, out[-2].numpy()) <= 1e-5
