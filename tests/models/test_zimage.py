"""Z-Image's transformer: the conformance suite, and what only this family has."""

import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conformance import (
    BackboneSuite,
    Case,
    Published,
    Rules,
    Size,
    Tangents,
    loaded,
    relative,
    torch_class,
)
from diffusers import ZImageTransformer2DModel

from gadjax.errors import InputError
from gadjax.formats.state_dict import tensors_from_params
from gadjax.models import zimage

PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("published.json").read_text())
REAL = PUBLISHED["Z-Image"]["transformer/config.json"]


def tiny(heads, axes, layers, refiners, *, lens=(80, 16, 16), text=20, **more):
    return REAL | {
        "dim": heads * sum(axes),
        "n_heads": heads,
        "n_kv_heads": heads,
        "n_layers": layers,
        "n_refiner_layers": refiners,
        "axes_dims": list(axes),
        "axes_lens": list(lens),
        "cap_feat_dim": text,
        "in_channels": 5,
        **more,
    }


# Name -> config, latent height and width. The prompts have 40, 3 and 1 of 40 tokens.
SIZES = {
    # 20 patches, which are padded to 32; a time embedding as narrow as the network.
    "padded": Size(tiny(3, (4, 6, 6), 2, 1), 8, 10),
    # 32 patches; wider than the time embedding.
    "wide": Size(tiny(5, (20, 16, 16), 3, 2, text=28, norm_eps=1e-3, rope_theta=100.0), 16, 8),
    "tall": Size(tiny(2, (6, 2, 4), 5, 1, in_channels=3, t_scale=500.0), 18, 4),
}


def rounded_exp(x, exp=torch.exp):
    """Nearest float32: torch's own is an ulp off in one frequency of the time, 0.39, whose angle of
    390 at t = 0 then shows in the network's output by as much as all other rounding."""
    return exp(x.double()).to(x.dtype)


def torch_output(model, cfg, x, t, cond):
    given = jax.tree.map(lambda value: torch.tensor(np.ascontiguousarray(value)), (x, t, cond))
    with mock.patch.object(torch, "exp", rounded_exp):
        return zimage.FAMILY.torch_call(model, cfg, *given)


class ZImageCase(Case):
    @torch.no_grad()
    def torch_call(self, model, cfg, x, t, cond):
        return torch_output(model, cfg, x, t, cond).numpy()


CASE = ZImageCase(
    family=zimage.FAMILY,
    torch_network=torch_class(ZImageTransformer2DModel),
    sizes=SIZES,
    times=lambda config: (1.0, 499.25, 1000.0),
    extras=lambda config, r, batch: None,
    blocks=lambda model: model.layers,
    length=40,
    tangents=Tangents(
        size=Size(tiny(2, (2, 2, 4), 1, 1), 4, 6),
        paths=("context_refiner/attn/to_k/kernel", "x_pad_token", "cap_pad_token"),
        times=(1.0, 499.25),
        length=3,
    ),
    bfloat16=SIZES["padded"],
    fresh=SIZES["padded"],
    layers="layers/ff/w1/kernel",
    published={"Z-Image": Published(REAL, 6_154_908_736, 521)},
    rules=Rules(mesh={"fsdp": 64, "tensor": 2}, replicated=("/norm_q/scale", "/norm_k/scale")),
    refused_in=REAL,
    refused=[
        ("all_patch_size", [4]),
        ("all_patch_size", [2, 4]),
        ("all_f_patch_size", [2]),
        ("qk_norm", False),
        ("n_kv_heads", 10),
        ("n_heads", 31),
        ("siglip_feat_dim", 1152),
        ("axes_dims", [32, 48]),
        ("axes_dims", [32, 48, 50]),
        ("axes_dims", [33, 47, 48]),
        ("axes_lens", [1536, 512, 0]),
        ("n_layers", "30"),
        ("n_refiner_layers", 0),
        ("norm_eps", -1e-5),
        ("sample_size", 127),
        ("quantization_config", {"load_in_4bit": True}),
    ],
)


class TestZImage(BackboneSuite):
    case = CASE
    test_kv_cache_stands_for_the_prompt = None  # the caption's tokens change from layer to layer


@pytest.mark.slow
def test_gradients_are_those_of_torch():
    """Under rematerialisation; of the learned paddings too."""
    cfg = SIZES["padded"].config
    model, (x, t, cond) = CASE.random_torch_network(cfg), CASE.inputs(SIZES["padded"])
    call = zimage.FAMILY.predictor(CASE.network(cfg).apply, CASE.config(cfg))
    weights = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    (torch_output(model, cfg, x, t, cond) * torch.tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(call(p, x, t, cond) * weights)))(
        CASE.params(model, cfg)
    )
    expected = {k: p.grad.numpy() for k, p in model.named_parameters()}
    ours = dict(tensors_from_params(grads, zimage.FAMILY.keymap))
    assert all(np.abs(g).max() > 0 for g in expected.values())
    largest = max(np.abs(g).max() for g in expected.values())
    worst = max(np.abs(ours[key] - g).max() / largest for key, g in expected.items())
    print(f"gradients {worst:.2e}")
    assert worst <= 1e-5


def test_a_sample_does_not_depend_on_the_others_nor_on_padding():
    """Positions go by each caption's own length, rounded up to 32; longer padding is masked."""
    both = loaded(CASE, "padded")
    x, t, cond = both.inputs
    out, _ = both.raw(both.params, x, t, cond)
    for i, length in ((1, 3), (2, 33)):
        alone = cond._replace(
            text=cond.text[i : i + 1, :length], mask=cond.mask[i : i + 1, :length]
        )
        found, _ = both.raw(both.params, x[i : i + 1], t[i : i + 1], alone)
        assert relative(found, out[i : i + 1]) <= 1e-5


def test_too_large_inputs_are_refused():
    network, config = CASE.network(SIZES["padded"].config), CASE.config(SIZES["padded"].config)
    call = zimage.FAMILY.predictor(network.apply, config)
    x, t, cond = CASE.inputs(SIZES["padded"])
    for tall, wide in ((34, 2), (2, 34)):
        larger = np.zeros((3, tall, wide, 5), np.float32)
        message = f"^latents: found {tall} x {wide}; expected at most 32 x 32"
        with pytest.raises(InputError, match=message):
            jax.eval_shape(call, network.abstract, larger, t, cond)
    with pytest.raises(InputError, match="multiples of the patch size 2"):
        jax.eval_shape(call, network.abstract, x[:, :-1], t, cond)
    longer = CASE.inputs(SIZES["padded"], length=65)[2]
    with pytest.raises(InputError, match="^length: found 96 tokens .*; expected at most 78"):
        jax.eval_shape(call, network.abstract, x, t, longer)
