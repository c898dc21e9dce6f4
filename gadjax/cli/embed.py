"""Encode prompts ahead of time, so that training reads embeddings (data.embeddings) instead."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from gadjax.assets import resolve
from gadjax.cli.output import check_least
from gadjax.convert.atomic import check_target
from gadjax.convert.orbax_folder import open_folder
from gadjax.convert.recipe import read_sampling
from gadjax.convert.text import text_fingerprint
from gadjax.data.embeddings import DTYPES, Encoded, write_embeddings
from gadjax.data.prompts import read_prompts
from gadjax.errors import InputError
from gadjax.pipeline import Pipeline, make_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="pipeline folder, or asset:NAME")
    parser.add_argument("--prompts", required=True, help=".txt, .jsonl or .csv, or asset:NAME")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the embeddings")
    parser.add_argument("--length", type=int, help="in tokens; by default what the model says")
    parser.add_argument("--batch", type=int, default=32, help="prompts at a time")
    parser.add_argument("--dtype", default=DTYPES[0], help=f"of the files: {' or '.join(DTYPES)}")
    parser.add_argument("--variant", help="of the weights' files, such as fp16")


def run(args: argparse.Namespace) -> int:
    check_target(args.out)
    check_least("--length", args.length, 1)
    check_least("--batch", args.batch, 1)
    if args.dtype not in DTYPES:
        raise InputError(f"--dtype: found {args.dtype!r}; expected {' or '.join(DTYPES)}")
    source, prompts = resolve(args.model), read_prompts(resolve(args.prompts))
    length = args.length or read_sampling(source).length
    folder = open_folder(source, variant=args.variant, components=("text_encoder",))
    pipeline = make_pipeline(folder)
    encode = _encoder(pipeline, folder.components["text_encoder"].params, length)
    (null,) = encode([""], 1)
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:

        def batches() -> Iterator[Encoded]:
            for text, mask in encode(prompts, args.batch):
                yield text, mask
                bar.update(len(text))

        write_embeddings(
            args.out,
            prompts,
            batches(),
            (null[0][0], null[1][0]),
            fingerprint=text_fingerprint(source, variant=args.variant),
            dtype=args.dtype,
        )
    print(f"{args.out}: {len(prompts)} prompts of {length} tokens")
    return 0


def _encoder(pipeline: Pipeline, params, length: int):
    """(prompts, batch) -> (text_BLD, mask_BL) of consecutive ones; one size is compiled."""
    run = jax.jit(pipeline.networks["text_encoder"].apply)
    params = jax.device_put(params)

    def encode(prompts: list[str], batch: int) -> Iterator[Encoded]:
        batch = min(batch, len(prompts))
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            ids, mask = pipeline.tokens(some + [""] * (batch - len(some)), length)
            yield np.asarray(run(params, ids, mask))[: len(some)], mask[: len(some)]

    return encode
