"""The U-Net: the conformance suite, and what only this family has."""

from functools import partial

import jax
import numpy as np
import pytest
from conformance import BackboneSuite, Case, Published, Rules, Size, Tangents, loaded, torch_class
from diffusers import UNet2DConditionModel

from gadjax.errors import InputError
from gadjax.models import unet
from gadjax.types import Cond

# Configurations of the published repositories, without the class's defaults.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD2 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
SDXL = SD2 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "upcast_attention": None,
}
PUBLISHED = {
    "1.5": Published(SD15, 859_520_964, 686),
    "2, 2.1 base": Published(SD2, 865_910_724, 686),
    "XL": Published(SDXL, 2_567_463_684, 1680),
}

# As 1.5 (1x1 convolutions, one number of heads) and as XL; they differ in every size.
CONV = SD15 | {
    "attention_head_dim": 2,
    "block_out_channels": [8, 12, 16],
    "cross_attention_dim": 10,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "only_cross_attention": [False] * 3,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
}
LINEAR = SDXL | {
    "addition_time_embed_dim": 6,
    "attention_head_dim": [3, 5],
    "block_out_channels": [18, 30],
    "cross_attention_dim": 14,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 6,
    "norm_eps": 1e-3,
    "norm_num_groups": 3,
    "out_channels": 6,
    "projection_class_embeddings_input_dim": 11 + 6 * 6,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
TINY = LINEAR | {
    "attention_head_dim": [1, 2],
    "block_out_channels": [4, 6],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "out_channels": 3,
    "up_block_types": ["UpBlock2D"] * 2,
    "use_linear_projection": False,
}
FRESH = CONV | {  # one block, as drawing compiles slowly
    "attention_head_dim": 1,
    "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"],
    "norm_num_groups": 2,
    "only_cross_attention": False,
    "transformer_layers_per_block": 2,
    "up_block_types": ["UpBlock2D"],
}
SIZES = {"conv": Size(CONV, 8, 12), "linear": Size(LINEAR, 10, 6)}


def extras(config, r, batch):
    if config.pooled_dim is None:
        return None
    pooled = r.standard_normal((batch, config.pooled_dim), np.float32)
    ids = np.array([[512, 768, 0, 8, 512, 640], [1024] * 6, [96, 64, 1, 2, 3, 4]], np.float32)
    return {"text_embeds": pooled, "time_ids": ids[:batch]}


CASE = Case(
    family=unet.FAMILY,
    torch_network=torch_class(UNet2DConditionModel),
    sizes=SIZES,
    length=5,
    times=lambda config: (0.0, 499.25, 999.0),
    extras=extras,
    blocks=lambda model: [model.mid_block],
    tokens=lambda out: out.flatten(2).transpose(1, 2),
    tangents=Tangents(
        size=Size(TINY, 2, 4),
        # The first's derivative goes through all others.
        paths=("conv_in/kernel", "mid_block/attentions/0/transformer_blocks/attn1/to_q/kernel"),
        times=(320.5,),
        length=5,
    ),
    bfloat16=Size(TINY, 4, 6),
    fresh=Size(FRESH, 3, 5),
    layers="mid_block/attentions/0/transformer_blocks/attn1/to_q/kernel",
    published=PUBLISHED,
    rules=Rules(mesh={"fsdp": 32, "tensor": 2}),
    refused_in=SDXL,
    refused=[
        ("act_fn", "gelu"),
        ("addition_embed_type", "text"),
        ("addition_time_embed_dim", None),
        ("addition_time_embed_dim", 5),
        ("attention_head_dim", 7),
        ("attention_head_dim", [5, 10]),
        ("block_out_channels", None),
        ("block_out_channels", [320, 640.0, 1280]),
        ("center_input_sample", True),
        ("class_embed_type", "timestep"),
        ("cross_attention_dim", [2048] * 3),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ("downsample_padding", 0),
        ("dual_cross_attention", True),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("layers_per_block", [2, 2, 2]),
        ("mid_block_type", None),
        ("norm_num_groups", 30),
        ("norm_num_groups", None),
        ("only_cross_attention", [False, True, False]),
        ("out_channels", 8),
        ("projection_class_embeddings_input_dim", 1536),
        ("quantization_config", {"load_in_4bit": True}),
        ("resnet_time_scale_shift", "scale_shift"),
        ("sample_size", None),
        ("time_cond_proj_dim", 256),
        ("transformer_layers_per_block", [1, [1, 2], 10]),
        ("up_block_types", ["CrossAttnUpBlock2D"] * 2),
    ],
)


class TestUNet(BackboneSuite):
    case = CASE

    def check_fresh(self, flat):
        q, k = (CASE.layers.replace("to_q", name) for name in ("to_q", "to_k"))
        assert not np.allclose(flat[q], flat[k])  # parts are drawn independently


def test_2_1_is_2_at_another_size():
    larger = SD2 | {"sample_size": 96, "upcast_attention": True}
    ours, base = CASE.config(larger), CASE.config(SD2)
    changed = {k for k, v in vars(ours).items() if v != getattr(base, k)}
    assert changed == {"sample_size"}


def remats(jaxpr):
    """Numbers of (checkpointed parts, those of them inside a loop)."""
    outer = inner = 0
    for eqn in jaxpr.eqns:
        outer += eqn.primitive.name.startswith("remat")
        if eqn.primitive.name == "scan":
            inner += sum(remats(eqn.params["jaxpr"].jaxpr))
    return outer, inner


@pytest.mark.parametrize("remat, counts", [(True, (2 + 2 + 4, 1 + 1)), (False, (0, 0))])
def test_remat_recomputes_residual_and_transformer_blocks(remat, counts):
    ours = CASE.network(TINY, remat=remat)
    call = unet.FAMILY.predictor(ours.apply, CASE.config(TINY))
    jaxpr = jax.make_jaxpr(call)(ours.abstract, *CASE.inputs(Size(TINY, 2, 4))).jaxpr
    assert remats(jaxpr) == counts


def test_extras_are_the_pipelines_micro_conditioning_of_sdxl():
    plain, sdxl = (CASE.config(c) for c in (SD15, SDXL))
    assert (plain.pooled_dim, sdxl.pooled_dim) == (None, 1280)
    assert unet.FAMILY.extras(plain, 2, 512, 768) is None
    pooled = np.ones((2, 1280), np.float32)
    extras = unet.FAMILY.extras(sdxl, 2, 512, 768, pooled)
    assert extras["text_embeds"] is pooled
    np.testing.assert_array_equal(extras["time_ids"], [[512, 768, 0, 0, 512, 768]] * 2)
    with pytest.raises(InputError, match="^pooled: found nothing; expected"):
        unet.FAMILY.extras(sdxl, 2, 512, 768)


def test_a_predictor_passes_text_and_extras_and_no_mask():
    x, t, (text, _, added) = CASE.inputs(SIZES["linear"])
    cond = Cond(text, "mask", added)

    def apply(*args, **kwargs):
        return args, kwargs

    call = unet.FAMILY.predictor(apply, CASE.config(LINEAR))
    assert call("params", x, t, cond) == (("params", x, t, text, added), {})
    expected = ("params", x, t, text, added), {"method": "features"}
    assert unet.FAMILY.features(apply)("params", x, t, cond) == expected


def test_published_configs_are_read():
    assert unet.FAMILY.class_names == (SD15["_class_name"],)
    small, large = (CASE.config(c) for c in (SD15, SDXL))
    assert small.feature_blocks == large.feature_blocks == 0  # a middle block's output alone
    assert small.attention_head_dim == (8,) * 4 and small.transformer_layers_per_block == (1,) * 4
    assert (small.sample_size, small.in_channels, small.multiple) == (64, 4, 8)
    assert large.transformer_layers_per_block == (1, 2, 10)
    assert (large.sample_size, large.multiple) == (128, 4)
    hash(large)


def test_bad_inputs_are_refused():
    ours, (x, t, (text, _, added)) = loaded(CASE, "linear").network, loaded(CASE, "linear").inputs
    ids = added["time_ids"]
    for bad in (None, {}, {"time_ids": ids}, added | {"text_embeds": ids}):
        with pytest.raises(InputError, match=r"^added_cond\['text_embeds'\]: found"):
            jax.eval_shape(ours.apply, ours.abstract, x, t, text, bad)
    with pytest.raises(InputError, match=r"^added_cond\['time_ids'\]: found shape \(3, 5\)"):
        jax.eval_shape(ours.apply, ours.abstract, x, t, text, added | {"time_ids": ids[:, :5]})
    for method in ("__call__", "features"):
        with pytest.raises(InputError, match="^latents: found 9 x 6; expected multiples of 2"):
            args = ours.abstract, x[:, :-1], t, text, added
            jax.eval_shape(partial(ours.apply, method=method), *args)
