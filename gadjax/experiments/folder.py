"""Bundled pipeline folder with random weights: python -m gadjax.experiments.folder --out DIR

Writes a PixArtAlphaPipeline of the bundled world's size by diffusers' own save_pretrained (needs
torch and diffusers). The other scripts of this package then replace one component each.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from gadjax.formats.state_dict import tensors_from_params
from gadjax.models.keymap import KeyMap
from gadjax.models.text.tokenizer import build_word_tokenizer
from gadjax.types import Params
from gadjax.worlds import shapes

STEMS = {"text_encoder": "model"}  # every other component's file is a diffusers model's


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """config.json of one component of a pipeline folder."""
    return json.loads((folder / component / "config.json").read_text())


def replace_component(
    folder: Path, component: str, params: Params, keymap: KeyMap, config: Mapping[str, Any]
) -> None:
    """Overwrite one component's weights and config.json in place.

    Args:
      folder: a pipeline folder.
      component: name of the component's folder.
      params: its parameters.
      keymap: from parameter paths to tensor names.
      config: for config.json.
    """
    stem = STEMS.get(component, "diffusion_pytorch_model")
    tensors = dict(tensors_from_params(jax.device_get(params), keymap))
    save_file(tensors, folder / component / f"{stem}.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / component / "config.json").write_text(text)


def write(out: Path, seed: int) -> None:
    """Write a pipeline folder of the bundled world's size with randomly initialised weights."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = build_word_tokenizer(shapes.vocabulary())
    width, heads = 96, 4
    PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        ),
        vae=AutoencoderKL(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
        ),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=4,
            out_channels=8,
            num_layers=6,
            cross_attention_dim=width,
            sample_size=8,
            patch_size=2,
            caption_channels=64,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(
            # Less noise than PixArt's 0.02, at which 8x8 latents have long been destroyed.
            beta_schedule="linear",
            beta_start=1e-4,
            beta_end=0.015,
        ),
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.seed)


if __name__ == "__main__":
    main()
