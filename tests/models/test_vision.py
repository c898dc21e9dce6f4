"""Vision transformers against transformers' classes, through folders that transformers wrote."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gadjax.errors import InputError
from gadjax.formats.state_dict import expected_shapes, params_from_tensors
from gadjax.formats.weights import open_weights
from gadjax.models.module import functional
from gadjax.models.vision.config import IGNORED, KINDS, read_vision_config
from gadjax.models.vision.keymap import vision_keymap
from gadjax.models.vision.vit import build

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
CLIP_VISION = SMALL | {"intermediate_size": 48, "projection_dim": 20}
CLIP_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "projection_dim": 20,
}


def clip_model(**vision):
    config = transformers.CLIPConfig(
        text_config=CLIP_TEXT, vision_config=CLIP_VISION | vision, projection_dim=20
    )
    return transformers.CLIPModel(config)


def siglip_model():
    text = {k: v for k, v in CLIP_TEXT.items() if k != "projection_dim"} | {"hidden_size": 32}
    text |= {"num_attention_heads": 4}
    vision = SMALL | {"intermediate_size": 48}
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=vision)
    )


def dinov2(**more):
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **more))


def dinov2_registers(**more):
    config = transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3, **more)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3(**more):
    config = {"intermediate_size": 48, "num_register_tokens": 2} | more
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL, **config))


CASES = {
    "clip": clip_model,
    "clip, gelu": lambda: clip_model(hidden_act="gelu", layer_norm_eps=1e-3),
    "clip, vision alone": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**CLIP_VISION)
    ),
    "clip, vision with projection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**CLIP_VISION)
    ),
    "dinov2": dinov2,
    "dinov2, no bias in qkv": lambda: dinov2(qkv_bias=False, mlp_ratio=3),
    "dinov2, SwiGLU": lambda: dinov2(use_swiglu_ffn=True, layer_norm_eps=1e-3),
    "dinov2, registers": dinov2_registers,
    "dinov2, registers, SwiGLU": lambda: dinov2_registers(use_swiglu_ffn=True),
    "dinov3": dinov3,
    "dinov3, gated": lambda: dinov3(
        use_gated_mlp=True, hidden_act="silu", num_register_tokens=0, rope_theta=50.0
    ),
    "dinov3, biases": lambda: dinov3(
        key_bias=True, query_bias=False, value_bias=False, proj_bias=False, mlp_bias=False
    ),
    "siglip": siglip_model,
    "siglip, vision alone": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SMALL, intermediate_size=48)
    ),
}
NATIVE, OTHER = (24, 24), (18, 28)  # OTHER is not square, and its height no multiple of the patch
# Smaller, larger, and one that is not square with as many patches as the table.
FURTHER = (12, 12), (40, 40), (16, 36)
KINDS_APART = "clip", "dinov2", "dinov2, registers", "dinov3", "siglip"


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A network of transformers with every parameter random, and its folder."""
    torch.manual_seed(0)
    model = CASES[request.param]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 and "weight" in name else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape))
            if name.endswith("norm.weight") or "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    folder = tmp_path_factory.mktemp("vision")
    model.save_pretrained(folder)
    return request.param, model, folder


def load(folder, dtype=jnp.float32):
    cfg = json.loads((folder / "config.json").read_text())
    config = read_vision_config(cfg)
    net = functional(build(config, dtype=dtype))
    tensors = dict(open_weights(folder, library="transformers"))
    return config, net, params_from_tensors(tensors, net.abstract, vision_keymap(config))


@torch.no_grad()
def reference(model, x_BHWC):
    """transformers' (last hidden states, class token before the norm, pooled, projected)."""
    pixels = torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2).copy())
    tower = getattr(model, "vision_model", model)
    name = type(model).__name__
    resized = {} if "DINO" in name.upper() else {"interpolate_pos_encoding": True}
    out = tower(pixels, output_hidden_states=True, **resized)
    raw = None
    if "CLIP" in name and "Sig" not in name:
        raw = out.last_hidden_state[:, 0]
    elif "DINO" in name.upper():
        raw = out.hidden_states[-1][:, 0]
    projected = None
    if hasattr(model, "visual_projection"):
        projected = model.visual_projection(model.vision_model(pixels, **resized).pooler_output)
    pooled = out.pooler_output if hasattr(out, "pooler_output") else None
    return out.last_hidden_state, raw, pooled, projected


def check(case, size):
    name, model, folder = case
    _, net, params = load(folder)
    x = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(net.apply)(params, x)
    compared = 0
    for ours, theirs in zip(outputs, reference(model, x), strict=True):
        if theirs is None:
            continue
        theirs = theirs.numpy()
        error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
        assert error <= 1e-5, (name, size, error)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("size", [NATIVE, OTHER])
def test_outputs_are_those_of_transformers(case, size):
    check(case, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", FURTHER)
def test_outputs_of_further_sizes(case, size):
    if case[0] not in KINDS_APART:
        pytest.skip("sizes enter by the positions alone, which another case has too")
    check(case, size)


@pytest.mark.parametrize("model_type", KINDS)
def test_every_option_of_the_class_is_read_or_ignored_for_a_reason(model_type):
    """Those of training and of other outputs are IGNORED."""
    config = transformers.AutoConfig.for_model(model_type)
    config = getattr(config, "vision_config", config)
    base = {f.name for f in dataclasses.fields(transformers.PreTrainedConfig)}
    options = {f.name for f in dataclasses.fields(config)} - base
    read = KINDS[model_type][1]
    assert options - {"num_channels"} <= read.keys() | IGNORED.keys(), options
    assert {key: getattr(config, key, None) for key in read if key != "num_register_tokens"} == {
        key: value for key, value in read.items() if key != "num_register_tokens"
    }
    assert getattr(config, "num_register_tokens", None) == read.get("num_register_tokens")


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP_L |= {"num_attention_heads": 16, "patch_size": 14}
CLIP_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_H |= {"num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"}


def two_towers(model_type, vision, **more):
    return {"model_type": model_type, "vision_config": vision, "text_config": {}} | more


def sizes(width, layers, heads, **more):
    counts = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return counts | more


def dinov2_published(*counts, registers=False, **more):
    name = "dinov2_with_registers" if registers else "dinov2"
    return sizes(*counts, model_type=name, image_size=518, patch_size=14, **more)


def dinov3_published(*counts, **more):
    return sizes(*counts, model_type="dinov3_vit", num_register_tokens=4, **more)


def siglip_published(*counts, hidden, patch, size):
    more = {"intermediate_size": hidden, "patch_size": patch, "image_size": size}
    return two_towers("siglip", sizes(*counts, **more))


# Parameters in millions, of the vision tower, as published tables and model cards round them.
PUBLISHED = {
    "CLIP B/32": (two_towers("clip", {}), 87.8),
    "CLIP B/16": (two_towers("clip", {"patch_size": 16}), 86.2),
    "CLIP L/14": (two_towers("clip", CLIP_L, projection_dim=768), 304),
    "CLIP L/14@336": (two_towers("clip", CLIP_L | {"image_size": 336}, projection_dim=768), 304.3),
    "H/14, PickScore": (two_towers("clip", CLIP_H, projection_dim=1024), 632),
    "DINOv2 S": (dinov2_published(384, 12, 6), 22.1),
    "DINOv2 B": (dinov2_published(768, 12, 12), 86.6),
    "DINOv2 L": (dinov2_published(1024, 24, 16), 304),
    "DINOv2 L, registers": (dinov2_published(1024, 24, 16, registers=True), 304),
    "DINOv2 g": (dinov2_published(1536, 40, 24, use_swiglu_ffn=True), 1136),
    "DINOv3 S": (dinov3_published(384, 12, 6, intermediate_size=1536), 21.6),
    "DINOv3 S+": (
        dinov3_published(384, 12, 6, intermediate_size=1536, use_gated_mlp=True, hidden_act="silu"),
        28.7,
    ),
    "DINOv3 B": (dinov3_published(768, 12, 12, intermediate_size=3072), 85.7),
    "DINOv3 L": (dinov3_published(1024, 24, 16, intermediate_size=4096), 303),
    "DINOv3 H+": (
        dinov3_published(1280, 32, 20, intermediate_size=5120, use_gated_mlp=True),
        841,
    ),
    "DINOv3 7B": (
        dinov3_published(
            *(4096, 40, 32),
            intermediate_size=8192,
            use_gated_mlp=True,
            hidden_act="silu",
            query_bias=False,
            value_bias=False,
        ),
        6716,
    ),
    "SigLIP2 B/16": (siglip_published(768, 12, 12, hidden=3072, patch=16, size=224), 92.9),
    "SigLIP2 L/16": (siglip_published(1024, 24, 16, hidden=4096, patch=16, size=256), 316),
    "SigLIP2 So400m/14": (siglip_published(1152, 27, 16, hidden=4304, patch=14, size=384), 428),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_accounted_for(name):
    """As many parameters as transformers' class has, whose vision tower is made on no device."""
    cfg, millions = PUBLISHED[name]
    config = read_vision_config(cfg)
    network = functional(build(config))
    shapes = expected_shapes(network.abstract, vision_keymap(config))
    count = sum(int(np.prod(shape)) for _, _, shape in shapes.values())
    assert count == pytest.approx(millions * 1e6, rel=0.004)

    config = transformers.AutoConfig.for_model(**cfg)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    names = dict(model.named_parameters())
    theirs = sum(
        value.numel()
        for key, value in names.items()
        if not key.startswith(("text_", "logit_")) and "mask_token" not in key
    )
    assert count == theirs


def save_small(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def test_folders_in_several_files_and_in_half_precision(tmp_path):
    model = dinov2()
    one, several, half = (tmp_path / name for name in ("one", "several", "half"))
    save_small(model, one)
    save_small(model, several, max_shard_size="40KB")
    assert (several / "model.safetensors.index.json").is_file()
    save_small(model.half(), half)
    x = np.random.default_rng(0).standard_normal((1, 24, 24, 3)).astype(np.float32)
    pooled = []
    for folder in (one, several, half):
        _, net, params = load(folder)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        pooled.append(np.asarray(net.apply(params, x).pooled))
    assert (pooled[0] == pooled[1]).all()
    assert 0 < np.abs(pooled[0] - pooled[2]).max() < 0.01


def test_old_spellings_of_a_clip_folder(tmp_path):
    """position_ids, and options repeated as vision_config_dict, which wins."""
    cfg = two_towers("clip", {"hidden_act": "gelu", "patch_size": 16})
    cfg |= {"vision_config_dict": {"hidden_act": "quick_gelu"}, "projection_dim": 7}
    config = read_vision_config(cfg)
    assert (config.activation, config.patch, config.projection) == ("quick_gelu", 16, 7)
    model = clip_model()
    save_small(model, tmp_path)
    tensors = dict(open_weights(tmp_path, library="transformers"))
    tensors["vision_model.embeddings.position_ids"] = np.arange(37)[None]
    config = read_vision_config(json.loads((tmp_path / "config.json").read_text()))
    abstract = functional(build(config)).abstract
    params_from_tensors(tensors, abstract, vision_keymap(config))
    tensors["vision_model.embeddings.another"] = np.zeros(3, np.float32)
    with pytest.raises(InputError, match="1 unexpected: vision_model.embeddings.another"):
        params_from_tensors(tensors, abstract, vision_keymap(config))
    del tensors["vision_model.embeddings.another"], tensors["visual_projection.weight"]
    with pytest.raises(InputError, match="1 missing: visual_projection.weight"):
        params_from_tensors(tensors, abstract, vision_keymap(config))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({}, "model_type: found None; expected one of clip"),
        ({"model_type": ["clip"]}, "model_type: found"),
        ({"model_type": "siglip2"}, "NaFlex"),
        ({"model_type": "dinov2", "hidden_size": 10}, "num_attention_heads: found 12"),
        ({"model_type": "dinov3_vit", "hidden_size": 60}, "multiple of 4 channels"),
        ({"model_type": "dinov2", "patch_size": [14, 16]}, "patch_size: found"),
        ({"model_type": "dinov2", "hidden_act": "relu"}, "hidden_act: found 'relu'"),
        ({"model_type": "dinov2", "num_hidden_layers": True}, "num_hidden_layers: found True"),
        ({"model_type": "dinov2", "num_channels": 1}, "num_channels: found 1"),
        ({"model_type": "dinov3_vit", "num_register_tokens": -1}, "num_register_tokens: found -1"),
        ({"model_type": "clip", "vision_config": 3}, "vision_config: found 3"),
        ({"model_type": "clip", "projection_dim": 0}, "projection_dim: found 0"),
        ({"model_type": "dinov2", "image_size": 8}, "patch_size: found 14; expected at most"),
    ],
)
def test_refusals(cfg, message):
    with pytest.raises(InputError, match=message):
        read_vision_config(cfg)


@pytest.mark.slow
def test_gradients_reach_the_picture():
    """For training terms: against central differences in float64."""
    config = read_vision_config({"model_type": "dinov3_vit", **SMALL, "num_register_tokens": 2})
    config = dataclasses.replace(config, layers=1)
    with jax.enable_x64(True):
        net = functional(build(config, dtype=jnp.float64))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), net.init(jax.random.key(0)))
        x, v = np.random.default_rng(0).standard_normal((2, 1, 12, 12, 3))
        pooled = jax.jit(lambda x: net.apply(params, x).pooled)
        _, tangent = jax.jvp(pooled, (x,), (v,))
        step = 1e-5
        difference = (pooled(x + step * v) - pooled(x - step * v)) / (2 * step)
        scale = np.abs(difference).max()
        np.testing.assert_allclose(tangent, difference, atol=1e-7 * scale)
        gradient = jax.grad(lambda x: jnp.vdot(pooled(x), tangent))(x)
        np.testing.assert_allclose(jnp.vdot(gradient, v), jnp.vdot(tangent, tangent), rtol=1e-9)
