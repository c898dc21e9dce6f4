"""Small pipelines of every family, made by diffusers, with random parameters."""

import json
import string
from pathlib import Path

import torch

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
WORDS = ("red", "green", "blue", "circle", "square", "above", "a", "the")
LONG_WORDS = tuple(word for word in WORDS if len(word) > 1)


def clip_tokenizer(pad: str):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocab = ["!", *(x for x in letters if x != "!"), *(f"{x}</w>" for x in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            vocab.append(parts[0])
    # The end has the highest id, as pooling wants it.
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        pad_token=pad,
        model_max_length=77,
    )
    return tokenizer


def clip(tokenizer, width: int, act: str, projected: int | None = None, eos: int = 2):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=projected or width,
        eos_token_id=eos,
        bos_token_id=0,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(width: int, words=LONG_WORDS):
    from transformers import T5Config, T5EncoderModel

    from gadjax.models.text.tokenizer import build_word_tokenizer

    tokenizer = build_word_tokenizer([*words])
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=6,
        d_ff=28,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return tokenizer, T5EncoderModel(config)


def gemma(width: int):
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = [*pieces, "▁", *string.ascii_lowercase]
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=12,
        attn_implementation="eager",
    )
    return tokenizer, Gemma2Model(config)


# As published: other roles and tools aside.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def qwen2_tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AddedToken, Qwen2Tokenizer

    vocab, merges = sorted(ByteLevel.alphabet()), []
    for word in ("user", *WORDS, *(f"Ġ{word}" for word in WORDS)):
        parts = [*word]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            vocab.append(parts[0])
    vocab = [*dict.fromkeys(vocab), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3(width: int, layers: int = 4, causal: bool = False):
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    tokenizer = qwen2_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return tokenizer, (Qwen3ForCausalLM if causal else Qwen3Model)(config)


def vae_kl(channels: int = 4, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **more,
    )


def vae_flux(channels: int):
    more = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae_kl(channels, scaling_factor=0.3611, shift_factor=0.1159, **more)


def unet(cross: int, **more):
    from diffusers import UNet2DConditionModel

    options = dict(
        sample_size=8,
        block_out_channels=(16, 24),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    return UNet2DConditionModel(**options | more)


def sd15():
    import diffusers

    tokenizer = clip_tokenizer("<|endoftext|>")
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 20, "quick_gelu"),
        unet=unet(20),
        vae=vae_kl(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2_v():
    import diffusers

    tokenizer = clip_tokenizer("!")
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 24, "gelu"),
        unet=unet(24, use_linear_projection=True, attention_head_dim=[2, 4]),
        vae=vae_kl(),
        scheduler=diffusers.DDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            **SD,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    import diffusers

    one, two = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=one,
        tokenizer_2=two,
        text_encoder=clip(one, 20, "quick_gelu"),
        text_encoder_2=clip(two, 28, "gelu", 12),
        unet=unet(
            48,
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2],
            attention_head_dim=[2, 4],
            addition_embed_type="text_time",
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=12 + 6 * 6,
        ),
        vae=vae_kl(scaling_factor=0.13025),
        scheduler=diffusers.EulerDiscreteScheduler(
            timestep_spacing="leading", steps_offset=1, **SD
        ),
    )


def vae_dc():
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def sana_net(**more):
    from diffusers import SanaTransformer2DModel

    options = dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=6,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=16,
        patch_size=1,
    )
    return SanaTransformer2DModel(**options | more)


def sana():
    import diffusers

    tokenizer, encoder = gemma(20)
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae_dc(),
        transformer=sana_net(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )


def sana_sprint():
    import diffusers

    tokenizer, encoder = gemma(20)
    net = sana_net(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return diffusers.SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae_dc(),
        transformer=net,
        scheduler=diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    )


def z_image():
    import diffusers

    tokenizer, encoder = qwen3(20)
    net = diffusers.ZImageTransformer2DModel(
        in_channels=8,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae_flux(8),
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def lumina2():
    import diffusers

    tokenizer, encoder = gemma(20)
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=8,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=[4, 4, 4],
        axes_lens=[300, 16, 16],
        cap_feat_dim=20,
    )
    return diffusers.Lumina2Pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae_flux(8),
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def sd3(**more):
    import diffusers

    one, two = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
    tokenizer, encoder = t5(56)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=6,
        num_attention_heads=4,
        joint_attention_dim=56,
        caption_projection_dim=24,
        pooled_projection_dim=14 + 10,
        pos_embed_max_size=12,
        **more,
    )
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=one,
        tokenizer_2=two,
        tokenizer_3=tokenizer,
        text_encoder=clip(one, 20, "quick_gelu", 14),
        text_encoder_2=clip(two, 28, "gelu", 10),
        text_encoder_3=encoder,
        vae=vae_kl(
            8,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd35():
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def sd35_large():
    return sd3(qk_norm="rms_norm")


def pixart_sigma():
    import diffusers

    tokenizer, encoder = t5(20)
    net = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        cross_attention_dim=36,
        caption_channels=20,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae_kl(scaling_factor=0.13025),
        transformer=net,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def flux_schnell(dynamic=False, **more):
    import diffusers

    one = clip_tokenizer("<|endoftext|>")
    tokenizer, encoder = t5(56)
    net = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=56,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        **more,
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dynamic else {"shift": 1.0}
    return diffusers.FluxPipeline(
        tokenizer=one,
        tokenizer_2=tokenizer,
        text_encoder=clip(one, 20, "quick_gelu"),
        text_encoder_2=encoder,
        vae=vae_flux(4),
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
    )


def flux_dev():
    return flux_schnell(dynamic=True, guidance_embeds=True)


def vae_flux2():
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    with torch.no_grad():
        vae.bn.running_mean += torch.randn(16)
        vae.bn.running_var += torch.rand(16)
    return vae


def flux2_klein():
    import diffusers

    tokenizer, encoder = qwen3(20, layers=28, causal=True)  # 27 of which are read
    net = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=60,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return diffusers.Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae_flux2(),
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


# Prompt lengths that are not the defaults, where they are free.
LENGTH = {"sana": 20, "sana_sprint": 20, "sd3": 12, "sd35": 12, "sd35_large": 12}
LENGTH |= {"pixart_sigma": 140, "flux_dev": 12, "flux_schnell": 12}  # PixArt-alpha's are 120
LENGTH |= {"z_image": 40, "flux2_klein": 44, "lumina2": 220}  # with a chat or system prompt
ALL = (sd15, sd2_v, sdxl, sana, sana_sprint, sd3, sd35, sd35_large, pixart_sigma)
ALL += (flux_dev, flux_schnell, z_image, lumina2, flux2_klein)
# Times of few-step students. Not of SANA-Sprint, which is no teacher: its scheduler's steps add
# noise.
TIMES = {
    "sd15": (899, 449),
    "sd2_v": (999, 500),
    "sdxl": (999, 500),
    "sana": (999.67, 749.62),
    "sd3": (1000.0, 857.69, 602.15, 8.93),
    "sd35": (1000.0, 857.69, 602.15, 8.93),
    "sd35_large": (1000.0, 857.69, 602.15, 8.93),
    "pixart_sigma": (999, 500),
    "z_image": (1000.0, 857.14),
    "lumina2": (1000.0, 857.14),
    "flux_dev": (1000.0, 849.2, 652.5, 384.9),
    "flux_schnell": (1000.0, 500.0),
    "flux2_klein": (1000.0, 958.1),
}
EMBEDDED = {"flux_dev": 3.5}  # scale that the student is told
# Side of latents, where no option of the class says it.
SIDE = {"flux_dev": 8, "flux_schnell": 8, "z_image": 8, "flux2_klein": 4}
MAKERS = {f.__name__: f for f in ALL}
LOADERS = [name for name in MAKERS if name != "pixart_sigma"]  # whose pipelines load a LoRA


def make(family: str, folder: Path) -> Path:
    """Save one of MAKERS with random changes of all parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipeline = MAKERS[family]()
    with torch.no_grad():
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter += 0.1 * torch.randn(parameter.shape)
    pipeline.save_pretrained(folder)
    if family in SIDE:
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": SIDE[family]}))
    return folder
