"""CLIP's text encoders against transformers' classes: values, key names, shardings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conformance import Published, Rules, torch_reference
from conformance_text import TextEncoderCase, TextEncoderSuite, TextSize
from safetensors.numpy import save_file

from gadjax.errors import InputError
from gadjax.formats.state_dict import params_from_tensors, tensors_from_params
from gadjax.models.text import clip

PLAIN, PROJECTED = clip.CLASS_NAMES


def published(width, layers, heads, act, projection, name=PLAIN):
    """Config of a published repository."""
    return {
        "architectures": [name],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": projection,
        "torch_dtype": "float16",
        "transformers_version": "4.41.2",
        "vocab_size": 49408,
    }


REAL = {
    "SD 1.5, SDXL first": Published(
        published(768, 12, 12, "quick_gelu", 768) | {"_name_or_path": "openai"},
        123_060_480,
        196,
    ),
    "SD 2": Published(published(1024, 23, 16, "gelu", 512), 340_387_840, 372),
    "SD3 first": Published(published(768, 12, 12, "quick_gelu", 768, PROJECTED), 123_650_304, 197),
    "SDXL and SD3 second": Published(
        published(1280, 32, 20, "gelu", 1280, PROJECTED), 694_659_840, 517
    ),
}


def tiny(**more):
    return published(24, 2, 3, "quick_gelu", 20) | dict(
        vocab_size=50, intermediate_size=40, max_position_embeddings=11, **more
    )


def larger(**more):
    return published(40, 4, 5, "gelu", 28, PROJECTED) | dict(
        vocab_size=97, intermediate_size=72, layer_norm_eps=1e-4, eos_token_id=80, **more
    )


def torch_config(cfg):
    # The reference is float32, whatever the file is in.
    drop = ("_name_or_path", "torch_dtype")
    return transformers.CLIPTextConfig(**{k: v for k, v in cfg.items() if k not in drop})


def tensors_of(model):
    return {k: v.numpy() for k, v in model.state_dict().items()}


def prefixed(tensors):
    """Tensors under the keys of files; in memory only the projected class has those keys."""
    return {
        k if k.startswith("text_") else f"text_model.{k}": value for k, value in tensors.items()
    }


def with_ends(cfg, ids, mask):
    """Token ids with the end token in the middle and again at the end, last, first, and absent.

    Without a mask, padded on the right, and on the left, where the first positions have nothing to
    attend to.
    """
    vocab, eos = cfg["vocab_size"], cfg["eos_token_id"]
    end = vocab - 1 if eos == 2 else eos
    ids[ids == end] = 3
    ids[0, ids.shape[1] // 2] = ids[0, -1] = ids[1, -1] = ids[2, 0] = end
    # A higher id before the end, which the legacy rule would take.
    ids[:2, 1] = vocab - 1 if eos != 2 else 2
    return (ids,), (ids, mask), (ids, mask[:, ::-1].copy())


@torch.no_grad()
def torch_outputs(model, ids, mask=None):
    mask = None if mask is None else torch.from_numpy(mask)
    out = model(torch.from_numpy(ids).long(), attention_mask=mask, output_hidden_states=True)
    pooled = out.text_embeds if hasattr(model, "text_projection") else out.pooler_output
    return [x.numpy() for x in (out.last_hidden_state, out.hidden_states[-2], pooled)]


CASE = TextEncoderCase(
    family=clip.FAMILY,
    torch_network=lambda cfg: getattr(transformers, cfg["architectures"][0])(torch_config(cfg)),
    torch_outputs=torch_outputs,
    arguments=with_ends,
    file_keys=prefixed,
    sizes={
        "plain": TextSize(tiny(), (4, 9, 1, 8), 9),
        "larger": TextSize(larger(), (9, 19, 1, 18), 19),
        "one block": TextSize(
            tiny(num_hidden_layers=1, architectures=[PROJECTED], eos_token_id=40), (3, 6, 1, 5), 6
        ),
    },
    tiny=TextSize(larger(), (6, 12, 1, 11), 12),
    published=REAL,
    rules=Rules(mesh={"fsdp": 32, "tensor": 2}, complete=True),
    refused_in=tiny(),
    refused=[
        ("architectures", ["CLIPModel"]),
        ("architectures", None),
        ("model_type", "siglip_text_model"),
        ("hidden_act", "gelu_new"),
        ("hidden_size", "24"),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 5),
        ("eos_token_id", [2, 49]),
        ("layer_norm_eps", None),
    ],
)


class TestCLIP(TextEncoderSuite):
    case = CASE


@pytest.mark.parametrize("name", CASE.sizes)
def test_later_tokens_have_no_effect(name):
    size = CASE.sizes[name]
    params = CASE.params(torch_reference(CASE, name), size.config)
    apply = jax.jit(CASE.network(size.config).apply)
    ids, _ = CASE.inputs(size)[-1]
    before = apply(params, ids).last[:, :-1]
    ids[:, -1] = 4
    np.testing.assert_array_equal(apply(params, ids).last[:, :-1], before)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("cfg", [tiny(), larger()], ids=["plain", "projected"])
def test_round_trip_is_exact_from_both_spellings(cfg, dtype):
    abstract, keymap = CASE.network(cfg).abstract, clip.FAMILY.keymap
    model = CASE.random_torch_network(cfg)
    tensors = {k: v.astype(dtype) for k, v in tensors_of(model).items()}
    bare = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    full = prefixed(tensors)
    assert ("text_projection.weight" in full) == (cfg["architectures"] == [PROJECTED])
    ids = np.arange(77)[None]
    for read in (
        bare,
        full,
        bare | {"embeddings.position_ids": ids},
        full | {"text_model.embeddings.position_ids": ids},
    ):
        params = params_from_tensors(read, abstract, keymap)
        written = dict(tensors_from_params(params, keymap))
        assert set(written) == set(full)
        for key, value in written.items():
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, full[key])


@pytest.mark.parametrize("cfg", [tiny(), larger()], ids=["plain", "projected"])
def test_transformers_reads_what_is_written(cfg, tmp_path):
    model = CASE.random_torch_network(cfg)
    written = dict(tensors_from_params(CASE.params(model, cfg), clip.FAMILY.keymap))
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # And the config.json of transformers 5 is read.
    model.config.architectures = cfg["architectures"]
    model.config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert clip.Config.from_dict(found) == clip.Config.from_dict(cfg)
    again = tensors_of(type(model).from_pretrained(tmp_path))
    for key, value in tensors_of(model).items():
        np.testing.assert_array_equal(again[key], value)


def test_longer_than_the_positions_is_named():
    net = CASE.network(tiny())
    with pytest.raises(InputError, match="ids: found 12 tokens; expected at most 11"):
        jax.eval_shape(net.apply, net.abstract, jnp.zeros((1, 12), jnp.int32))


def test_extra_keys_of_older_versions_are_ignored():
    old = {"return_dict": True, "id2label": {"0": "LABEL_0"}, "torchscript": False}
    assert clip.Config.from_dict(tiny(**old)) == clip.Config.from_dict(tiny())


def test_projection_dim_matters_only_where_there_is_a_projection():
    clip.Config.from_dict(tiny(projection_dim=None))
    with pytest.raises(InputError, match="projection_dim"):
        clip.Config.from_dict(tiny(projection_dim=None, architectures=[PROJECTED]))
