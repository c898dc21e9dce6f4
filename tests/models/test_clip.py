import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conformance import NetworkCase, NetworkSuite, Published, Rules
from safetensors.numpy import save_file

from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors, tensors_from_params
from gadjax.models.module import functional
from gadjax.models.params import cast
from gadjax.models.text import clip, t5

torch.set_num_threads(1)

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


CASES = {
    "plain": (tiny(), 9),
    "larger": (larger(), 19),
    "one block": (tiny(num_hidden_layers=1, architectures=[PROJECTED], eos_token_id=40), 6),
}


def torch_config(cfg):
    # The reference is float32, whatever the file is in.
    drop = ("_name_or_path", "torch_dtype")
    return transformers.CLIPTextConfig(**{k: v for k, v in cfg.items() if k not in drop})


def torch_encoder(cfg, seed=0):
    """The reference with random parameters, those of the norms too."""
    torch.manual_seed(seed)
    model = getattr(transformers, cfg["architectures"][0])(torch_config(cfg)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tensors_of(model):
    return {k: v.numpy() for k, v in model.state_dict().items()}


def prefixed(tensors):
    """Tensors under the keys of files; in memory only the projected class has those keys."""
    return {
        k if k.startswith("text_") else f"text_model.{k}": value for k, value in tensors.items()
    }


def ported(model, cfg, **options):
    net = functional(clip.build(clip.Config.from_dict(cfg), **options))
    return net, params_from_tensors(tensors_of(model), net.abstract, clip.KEYMAP)


def batch(cfg, length):
    """Token ids with the end token in the middle and again at the end, last, first, and absent."""
    vocab, eos = cfg["vocab_size"], cfg["eos_token_id"]
    end = vocab - 1 if eos == 2 else eos
    ids = np.random.default_rng(1).integers(3, vocab - 1, (4, length))
    ids[ids == end] = 3
    ids[0, length // 2] = ids[0, -1] = ids[1, -1] = ids[2, 0] = end
    # A higher id before the end, which the legacy rule would take.
    ids[:2, 1] = vocab - 1 if eos != 2 else 2
    mask = np.arange(length) < np.array([length // 2, length, 1, length - 1])[:, None]
    return ids.astype(np.int32), mask.astype(np.int32)


@torch.no_grad()
def reference(model, ids, mask=None):
    mask = None if mask is None else torch.from_numpy(mask)
    out = model(torch.from_numpy(ids).long(), attention_mask=mask, output_hidden_states=True)
    pooled = out.text_embeds if hasattr(model, "text_projection") else out.pooler_output
    return [x.numpy() for x in (out.last_hidden_state, out.hidden_states[-2], pooled)]


def relative(out, ref):
    return np.abs(np.asarray(out, np.float32) - ref).max() / np.abs(ref).max()


@pytest.mark.parametrize("name", CASES)
def test_matches_torch(name):
    cfg, length = CASES[name]
    model = torch_encoder(cfg)
    net, params = ported(model, cfg)
    ids, mask = batch(cfg, length)
    apply = jax.jit(net.apply)
    # Padding on the left as well, where the first positions have nothing to attend to.
    for given in ((), (mask,), (mask[:, ::-1].copy(),)):
        out, ref = apply(params, ids, *given), reference(model, ids, *given)
        errors = [relative(ours, theirs) for ours, theirs in zip(out, ref, strict=True)]
        print(name, "masked" if given else "", [f"{e:.1e}" for e in errors])
        assert all(a.shape == b.shape for a, b in zip(out, ref, strict=True))
        assert all(a.dtype == jnp.float32 for a in out) and max(errors) <= 1e-5
    # The mask has an effect, and later tokens have none.
    unmasked = apply(params, ids)
    assert relative(out.last, np.asarray(unmasked.last)) > 1e-3
    ids[:, -1] = 4
    changed = np.asarray(apply(params, ids).last[:, :-1])
    np.testing.assert_array_equal(changed, unmasked.last[:, :-1])


def test_computes_in_bfloat16():
    cfg = larger()
    model = torch_encoder(cfg)
    net, params = ported(model, cfg, dtype=jnp.bfloat16, remat=False)
    ids, _ = batch(cfg, 12)
    out = jax.jit(net.apply)(cast(params, jnp.bfloat16), ids)
    for ours, theirs in zip(out, reference(model, ids), strict=True):
        assert ours.dtype == jnp.bfloat16 and relative(ours, theirs) <= 0.05


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("cfg", [tiny(), larger()], ids=["plain", "projected"])
def test_round_trip_is_exact_from_both_spellings(cfg, dtype):
    net = functional(clip.build(clip.Config.from_dict(cfg)))
    tensors = {k: v.astype(dtype) for k, v in tensors_of(torch_encoder(cfg)).items()}
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
        params = params_from_tensors(read, net.abstract, clip.KEYMAP)
        written = dict(tensors_from_params(params, clip.KEYMAP))
        assert set(written) == set(full)
        for key, value in written.items():
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, full[key])


@pytest.mark.parametrize("cfg", [tiny(), larger()], ids=["plain", "projected"])
def test_transformers_reads_what_is_written(cfg, tmp_path):
    model = torch_encoder(cfg)
    _, params = ported(model, cfg)
    written = dict(tensors_from_params(params, clip.KEYMAP))
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # And the config.json of transformers 5 is read.
    model.config.architectures = cfg["architectures"]
    model.config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert clip.Config.from_dict(found) == clip.Config.from_dict(cfg)
    again = tensors_of(type(model).from_pretrained(tmp_path))
    for key, value in tensors_of(model).items():
        np.testing.assert_array_equal(again[key], value)


class TestCLIP(NetworkSuite):
    case = NetworkCase(
        family=clip.FAMILY,
        torch_network=lambda cfg: getattr(transformers, cfg["architectures"][0])(torch_config(cfg)),
        file_keys=prefixed,
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


@pytest.mark.slow
def test_fresh_parameters_are_usable():
    net = functional(clip.build(clip.Config.from_dict(larger()), remat=False))
    params = jax.jit(net.init)(jax.random.key(0))
    out = net.apply(params, batch(larger(), 9)[0])
    assert all(np.isfinite(x).all() and x.std() > 0 for x in out)


def test_longer_than_the_positions_is_named():
    net = functional(clip.build(clip.Config.from_dict(tiny())))
    with pytest.raises(InputError, match="ids: found 12 tokens; expected at most 11"):
        jax.eval_shape(net.apply, net.abstract, jnp.zeros((1, 12), jnp.int32))


def test_extra_keys_of_older_versions_are_ignored():
    old = {"return_dict": True, "id2label": {"0": "LABEL_0"}, "torchscript": False}
    assert clip.Config.from_dict(tiny(**old)) == clip.Config.from_dict(tiny())


def test_projection_dim_matters_only_where_there_is_a_projection():
    clip.Config.from_dict(tiny(projection_dim=None))
    with pytest.raises(InputError, match="projection_dim"):
        clip.Config.from_dict(tiny(projection_dim=None, architectures=[PROJECTED]))


# SD3's third text encoder.
T5_XXL = {
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


def test_sd3s_t5_is_read_with_and_without_the_tied_copy():
    config = t5.Config.from_dict(T5_XXL)
    assert (config.num_layers, config.d_model, config.gated) == (24, 4096, True)
    small = T5_XXL | dict(d_ff=40, d_kv=5, d_model=24, num_heads=3, num_layers=2, vocab_size=50)
    abstract = functional(t5.build(t5.Config.from_dict(small))).abstract
    shapes = {k: shape for k, (_, _, shape) in expected_shapes(abstract, t5.KEYMAP).items()}
    r = np.random.default_rng(0)
    tensors = {k: r.standard_normal(shape).astype(np.float16) for k, shape in shapes.items()}
    assert "shared.weight" in tensors
    for more in ({}, {"encoder.embed_tokens.weight": tensors["shared.weight"]}):
        params = params_from_tensors(tensors | more, abstract, t5.KEYMAP)
        np.testing.assert_array_equal(params["shared"]["embedding"], tensors["shared.weight"])
