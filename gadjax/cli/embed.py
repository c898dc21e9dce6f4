"""Encode prompts, or images and their captions, to embeddings and latents ahead of training.

Training then reads the embeddings (data.embeddings), or embeddings and latents (data.latents).
Those of text encoders with --lora belong to the folder that `gadjax lora merge` writes.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from gadjax.assets import resolve
from gadjax.cli.output import add_lora_argument, check_at_least, stop_on_write_error
from gadjax.data.embeddings import DTYPES, Encoded, Origin, write_embeddings
from gadjax.data.images import BACKGROUND, Pictures, open_images
from gadjax.data.prompts import read_prompts
from gadjax.errors import InputError
from gadjax.formats.fingerprints import image_fingerprint, text_fingerprint
from gadjax.formats.lora_file import parse_lora_flag
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import read_sampling
from gadjax.io.atomic import atomic_folder, check_target
from gadjax.pipelines.adapted import merge_text_encoders
from gadjax.pipelines.pipeline import Pipeline, make_pipeline
from gadjax.runtime.settings import pinned_jax_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="pipeline folder, or asset:NAME")
    add_lora_argument(parser, "text encoders")
    parser.add_argument("--prompts", help=".txt, .jsonl or .csv, or asset:NAME")
    parser.add_argument("--images", help="folder of images with captions, instead of prompts")
    parser.add_argument(
        "--background", default=BACKGROUND, help="background colour of transparent images"
    )
    parser.add_argument("--column", default="prompt", help="column of the .jsonl or .csv")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the embeddings")
    parser.add_argument("--length", type=int, help="in tokens; by default the model's")
    parser.add_argument("--batch", type=int, default=32, help="prompts and images per batch")
    parser.add_argument(
        "--dtype", default=DTYPES[0], help=f"dtype of the files: {' or '.join(DTYPES)}"
    )
    parser.add_argument("--variant", help="variant of the weight files, such as fp16")


@pinned_jax_config()
def run(args: argparse.Namespace) -> int:
    check_target(args.out)
    check_at_least("--length", args.length, 1)
    check_at_least("--batch", args.batch, 1)
    if args.dtype not in DTYPES:
        raise InputError(f"--dtype: found {args.dtype!r}; expected {' or '.join(DTYPES)}")
    if bool(args.prompts) == bool(args.images):
        given = "both" if args.prompts else "nothing"
        raise InputError(f"--prompts or --images: found {given}; expected one of them")
    source, column, pictures = resolve(args.model), args.column, None
    loras = [parse_lora_flag(text) for text in args.lora]
    if args.images:
        pictures = open_images(resolve(args.images), column, args.background)
    prompts = pictures.captions if pictures else read_prompts(resolve(args.prompts), column)
    folder = open_folder(source, variant=args.variant, components=())
    needed = [*folder.text_encoders, *(["vae"] if pictures else [])]
    folder = open_folder(source, variant=args.variant, components=needed)
    folder, changed = merge_text_encoders(folder, loras)
    identity = text_fingerprint(source, variant=args.variant, changed=changed)
    pipeline, origin = make_pipeline(folder), Origin(identity)
    length = args.length or read_sampling(source, pipeline.sampling).length
    size = min(args.batch, len(prompts))
    encode = _text_encoder(pipeline, length, size)
    if pictures:
        encode_images = _image_encoder(pipeline, pictures, size)
        identity = image_fingerprint(folder.components["vae"])
        origin = replace(origin, vae=identity, latent=pipeline.latent)
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:

        def batches() -> Iterator[Encoded]:
            for start in range(0, len(prompts), size):
                some = range(start, min(start + size, len(prompts)))
                text = encode([prompts[i] for i in some])
                yield text | {"x0": encode_images(some)} if pictures else text
                bar.update(len(some))

        null = encode(None)
        with stop_on_write_error(args.out), atomic_folder(args.out) as out:
            write_embeddings(out, prompts, batches(), null, origin=origin, dtype=args.dtype)
    what = "images, and captions" if pictures else "prompts"
    print(f"{args.out}: {len(prompts)} {what} of {length} tokens")
    return 0


def _text_encoder(pipeline: Pipeline, length: int, size: int):
    """Return a function of up to `size` prompts to their embeddings, compiled for that one size.

    None stands for the negative prompt, whose embeddings have no batch axis.
    """
    run = jax.jit(pipeline.prompts.encode)
    params = {
        name: pipeline.folder.components[name].params for name in pipeline.folder.text_encoders
    }
    params = jax.device_put(params)

    def encode(prompts: list[str] | None) -> Encoded:
        if prompts is None:
            tokens = pipeline.prompts.negative_tokens(None, length)
        else:
            tokens = pipeline.tokens(prompts + [""] * (size - len(prompts)), length)
        encoded = dict(zip(("text", "mask", "pooled"), run(params, *tokens), strict=True))
        keep = 0 if prompts is None else slice(len(prompts))
        return {name: np.asarray(x)[keep] for name, x in encoded.items() if x is not None}

    return encode


def _image_encoder(pipeline: Pipeline, pictures: Pictures, size: int):
    """Return a function of the indices of up to `size` images to their latents, x0_BHWC."""
    run = jax.jit(pipeline.encode_image)
    params = jax.device_put(pipeline.folder.components["vae"].params)
    height, width = (side * pipeline.upscale for side in pipeline.latent[:2])

    def encode(indices: Sequence[int]) -> np.ndarray:
        images = pictures.read(indices, (height, width))
        images = np.resize(
            images, (size, *images.shape[1:])
        )  # repeats the first ones to fill the batch
        return np.asarray(run(params, images))[: len(indices)]

    return encode
