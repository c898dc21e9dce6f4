"""Random configurations of the networks' classes, small enough to be computed in a second.

Each function returns (fixed, usual, odd): keys that every case has, so that the network is small;
keys that a case has or leaves to their defaults; and keys with values that few or no published
networks have, of which a case has one at most. Together they are the class's own signature.
"""

import inspect
from typing import Any

import diffusers
import numpy as np
import transformers
from sweeping import Choice

Options = dict[str, Any]


def clip(pick: Choice) -> tuple[Options, Options, Options]:
    heads = pick(1, 2, 3, 4)
    fixed = dict(
        vocab_size=pick(20, 50, 99),
        hidden_size=heads * pick(4, 6, 8),
        intermediate_size=pick(8, 20, 40),
        num_hidden_layers=pick(1, 2, 3),
        num_attention_heads=heads,
        max_position_embeddings=pick(9, 16, 30),
        projection_dim=pick(4, 12, 20),
    )
    usual = dict(
        hidden_act=pick("quick_gelu", "gelu"),
        layer_norm_eps=pick(1e-5, 1e-6, 1e-3),
        attention_dropout=pick(0.0, 0.1),
        initializer_range=0.02,
        initializer_factor=pick(1.0, 0.5),
        pad_token_id=pick(1, 0, None),
        bos_token_id=pick(0, 3, None),
        eos_token_id=pick(2, fixed["vocab_size"] - 1, 7),
    )
    odd = dict(
        hidden_act=pick("relu", "gelu_new", "silu", "gelu_pytorch_tanh", "gelu_fast"),
        layer_norm_eps=1,
        eos_token_id=pick(None, [2, 3]),
        projection_dim=pick(0, None),
    )
    return fixed, usual, odd


def t5(pick: Choice) -> tuple[Options, Options, Options]:
    buckets = pick(4, 8, 16, 32)
    fixed = dict(
        vocab_size=pick(20, 50, 99),
        d_model=pick(8, 12, 24),
        d_kv=pick(3, 4, 8),
        d_ff=pick(8, 20, 40),
        num_layers=pick(1, 2, 3),
        num_heads=pick(1, 2, 3),
    )
    usual = dict(
        num_decoder_layers=pick(1, 2, None),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=pick(33, 64, 128, 1000),
        dropout_rate=pick(0.0, 0.1),
        layer_norm_epsilon=pick(1e-6, 1e-5, 1e-3),
        initializer_factor=pick(1.0, 0.5),
        feed_forward_proj=pick("relu", "gated-gelu"),
        use_cache=pick(True, False),
        pad_token_id=pick(0, 1, None),
        eos_token_id=pick(1, 2, None),
        classifier_dropout=pick(0.0, 0.1),
        is_decoder=False,
        is_encoder_decoder=pick(True, False),
    )
    odd = dict(
        feed_forward_proj=pick(
            "gated-silu", "gelu", "gated-relu", "silu", "gelu_new", "gated-gelu_new"
        ),
        relative_attention_num_buckets=pick(6, 10, 2, 7),
        relative_attention_max_distance=pick(5, 8, 3),
        is_decoder=True,
        layer_norm_epsilon=1,
    )
    return fixed, usual, odd


def gemma2(pick: Choice) -> tuple[Options, Options, Options]:
    heads = pick(1, 2, 4, 6)
    layers = pick(1, 2, 3)
    fixed = dict(
        vocab_size=pick(20, 50, 99),
        hidden_size=pick(8, 12, 24),
        intermediate_size=pick(8, 20, 40),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pick(*(n for n in (1, 2, 3, 4, 6) if heads % n == 0)),
        head_dim=pick(4, 6, 10),
    )
    usual = dict(
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=pick(8192, 64, 16),
        initializer_range=0.02,
        rms_norm_eps=pick(1e-6, 1e-5, 1e-3),
        use_cache=pick(True, False),
        pad_token_id=pick(0, 1),
        eos_token_id=pick(1, [1, 7]),
        bos_token_id=pick(2, 3),
        tie_word_embeddings=pick(True, False),
        rope_parameters={"rope_type": "default", "rope_theta": pick(10_000.0, 500.0, 10_000)},
        attention_bias=False,
        attention_dropout=pick(0.0, 0.1),
        query_pre_attn_scalar=pick(256, 7, 12.5),
        sliding_window=pick(4096, 64, 32),
        layer_types=[pick("full_attention", "sliding_attention") for _ in range(layers)],
        final_logit_softcapping=pick(30.0, None),
        attn_logit_softcapping=pick(50.0, 2.0, 30),
        use_bidirectional_attention=pick(None, False),
    )
    odd = dict(
        hidden_activation=pick("gelu", "silu", "relu"),
        attention_bias=True,
        sliding_window=pick(4, 8, 2),
        attn_logit_softcapping=pick(None, 0.0),
        use_bidirectional_attention=True,
        rope_parameters=pick(
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
            {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
            {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0},
            {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        ),
        head_dim=pick(5, 7),
    )
    return fixed, usual, odd


def qwen3(pick: Choice) -> tuple[Options, Options, Options]:
    heads = pick(1, 2, 4, 6)
    layers = pick(1, 2, 3)
    fixed = dict(
        vocab_size=pick(20, 50, 99),
        hidden_size=pick(8, 12, 24),
        intermediate_size=pick(8, 20, 40),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pick(*(n for n in (1, 2, 3, 4, 6) if heads % n == 0)),
        head_dim=pick(4, 6, 10),
    )
    usual = dict(
        hidden_act="silu",
        max_position_embeddings=pick(32768, 64, 16),
        initializer_range=0.02,
        rms_norm_eps=pick(1e-6, 1e-5, 1e-3),
        use_cache=pick(True, False),
        pad_token_id=pick(0, 1),
        eos_token_id=pick(1, [1, 7]),
        bos_token_id=pick(2, 3),
        rope_parameters={"rope_type": "default", "rope_theta": pick(1_000_000.0, 500.0, 10_000)},
        attention_bias=False,
        attention_dropout=pick(0.0, 0.1),
        use_sliding_window=False,
        sliding_window=pick(4096, 4, None),
        max_window_layers=pick(28, 0),
        layer_types=["full_attention"] * layers,
    )
    odd = dict(
        hidden_act=pick("gelu", "relu", "gelu_pytorch_tanh"),
        attention_bias=True,
        use_sliding_window=True,
        layer_types=["sliding_attention"] * layers,
        rope_parameters=pick(
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
            {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
            {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        ),
        head_dim=pick(5, 7),
    )
    return fixed, usual, odd


def unet(pick: Choice) -> tuple[Options, Options, Options]:
    blocks = pick(1, 2, 2, 3)
    widths = [pick(8, 12, 16, 24) for _ in range(blocks)]
    sized = pick.chance(0.3)
    more = pick(2, 6)
    cross = pick(8, 20)
    fixed = dict(
        sample_size=pick(8, 16, 64),
        block_out_channels=widths,
        down_block_types=[pick("CrossAttnDownBlock2D", "DownBlock2D") for _ in widths],
        up_block_types=[pick("CrossAttnUpBlock2D", "UpBlock2D") for _ in widths],
        layers_per_block=pick(1, 2),
        cross_attention_dim=cross,
        norm_num_groups=pick(1, 2, 4),
        attention_head_dim=pick(1, 2, 4, [pick(1, 2, 4) for _ in widths]),
    )
    if channels := pick(None, 3, 8):
        fixed |= dict(in_channels=channels, out_channels=channels)
    if sized:
        fixed |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=more,
            projection_class_embeddings_input_dim=pick(5, 10) + 6 * more,
        )
    usual = dict(
        center_input_sample=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        mid_block_type="UNetMidBlock2DCrossAttn",
        only_cross_attention=pick(False, [False] * blocks),
        downsample_padding=1,
        mid_block_scale_factor=pick(1, 1.0),
        dropout=pick(0, 0.0),
        act_fn="silu",
        norm_eps=pick(1e-5, 1e-6, 1e-3),
        transformer_layers_per_block=pick(1, 2, [pick(1, 2) for _ in widths]),
        reverse_transformer_layers_per_block=None,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        num_attention_heads=None,
        dual_cross_attention=False,
        use_linear_projection=pick(True, False),
        class_embed_type=None,
        addition_embed_type=fixed.get("addition_embed_type"),
        num_class_embeds=None,
        upcast_attention=pick(None, False, True),
        resnet_time_scale_shift="default",
        resnet_skip_time_act=False,
        resnet_out_scale_factor=pick(1.0, 1),
        time_embedding_type="positional",
        time_embedding_dim=None,
        time_embedding_act_fn=None,
        timestep_post_act=None,
        time_cond_proj_dim=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
        attention_type="default",
        class_embeddings_concat=False,
        mid_block_only_cross_attention=pick(None, False),
        cross_attention_norm=None,
        addition_embed_type_num_heads=pick(64, 4),
        addition_time_embed_dim=fixed.get("addition_time_embed_dim"),
        projection_class_embeddings_input_dim=fixed.get("projection_class_embeddings_input_dim"),
        in_channels=fixed.get("in_channels", 4),
        out_channels=fixed.get("out_channels", 4),
    )
    wider = 4 * widths[0]
    odd = dict(
        sample_size=pick([8, 16], None),
        in_channels=9,
        center_input_sample=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        down_block_types=[
            pick("AttnDownBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
            for _ in widths
        ],
        up_block_types=[
            pick("AttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")
            for _ in widths
        ],
        mid_block_type=pick("UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None),
        only_cross_attention=pick(True, [True] * blocks),
        layers_per_block=[pick(1, 2) for _ in widths],
        downsample_padding=0,
        mid_block_scale_factor=pick(1.4, 2),
        dropout=0.1,
        act_fn=pick("gelu", "mish", "relu", "swish"),
        norm_num_groups=None,
        cross_attention_dim=pick([cross] * blocks, [cross, cross + 4, cross][:blocks]),
        transformer_layers_per_block=[[pick(1, 2)] * 2 for _ in widths],
        reverse_transformer_layers_per_block=[[pick(1, 2)] * 2 for _ in widths],
        encoder_hid_dim=cross,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=pick(3, [2] * (blocks + 1)),
        num_attention_heads=2,
        dual_cross_attention=True,
        class_embed_type=pick("timestep", "identity", "projection"),
        addition_embed_type=pick("text", "image"),
        num_class_embeds=4,
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4,
        time_embedding_type="fourier",
        time_embedding_dim=wider * pick(1, 2),
        time_embedding_act_fn=pick("silu", "gelu"),
        timestep_post_act=pick("silu", "gelu"),
        time_cond_proj_dim=8,
        conv_in_kernel=pick(1, 5),
        conv_out_kernel=pick(1, 5),
        attention_type=pick("gated", "gated-text-image"),
        class_embeddings_concat=True,
        mid_block_only_cross_attention=True,
        cross_attention_norm=pick("layer_norm", "group_norm"),
    )
    return fixed, usual, odd


def pixart(pick: Choice) -> tuple[Options, Options, Options]:
    heads, patch = pick(1, 2, 4), pick(1, 2, 2, 4)
    width = pick(12, 24)
    inner = heads * width
    channels = pick(None, 3, 4)
    fixed = dict(
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=pick(1, 2, 3),
        cross_attention_dim=inner,
        caption_channels=pick(8, 20),
        sample_size=pick(8, 16, 32, 64, 128),
        patch_size=patch,
    )
    if channels is not None:
        fixed |= dict(in_channels=channels, out_channels=pick(channels, 2 * channels, None))
    usual = dict(
        in_channels=fixed.get("in_channels", 4),
        out_channels=fixed.get("out_channels", pick(8, 4, None)),
        dropout=pick(0.0, 0),
        norm_num_groups=pick(32, 8),
        attention_bias=pick(True, True, False),
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=pick(1000, 100),
        upcast_attention=pick(False, True),
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=pick(1e-6, 1e-5, 1e-3),
        interpolation_scale=pick(None, 1, 2, 0.5),
        use_additional_conditions=pick(None, False, True),
        attention_type="default",
    )
    odd = dict(
        attention_head_dim=pick(5, 6, 10),
        in_channels=9,
        out_channels=12,
        dropout=0.1,
        cross_attention_dim=pick(inner + 4, None),
        activation_fn=pick("gelu", "geglu", "silu"),
        norm_type=pick("ada_norm", "layer_norm", "ada_norm_zero"),
        norm_elementwise_affine=True,
        caption_channels=None,
        attention_type="gated",
        interpolation_scale=0,
        sample_size=[8, 16],
        num_embeds_ada_norm=None,
        norm_eps=1,
        use_additional_conditions=pick(0, 1),
    )
    return fixed, usual, odd


def sana(pick: Choice) -> tuple[Options, Options, Options]:
    heads, width = pick(1, 2, 4), pick(4, 6, 8)
    channels = pick(None, 4, 8)
    fixed = dict(
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=pick(1, 2, 3),
        num_cross_attention_heads=pick(1, 2, 4),
        cross_attention_dim=heads * width,
        caption_channels=pick(8, 20),
    )
    fixed["cross_attention_head_dim"] = heads * width // fixed["num_cross_attention_heads"]
    if channels is not None:
        fixed |= dict(in_channels=channels, out_channels=pick(channels, 2 * channels, None))
    usual = dict(
        in_channels=fixed.get("in_channels", 32),
        out_channels=fixed.get("out_channels", pick(32, 64, None)),
        mlp_ratio=pick(2.5, 2.0, 3, 1.7),
        dropout=pick(0.0, 0),
        attention_bias=pick(False, False, True),
        sample_size=pick(32, 8, 16),
        patch_size=pick(1, 1, 2),
        norm_elementwise_affine=False,
        norm_eps=pick(1e-6, 1e-5, 1e-3),
        interpolation_scale=pick(None, None, 1.0, 2, 0.5),
        guidance_embeds=pick(False, True),
        guidance_embeds_scale=pick(0.1, 1.0, 2),
        qk_norm=pick(None, "rms_norm_across_heads"),
        timestep_scale=pick(1.0, 0.001, 1000, 0.5),
    )
    odd = dict(
        cross_attention_dim=pick(None, heads * width + 4),
        dropout=0.1,
        norm_elementwise_affine=True,
        qk_norm=pick("rms_norm", "layer_norm", "layer_norm_across_heads"),
        cross_attention_head_dim=pick(3, 5),
        attention_head_dim=pick(3, 5),
        caption_channels=None,
        sample_size=[8, 16],
        out_channels=12,
        interpolation_scale=0,
        norm_eps=1,
    )
    return fixed, usual, odd


def sd3(pick: Choice) -> tuple[Options, Options, Options]:
    heads, width, layers = pick(1, 2, 4), pick(4, 6, 8), pick(2, 3, 4)
    width = 2 * width if heads == 1 else width
    channels = pick(None, 4, 8)
    fixed = dict(
        num_layers=layers,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=pick(8, 20),
        caption_projection_dim=heads * width,
        pooled_projection_dim=pick(5, 12),
        pos_embed_max_size=pick(8, 12, 16),
        sample_size=pick(4, 8, 16),
    )
    if channels is not None:
        fixed |= dict(in_channels=channels, out_channels=pick(channels, None))
    usual = dict(
        patch_size=pick(2, 2, 1),
        in_channels=fixed.get("in_channels", 16),
        out_channels=fixed.get("out_channels", pick(16, None)),
        dual_attention_layers=list(range(pick(0, 0, 1, 2, layers))),
        qk_norm=pick(None, "rms_norm"),
    )
    odd = dict(
        num_layers=1,
        caption_projection_dim=heads * width + 4,
        attention_head_dim=pick(3, 5),
        out_channels=12,
        dual_attention_layers=pick(
            [1], [layers - 1], [0, 0], [1, 0], [layers + 3], list(range(layers + 1))
        ),
        qk_norm=pick(
            "layer_norm", "rms_norm_across_heads", "layer_norm_across_heads", "fp32_layer_norm"
        ),
        patch_size=3,
        sample_size=[8, 16],
    )
    return fixed, usual, odd


def kl(pick: Choice) -> tuple[Options, Options, Options]:
    widths = [pick(8, 12, 16) for _ in range(pick(1, 2, 2, 3))]
    fixed = dict(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        norm_num_groups=pick(1, 2, 4),
    )
    usual = dict(
        in_channels=pick(3, 3, 1, 4),
        out_channels=pick(3, 3, 1, 4),
        layers_per_block=pick(1, 2),
        act_fn=pick("silu", "swish"),
        latent_channels=pick(4, 8, 16),
        sample_size=pick(32, 512, [16, 32]),
        scaling_factor=pick(0.18215, 1, 1.5305),
        shift_factor=pick(None, 0.0609),
        latents_mean=None,
        latents_std=None,
        force_upcast=pick(True, False),
        use_quant_conv=pick(True, False),
        use_post_quant_conv=pick(True, False),
        mid_block_add_attention=pick(True, False),
    )
    odd = dict(
        down_block_types=[pick("AttnDownEncoderBlock2D", "DownBlock2D") for _ in widths],
        up_block_types=[pick("AttnUpDecoderBlock2D", "UpBlock2D") for _ in widths],
        act_fn=pick("relu", "gelu", "mish"),
        latents_mean=[0.1] * 4,
        latents_std=[1.1] * 4,
        norm_num_groups=3,
        block_out_channels=[pick(8, 9, 10) for _ in widths],
        use_quant_conv=0,
        mid_block_add_attention=pick(0, 1),
    )
    return fixed, usual, odd


def dc(pick: Choice) -> tuple[Options, Options, Options]:
    stages = pick(2, 2, 3)
    widths = [8, 16, 32][:stages] if pick.chance(0.5) else [pick(8, 16)] * stages
    other = widths if pick.chance(0.7) else [2 * width for width in widths]
    blocks = ("ResBlock", "EfficientViTBlock")
    scales = ([], [5], [3], [3, 5])
    fixed = dict(
        latent_channels=pick(4, 8),
        attention_head_dim=pick(3, 4, 8),
        encoder_block_types=pick(*blocks, [pick(*blocks) for _ in widths]),
        decoder_block_types=pick(*blocks, [pick(*blocks) for _ in widths]),
        encoder_block_out_channels=widths,
        decoder_block_out_channels=other,
        encoder_layers_per_block=[pick(1, 1, 2) for _ in widths],
        decoder_layers_per_block=[pick(1, 1, 2) for _ in widths],
        encoder_qkv_multiscales=[pick(*scales) for _ in widths],
        decoder_qkv_multiscales=[pick(*scales) for _ in widths],
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )
    usual = dict(
        in_channels=pick(3, 1),
        decoder_norm_types=pick("rms_norm", ["rms_norm"] * stages),
        decoder_act_fns=pick("silu", ["silu"] * stages),
        encoder_out_shortcut=True,
        decoder_in_shortcut=True,
        decoder_conv_act_fn="relu",
        scaling_factor=pick(1.0, 0.41407, 1),
    )
    odd = dict(
        latent_channels=3,
        encoder_layers_per_block=[0, *[1] * (stages - 1)],
        decoder_layers_per_block=[*[1] * (stages - 1), 0],
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types=pick("batch_norm", "layer_norm"),
        decoder_act_fns=pick("relu", "gelu"),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_conv_act_fn=pick("silu", "gelu"),
        encoder_block_out_channels=[8, 24, 40][:stages],
    )
    return fixed, usual, odd


def flux(pick: Choice) -> tuple[Options, Options, Options]:
    axes = [2 * pick(1, 2), 2 * pick(1, 2, 3), 2 * pick(1, 2)]
    channels = pick(4, 12, 16)
    fixed = dict(
        in_channels=channels,
        num_layers=pick(1, 2),
        num_single_layers=pick(1, 2, 3),
        attention_head_dim=sum(axes),
        num_attention_heads=pick(1, 2, 3),
        joint_attention_dim=pick(8, 20),
        pooled_projection_dim=pick(5, 12),
        axes_dims_rope=axes,
    )
    usual = dict(patch_size=1, out_channels=pick(None, channels), guidance_embeds=pick(True, False))
    odd = dict(
        patch_size=2,
        out_channels=2 * channels,
        in_channels=channels + 1,
        axes_dims_rope=pick(axes[:2], [sum(axes)], [1, 1, sum(axes) - 2]),
    )
    return fixed, usual, odd


def flux2(pick: Choice) -> tuple[Options, Options, Options]:
    axes = [2 * pick(1, 2), 2 * pick(1, 2, 3), 2 * pick(1, 2), 2 * pick(1, 2)]
    channels = pick(3, 8, 16)
    fixed = dict(
        in_channels=channels,
        num_layers=pick(1, 2),
        num_single_layers=pick(1, 2, 3),
        attention_head_dim=sum(axes),
        num_attention_heads=pick(1, 2, 3),
        joint_attention_dim=pick(8, 20),
        axes_dims_rope=axes,
        guidance_embeds=False,
    )
    usual = dict(
        patch_size=1,
        out_channels=pick(None, channels),
        timestep_guidance_channels=pick(16, 64),
        mlp_ratio=pick(3.0, 4, 2.3),
        rope_theta=pick(2000, 10_000, 300.0),
        eps=pick(1e-6, 1e-4),
    )
    odd = dict(
        patch_size=2,
        out_channels=2 * channels,
        guidance_embeds=True,
        timestep_guidance_channels=31,
        mlp_ratio=0,
        axes_dims_rope=pick(axes[:3], [sum(axes)], [1, 1, 2, sum(axes) - 4]),
    )
    return fixed, usual, odd


def zimage(pick: Choice) -> tuple[Options, Options, Options]:
    axes = [2 * pick(1, 2), 2 * pick(1, 2, 3), 2 * pick(1, 2)]
    heads = pick(1, 2, 3)
    fixed = dict(
        in_channels=pick(3, 4, 16),
        dim=heads * sum(axes),
        n_layers=pick(1, 2, 3),
        n_refiner_layers=pick(1, 2),
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=pick(8, 20),
        axes_dims=axes,
        axes_lens=[pick(70, 1536), pick(12, 512), pick(12, 512)],
    )
    usual = dict(
        all_patch_size=[2],
        all_f_patch_size=[1],
        norm_eps=pick(1e-5, 1e-6, 1e-3),
        qk_norm=True,
        siglip_feat_dim=None,
        rope_theta=pick(256.0, 256, 100.0),
        t_scale=pick(1000.0, 1000, 500.0),
    )
    odd = dict(
        all_patch_size=pick([4], [2, 4]),
        all_f_patch_size=[2],
        qk_norm=False,
        n_kv_heads=heads + 1,
        siglip_feat_dim=12,
        norm_eps=1,
        n_refiner_layers=0,
    )
    return fixed, usual, odd


def lumina2(pick: Choice) -> tuple[Options, Options, Options]:
    axes = [2 * pick(1, 2), 2 * pick(1, 2, 3), 2 * pick(1, 2)]
    heads = pick(1, 2, 4, 6)
    channels = pick(3, 4, 16)
    fixed = dict(
        in_channels=channels,
        hidden_size=heads * sum(axes),
        num_layers=pick(1, 2, 3),
        num_refiner_layers=pick(1, 2),
        num_attention_heads=heads,
        num_kv_heads=pick(*(n for n in (1, 2, 3, 4, 6) if heads % n == 0)),
        multiple_of=pick(1, 16, 24),
        cap_feat_dim=pick(8, 20),
        axes_dim_rope=axes,
        axes_lens=[pick(30, 300), pick(12, 512), pick(12, 512)],
    )
    usual = dict(
        sample_size=pick(128, 8, 16),
        patch_size=2,
        out_channels=pick(None, channels),
        ffn_dim_multiplier=pick(None, 0.7, 2, 1.3),
        norm_eps=pick(1e-5, 1e-6, 1e-3),
        scaling_factor=pick(1.0, 0.5),
    )
    odd = dict(
        patch_size=4,
        out_channels=2 * channels,
        axes_dim_rope=pick(axes[:2], [sum(axes)], [1, 1, sum(axes) - 2]),
        num_kv_heads=heads + 1,
        norm_eps=1,
        num_refiner_layers=0,
        sample_size=7,
    )
    return fixed, usual, odd


def kl_flux2(pick: Choice) -> tuple[Options, Options, Options]:
    fixed, usual, odd = kl(pick)
    own = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
    usual = {key: value for key, value in usual.items() if key not in own}
    usual |= dict(
        decoder_block_out_channels=None,
        batch_norm_eps=pick(1e-4, 1e-5, 0.3),
        batch_norm_momentum=pick(0.1, 0.01),
        patch_size=[2, 2],
    )
    odd = {key: value for key, value in odd.items() if key not in own}
    odd |= dict(
        decoder_block_out_channels=[8] * len(fixed["block_out_channels"]),
        batch_norm_eps=1,
        patch_size=[1, 1],
    )
    return fixed | {"latent_channels": pick(2, 4, 8)}, usual, odd


MAKERS = {
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": clip,
    "T5EncoderModel": t5,
    "Gemma2Model": gemma2,
    "Qwen3Model": qwen3,
    "UNet2DConditionModel": unet,
    "PixArtTransformer2DModel": pixart,
    "Transformer2DModel": pixart,
    "SanaTransformer2DModel": sana,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "Flux2Transformer2DModel": flux2,
    "ZImageTransformer2DModel": zimage,
    "Lumina2Transformer2DModel": lumina2,
    "AutoencoderKL": kl,
    "AutoencoderDC": dc,
    "AutoencoderKLFlux2": kl_flux2,
}
ODD = 0.25  # share of cases with an unusual option


def class_of(name: str) -> type:
    """The class that is built: the old name's configurations are PixArt's."""
    name = "PixArtTransformer2DModel" if name == "Transformer2DModel" else name
    return getattr(diffusers if hasattr(diffusers, name) else transformers, name)


def keys_of(name: str) -> set[str]:
    """The options that the class itself has, by its signature."""
    kind = class_of(name)
    shared = set()
    if hasattr(kind, "config_class"):
        shared = set(inspect.signature(transformers.PreTrainedConfig.__init__).parameters)
        kind = kind.config_class
    return set(inspect.signature(kind.__init__).parameters) - shared - {"self"}


def check_options(name: str) -> None:
    """Raises: AssertionError for an option of the class that no case has."""
    options = MAKERS[name](Choice(np.random.default_rng(0)))
    of_all = {"is_encoder_decoder", "tie_word_embeddings"}  # which some configurations repeat
    absent = keys_of(name).difference(of_all, *options)
    assert not absent, f"{name}: found {sorted(absent)} in its signature; expected a choice of each"


def random_config(name: str, pick: Choice) -> Options:
    """Options of a class, or of its configuration's."""
    fixed, usual, odd = MAKERS[name](pick)
    options = {key: usual[key] for key in pick.some(list(usual))} | fixed
    if pick.chance(ODD):
        key = pick(*odd)
        options[key] = odd[key]
    return options
