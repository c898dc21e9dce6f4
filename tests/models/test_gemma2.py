import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conformance import NetworkCase, NetworkSuite, Published, Rules

from gadjax.errors import InputError
from gadjax.formats.state_dict import params_from_tensors, tensors_from_params
from gadjax.models.module import functional
from gadjax.models.params import cast
from gadjax.models.text import gemma2

torch.set_num_threads(1)

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


def torch_encoder(cfg, seed=0):
    """The reference with random parameters, those of the norms too."""
    torch.manual_seed(seed)
    model = transformers.Gemma2Model(torch_config(cfg)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def ported(model, cfg, **options):
    net = functional(gemma2.build(gemma2.Config.from_dict(cfg), **options))
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    return net, params_from_tensors(tensors, net.abstract, gemma2.KEYMAP)


@torch.no_grad()
def reference(model, ids, mask):
    return model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.numpy()


def batch(vocab, lengths, total):
    """Token ids and mask, padded on the right, and the last row on the left."""
    ids = np.random.default_rng(1).integers(3, vocab, (len(lengths), total)).astype(np.int32)
    mask = (np.arange(total) < np.array(lengths)[:, None]).astype(np.int32)
    mask[-1] = mask[-1, ::-1]
    return ids * mask, mask


def relative(out, ref):
    return np.abs(np.asarray(out, np.float32) - ref).max() / np.abs(ref).max()


@pytest.mark.parametrize(
    "cfg, lengths, total",
    [
        (SMALL, (7, 1, 16, 9), 16),
        (LARGE, (200, 131, 190), 200),
        (UNSHARED, (5, 3), 6),
    ],
)
def test_matches_torch_at_every_position(cfg, lengths, total):
    model = torch_encoder(cfg)
    assert model.config._attn_implementation == "eager"
    net, params = ported(model, cfg)
    ids, mask = batch(cfg["vocab_size"], lengths, total)
    ref, apply = reference(model, ids, mask), jax.jit(net.apply)
    out = apply(params, ids, mask)
    assert out.shape == ref.shape and out.dtype == np.float32
    print(f"{relative(out, ref):.1e}")
    assert relative(out, ref) <= 1e-5
    assert relative(apply(params, ids, np.ones_like(mask)), ref) > 1e-3


def test_the_soft_cap_and_the_positions_matter():
    model = torch_encoder(SMALL)
    _, params = ported(model, SMALL)
    ids, mask = batch(50, (7, 9), 12)
    ref = reference(model, ids, mask)
    for key, value in (("attn_logit_softcapping", 50.0), ("rope_theta", 100.0)):
        other = functional(gemma2.build(gemma2.Config.from_dict(SMALL | {key: value})))
        assert relative(other.apply(params, ids, mask), ref) > 1e-4, key


@pytest.mark.parametrize("width, theta", [(256, 10_000.0), (10, 10_000.0), (16, 500.0)])
def test_frequencies_are_those_of_transformers(width, theta):
    config = torch_config(SMALL | dict(head_dim=width, rope_theta=theta))
    model = transformers.models.gemma2.modeling_gemma2.Gemma2RotaryEmbedding(config)
    ours = gemma2.frequencies(width, theta)
    assert ours.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, model.inv_freq.numpy(), 1)


def test_computes_in_bfloat16():
    model = torch_encoder(SMALL)
    net, params = ported(model, SMALL, dtype=jnp.bfloat16, remat=False)
    ids, mask = batch(50, (9, 4), 11)
    out = jax.jit(net.apply)(cast(params, jnp.bfloat16), ids, mask)
    assert out.dtype == jnp.bfloat16
    ref = reference(model, ids, mask)
    assert relative(out, ref) <= 0.05
    # No further from torch's own bfloat16 than that is from float32.
    low = torch_encoder(SMALL).bfloat16()
    with torch.no_grad():
        theirs = low(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state
    theirs = theirs.float().numpy()
    print(f"{relative(out, ref):.1e}, torch's {relative(theirs, ref):.1e}")
    assert relative(out, ref) <= 1.5 * relative(theirs, ref)


def test_embedding_factor_is_rounded_to_the_compute_dtype():
    cfg = SMALL | dict(hidden_size=3072, num_hidden_layers=1, intermediate_size=8)
    config = gemma2.Config.from_dict(cfg)
    with torch.device("meta"):
        table = transformers.Gemma2Model(torch_config(cfg)).embed_tokens
    assert float(torch.tensor(table.scalar_embed_scale).bfloat16()) == 55.5
    net = functional(gemma2.build(config, dtype=jnp.bfloat16, remat=False))
    jaxpr = jax.make_jaxpr(net.apply)(net.abstract, np.zeros((1, 2), np.int32), np.ones((1, 2)))
    assert " 55.5:bf16[]" in str(jaxpr)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_round_trip_is_exact(dtype):
    tensors = {k: v.numpy().astype(dtype) for k, v in torch_encoder(SMALL).state_dict().items()}
    abstract = functional(gemma2.build(gemma2.Config.from_dict(SMALL))).abstract
    params = params_from_tensors(tensors, abstract, gemma2.KEYMAP)
    written = dict(tensors_from_params(params, gemma2.KEYMAP))
    assert set(written) == set(tensors)
    for key, value in written.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, tensors[key])


class TestGemma2(NetworkSuite):
    case = NetworkCase(
        family=gemma2.FAMILY,
        torch_network=lambda cfg: transformers.Gemma2Model(torch_config(cfg)),
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


def test_config_of_transformers_5_is_the_same():
    found = json.loads(torch_config(LARGE).to_json_string())
    assert found["rope_parameters"]["rope_theta"] == 500.0 and "rope_theta" not in found
    assert gemma2.Config.from_dict(found) == gemma2.Config.from_dict(LARGE)


@pytest.mark.slow
def test_fresh_parameters_are_usable():
    net = functional(gemma2.build(gemma2.Config.from_dict(SMALL), remat=False))
    params = jax.jit(net.init)(jax.random.key(0))
    out = net.apply(params, *batch(50, (9, 4), 11))
    assert np.isfinite(out).all() and out.std() > 0


def test_longer_than_the_window_is_named():
    net = functional(gemma2.build(gemma2.Config.from_dict(SMALL)))
    ids = jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(InputError, match="ids: found 17 tokens; expected at most 16, the sliding"):
        jax.eval_shape(net.apply, net.abstract, ids, ids)
