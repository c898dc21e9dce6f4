"""Qwen3 against transformers' class: values, hidden states, key names, shardings."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conformance import Published, Rules, relative, torch_reference
from conformance_text import TextEncoderCase, TextEncoderSuite, TextSize

from gadjax.errors import InputError
from gadjax.formats.state_dict import check_keys
from gadjax.models.params import cast
from gadjax.models.text import qwen3

# The 4B model of Z-Image's repositories.
PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("published.json").read_text())
REAL = PUBLISHED["Z-Image"]["text_encoder/config.json"]
SMALL = REAL | dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
)
# One head of keys for all queries, and none shared; queries narrower than the model, and wider.
LARGE = SMALL | dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-4,
    rope_theta=500.0,
)
UNSHARED = SMALL | dict(num_attention_heads=3, num_key_value_heads=3, head_dim=4)


def torch_config(cfg):
    return transformers.Qwen3Config(**{k: v for k, v in cfg.items() if k[0] != "_"})


def torch_encoder(cfg):
    network = transformers.Qwen3Model(torch_config(cfg))
    network.set_attn_implementation("eager")
    return network


@torch.no_grad()
def hidden_states(model, ids, mask):
    """After each block, the last of them after the final norm; the embeddings first."""
    out = model(
        torch.from_numpy(ids).long(), torch.from_numpy(mask), output_hidden_states=True
    ).hidden_states
    return [state.numpy() for state in out]


def last_padded_on_the_left(cfg, ids, mask):
    mask[-1] = mask[-1, ::-1]
    return [(ids * mask, mask)]


CASE = TextEncoderCase(
    family=qwen3.FAMILY,
    torch_network=torch_encoder,
    torch_outputs=lambda *args: hidden_states(*args)[-1:],
    arguments=last_padded_on_the_left,
    sizes={
        "small": TextSize(SMALL, (7, 1, 16, 9), 16),
        "large": TextSize(LARGE, (200, 131, 190), 200),
        "unshared": TextSize(UNSHARED, (5, 3), 6),
    },
    tiny=TextSize(SMALL, (9, 4), 11),
    published={"4B": Published(REAL, 4_022_468_096, 398)},
    rules=Rules(mesh={"fsdp": 32, "tensor": 8}, complete=True, replicated=("_norm/scale",)),
    refused_in=SMALL,
    refused=[
        ("architectures", ["Qwen2Model"]),
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("hidden_size", 24.0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", None),
        ("head_dim", 9),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ],
)


class TestQwen3(TextEncoderSuite):
    case = CASE


def test_hidden_states_after_listed_blocks_are_those_of_transformers():
    """Pads too; without a norm; later blocks do not matter."""
    model, params = (
        torch_reference(CASE, "large"),
        CASE.params(torch_reference(CASE, "large"), LARGE),
    )
    ((ids, mask),) = CASE.inputs(TextSize(LARGE, (31, 12, 1), 31))
    after = 1, 3, 4
    network = CASE.network(LARGE)
    ours = jax.jit(lambda p: network.apply(p, ids, mask, after))(params)
    expected = hidden_states(model, ids, mask)
    for number, state in zip(after, ours, strict=True):
        errors = [relative(state, other) for other in expected]
        print(number, f"{errors[number]:.1e}")
        assert errors.pop(number) <= 1e-5
        assert min(errors) > 1e-3
    poisoned = jax.tree.map(np.copy, params)
    for leaf in (*jax.tree.leaves(poisoned["blocks"]), poisoned["norm"]["scale"]):
        leaf[4 if leaf.ndim > 1 else slice(None)] = np.nan
    for first, second in zip(ours, network.apply(poisoned, ids, mask, after), strict=True):
        assert relative(second, first) <= 1e-6
    with pytest.raises(InputError, match="num_hidden_layers: found 5; expected 6 or more"):
        jax.eval_shape(lambda p: network.apply(p, ids, mask, (6,)), network.abstract)


def test_hidden_states_before_the_last_block_copy_no_weights():
    """A slice of the stack would double a large model's memory."""
    cfg = SMALL | dict(num_hidden_layers=6, hidden_size=64, intermediate_size=512)
    network, ids = CASE.network(cfg), jnp.ones((1, 4), jnp.int32)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(network.abstract["blocks"]))
    compiled = jax.jit(lambda p: network.apply(p, ids, ids, (5,))).lower(network.abstract).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2


def test_rotation_matters():
    model = torch_reference(CASE, "small")
    params = CASE.params(model, SMALL)
    ((ids, mask),) = CASE.inputs(TextSize(SMALL, (7, 9), 12))
    other = CASE.network(SMALL | {"rope_theta": 100.0})
    expected = hidden_states(model, ids, mask)[-1]
    assert relative(other.apply(params, ids, mask), expected) > 1e-4


def test_bfloat16_is_as_near_as_torchs():
    """The distance to float32 is at most 1.5 times torch's own."""
    model = torch_reference(CASE, "small")
    params = cast(CASE.params(model, SMALL), jnp.bfloat16)
    ((ids, mask),) = CASE.inputs(CASE.tiny)
    network = CASE.network(SMALL, dtype=jnp.bfloat16, remat=False)
    out = jax.jit(network.apply)(params, ids, mask)
    expected = hidden_states(model, ids, mask)[-1]
    low = CASE.random_torch_network(SMALL).bfloat16()
    with torch.no_grad():
        theirs = low(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state
    error, theirs = relative(out, expected), relative(theirs.float().numpy(), expected)
    print(f"{error:.1e}, torch's {theirs:.1e}")
    assert error <= 1.5 * theirs


@pytest.mark.parametrize("tied", [True, False])
def test_files_of_the_causal_model_are_read(tied):
    """Keys under "model.", with a head that is left out."""
    with torch.device("meta"):
        kind = transformers.Qwen3ForCausalLM
        state = kind(torch_config(SMALL | {"tie_word_embeddings": tied})).state_dict()
    assert "lm_head.weight" in state and "model.norm.weight" in state
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    tensors = check_keys(shapes, CASE.network(SMALL).abstract, qwen3.FAMILY.keymap, "file")
    assert set(tensors) == set(state) - {"lm_head.weight"}


def test_config_of_transformers_5_is_the_same():
    found = json.loads(torch_config(LARGE).to_json_string())
    assert found["rope_parameters"]["rope_theta"] == 500.0 and "rope_theta" not in found
    assert len(found["layer_types"]) == 5
    assert qwen3.Config.from_dict(found) == qwen3.Config.from_dict(LARGE)
