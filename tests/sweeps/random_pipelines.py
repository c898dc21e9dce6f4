"""Small pipelines of every class, with random networks, schedulers and settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import families
import torch
from random_folders import VERSIONS, edit, randomise
from random_schedulers import random_scheduler
from sweeping import Choice

from gadjax.formats.diffusers_folder import INDEX, SCHEDULER

DDPM = ("DPMSolverMultistepScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler")
EULER, FLOW, SCM = "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "SCMScheduler"
# Of one block: most of a case's time goes into compiling, and networks have sweeps of their own.
SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
# Their classes count a shift by the picture's tokens.
NEWER = ("FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline", "Lumina2Pipeline")
CONCEPTS = ("<cat>", "<cat>_1", "<dog>", "sks")


def random_vae(pick: Choice, channels: int, shifted: bool = False):
    """shifted: with a shift, as some classes cannot do without."""
    scale, shift = pick((0.18215, None), (0.13025, None), (1.5305, 0.0609), (1, 0.2))
    shift = 0.1159 if shifted and shift is None else shift
    quant = pick(True, False)
    widths = pick((8,), (8,), (8, 12))
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=pick(True, False),
        force_upcast=pick(True, False),
    )


def random_clip(pick: Choice, width: int, projected: int | None = None):
    tokenizer = families.clip_tokenizer(pick("<|endoftext|>", "!"))
    if pick.chance(0.3):
        tokenizer.add_tokens(list(CONCEPTS[: pick(1, 2, 4)]))
    tokenizer.model_max_length = pick(77, 77, 20)
    act, eos = pick("quick_gelu", "gelu"), pick(2, tokenizer.eos_token_id)
    return tokenizer, families.clip(tokenizer, width, act, projected, eos)


def sd(pick: Choice):
    tokenizer, encoder = random_clip(pick, 24)
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        unet=families.unet(
            24,
            use_linear_projection=pick(True, False),
            attention_head_dim=pick(2, 8),
            **pick(SMALL, SMALL, {}),
        ),
        vae=random_vae(pick, 4),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(pick: Choice):
    one, encoder = random_clip(pick, 20)
    two, other = random_clip(pick, 28, 12)
    two.model_max_length = one.model_max_length
    times = pick(4, 6)
    small = SMALL | {"transformer_layers_per_block": [2], "attention_head_dim": [4]}
    options = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
    }
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=one,
        tokenizer_2=two,
        text_encoder=encoder,
        text_encoder_2=other,
        unet=families.unet(
            48,
            use_linear_projection=True,
            **pick(small, small, options),
            addition_embed_type="text_time",
            addition_time_embed_dim=times,
            projection_class_embeddings_input_dim=12 + 6 * times,
        ),
        vae=random_vae(pick, 4),
        scheduler=diffusers.DDIMScheduler(),
        force_zeros_for_empty_prompt=pick(True, False),
        add_watermarker=False,
    )


def pixart(pick: Choice, kind: type):
    tokenizer, encoder = families.t5(20)
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=pick(8, 4),
        num_layers=pick(1, 2),
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=20,
        use_additional_conditions=pick(None, True),
        interpolation_scale=pick(None, 2),
    )
    return kind(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=random_vae(pick, 4),
        transformer=net,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def alpha(pick: Choice):
    return pixart(pick, diffusers.PixArtAlphaPipeline)


def sigma(pick: Choice):
    return pixart(pick, diffusers.PixArtSigmaPipeline)


def sana(pick: Choice, kind: type = diffusers.SanaPipeline):
    tokenizer, encoder = families.gemma(20)
    sprint = kind is diffusers.SanaSprintPipeline
    scheduler = diffusers.SCMScheduler() if sprint else diffusers.DPMSolverMultistepScheduler()
    return kind(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=families.vae_dc(),
        transformer=families.sana_net(
            num_layers=pick(1, 2),
            guidance_embeds=sprint,
            qk_norm=pick(None, "rms_norm_across_heads"),
            timestep_scale=pick(1.0, 0.5),
            guidance_embeds_scale=pick(0.1, 1.0),
            interpolation_scale=pick(None, 1.0),
        ),
        scheduler=scheduler,
    )


def sprint(pick: Choice):
    return sana(pick, diffusers.SanaSprintPipeline)


def sd3(pick: Choice):
    one, first = random_clip(pick, 20, 14)
    two, second = random_clip(pick, 28, 10)
    two.model_max_length = one.model_max_length
    tokenizer, encoder = families.t5(56) if pick.chance(0.7) else (None, None)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=pick(2, 3),
        attention_head_dim=6,
        num_attention_heads=4,
        joint_attention_dim=56,
        caption_projection_dim=24,
        pooled_projection_dim=14 + 10,
        pos_embed_max_size=16,
        qk_norm=pick(None, "rms_norm"),
        dual_attention_layers=pick((), (0,)),
    )
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=one,
        tokenizer_2=two,
        tokenizer_3=tokenizer,
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=encoder,
        vae=random_vae(pick, 8),
        transformer=net,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def of_family(make: Callable, pick: Choice, channels: int | None = None, **options):
    """A family's tiny pipeline with another autoencoder of so many channels."""
    pipeline = make(**options)
    if channels:
        pipeline.register_modules(vae=random_vae(pick, channels, shifted=True))
    return pipeline


def flux(pick: Choice):
    embeds = pick(True, False)
    return of_family(families.flux_schnell, pick, 4, guidance_embeds=embeds)


def klein(pick: Choice):
    return of_family(families.flux2_klein, pick)


def z_image(pick: Choice):
    return of_family(families.z_image, pick, 8)


def lumina2(pick: Choice):
    return of_family(families.lumina2, pick, 8)


# Class -> how it is made, and the schedulers that it mostly has.
PIPELINES: dict[str, tuple[Callable[[Choice], Any], tuple[str, ...]]] = {
    "StableDiffusionPipeline": (sd, (*DDPM, EULER)),
    "StableDiffusionXLPipeline": (sdxl, (*DDPM, EULER)),
    "PixArtAlphaPipeline": (alpha, DDPM),
    "PixArtSigmaPipeline": (sigma, DDPM),
    "SanaPipeline": (sana, (DDPM[0], DDPM[0], FLOW)),
    "SanaSprintPipeline": (sprint, (SCM,)),
    "StableDiffusion3Pipeline": (sd3, (FLOW, FLOW, DDPM[0])),
    "FluxPipeline": (flux, (FLOW,)),
    "Flux2KleinPipeline": (klein, (FLOW,)),
    "ZImagePipeline": (z_image, (FLOW,)),
    "Lumina2Pipeline": (lumina2, (FLOW,)),
}


def write_pipeline(name: str, folder: Path, pick: Choice) -> dict[str, Any]:
    """Make a folder. Returns: its scheduler's configuration."""
    make, schedulers = PIPELINES[name]
    generator = torch.Generator().manual_seed(pick.rng.integers(1 << 31).item())
    torch.manual_seed(generator.initial_seed())
    pipeline = make(pick)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            randomise(part, generator)
    pipeline.save_pretrained(folder)
    kind = pick(*schedulers)
    if pick.chance(0.03):
        kind = pick(*DDPM, EULER, FLOW, SCM)
    scheduler = random_scheduler(kind, pick, odd=0.08)
    if (
        name in ("SanaPipeline", "StableDiffusion3Pipeline")
        and kind == DDPM[0]
        and pick.chance(0.8)
    ):
        scheduler |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if name in NEWER and kind == FLOW and pick.chance(0.1 if name[:3] == "Lum" else 0.6):
        scheduler |= {
            "use_dynamic_shifting": True,
            "time_shift_type": pick("exponential", "linear"),
        }
        line = {
            "base_image_seq_len": 2,
            "max_image_seq_len": 1024,
            "base_shift": 0.3,
            "max_shift": 2,
        }
        scheduler |= pick({}, line)
    (folder / SCHEDULER).write_text(json.dumps(scheduler))

    def change_index(index: dict[str, Any]) -> None:
        index["scheduler"] = ["diffusers", kind]
        index["_diffusers_version"] = pick(*VERSIONS) or "0.30.0"
        if pick.chance(0.3):
            index.pop("force_zeros_for_empty_prompt", None)
        if pick.chance(0.2):
            index["_name_or_path"] = "somebody/model"

    edit(folder / INDEX, change_index)
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        if pick.chance(0.15):
            edit(path, lambda held: held.update(padding_side=pick("left", "right")))
    for path in folder.glob("text_encoder*/config.json"):
        if pick.chance(0.15) and "Clip" in path.read_text().title():
            edit(path, lambda held: held.update(use_attention_mask=pick(True, False)))
    # Before 0.9 a U-Net has at least 64 latents a side, which take seconds.
    version = pick("0.8.0" if pick.chance(0.1) else "0.9.0", "0.30.3", "0.42.0")
    for path in (folder / "vae" / "config.json", *folder.glob("unet/config.json")):
        edit(path, lambda held: held.update(_diffusers_version=version))
    return scheduler
