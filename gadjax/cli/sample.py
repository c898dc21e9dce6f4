"""Draw pictures: PROMPT-NUMBER.png for each prompt, prompts.jsonl, and a contact sheet grid.png.

Picture n of prompt p starts from noise p of seed SEED + n, whatever else is drawn.

Unlike diffusers' pipelines of PixArt and SANA it draws the size that is asked for (no resolution
binning) and does not clean captions: use_resolution_binning=False and clean_caption=False make
theirs do the same.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from gadjax.api import Model, drawn_with, load
from gadjax.assets import resolve
from gadjax.cli.output import check_least, storage
from gadjax.convert.atomic import atomic_folder, check_apart, check_target
from gadjax.data.prompts import check_prompt, read_prompts
from gadjax.errors import InputError, RunStopped
from gadjax.sampling import BATCH, draw, initial_noise, sampler_and_times
from gadjax.seeds import check_seed
from gadjax.settings import settled
from gadjax.students import KNOWN
from gadjax.training.preview import grid, save_png, to_uint8

MARKER = "prompts.jsonl"
SHOWN = 8  # prompts on the sheet, and pictures of each
SIDE = 128  # small pictures are shown at about this side
HELD = 1 << 30  # bytes of pictures in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="pipeline folder, workdir, or asset:NAME")
    parser.add_argument("--teacher", help="of a workdir's run, if it has moved since")
    parser.add_argument("--prompts", required=True, help=".txt, .jsonl or .csv, or asset:NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="by default what the model or its family says")
    parser.add_argument(
        "--guidance", type=float, help="by default what the model or its family says"
    )
    parser.add_argument("--negative", help="prompt that guidance leads away from")
    parser.add_argument(
        "--size",
        help="of pictures, HEIGHTxWIDTH in pixels, drawn as asked (no resolution binning); by "
        "default the network's own",
    )
    parser.add_argument(
        "--recipe", help=f"of a known student, where the folder has none: {', '.join(KNOWN)}"
    )
    parser.add_argument("--per-prompt", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures at a time")
    parser.add_argument("--dtype", default="float32", help="of the networks: float32 or bfloat16")
    parser.add_argument("--variant", help="of the weights' files, such as fp16")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier pictures")


@settled()
def run(args: argparse.Namespace) -> int:
    source = resolve(args.model)
    check_target(args.out, overwrite=args.overwrite, marker=MARKER)
    check_apart(args.out, source, resolve(args.prompts))
    for flag in ("steps", "per_prompt", "batch"):
        check_least(f"--{flag.replace('_', '-')}", getattr(args, flag), 1)
    check_seed(args.seed, "--seed", args.per_prompt)
    check_prompt(args.negative or "", "--negative")
    prompts = read_prompts(resolve(args.prompts))
    if args.recipe not in (None, *KNOWN):
        raise InputError(f"--recipe: found {args.recipe!r}; expected one of {', '.join(KNOWN)}")
    size = _size(args.size)
    model = load(
        args.model,
        dtype=args.dtype,
        variant=args.variant,
        recipe=args.recipe,
        teacher=args.teacher,
    )
    try:
        model = drawn_with(model, args.steps, args.guidance, args.negative, size)
    except InputError as error:
        raise InputError(f"--{error}") from error
    sampler_and_times(model.pipeline, model.sampling)  # refuses steps that cannot be taken

    # (prompt's number, picture's number)
    jobs = [(p, n) for p in range(len(prompts)) for n in range(args.per_prompt)]
    lines, shown = [], {}
    with storage(args.out), atomic_folder(args.out, overwrite=args.overwrite, marker=MARKER) as out:
        with tqdm(total=len(jobs), unit="picture", disable=None) as bar:
            images = _draw(model, prompts, jobs, args, bar.update)
            for (p, n), image in zip(jobs, images, strict=True):
                name = f"{p:05d}-{n}.png"
                save_png(Image.fromarray(to_uint8(image)), out / name)
                line = {"file": name, "prompt": prompts[p], "seed": args.seed + n, "noise": p}
                lines.append(json.dumps(line) + "\n")
                if p < SHOWN and n < SHOWN:
                    shown.setdefault(f"seed {args.seed + n}", []).append(image)
        (out / MARKER).write_text("".join(lines), encoding="utf-8")
        rows = [(label, np.stack(images)) for label, images in shown.items()]
        scale = max(1, SIDE // rows[0][1].shape[1])
        save_png(grid(rows, prompts[:SHOWN], scale), out / "grid.png")
    print(f"{args.out}: {len(jobs)} pictures in {model.sampling.steps} steps each")
    return 0


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise InputError(f"--size: found {text!r}; expected HEIGHTxWIDTH, such as 512x768")
    return int(found[1]), int(found[2])


def _draw(
    model: Model,
    prompts: list[str],
    jobs: list[tuple[int, int]],
    args: argparse.Namespace,
    progress: Callable[[int], object],
) -> Iterator[np.ndarray]:
    """image_HWC of each job."""
    latent, upscale = model.pipeline.latent, model.pipeline.upscale
    seeds = range(args.seed, args.seed + args.per_prompt)
    noise = np.stack([initial_noise(seed, len(prompts), latent) for seed in seeds], axis=1)
    picture = latent[0] * latent[1] * upscale**2 * 3 * 4
    # Every part is compiled anew, so it is as large as memory allows.
    most = max(1, HELD // (picture * args.batch)) * args.batch
    for start in range(0, len(jobs), most):
        part = jobs[start : start + most]
        images = draw(
            model.pipeline,
            model.params,
            model.sampling,
            [prompts[p] for p, _ in part],
            np.stack([noise[job] for job in part]),
            batch=args.batch,
            progress=progress,
        )
        if not np.isfinite(images).all():
            raise RunStopped(f"{args.model}: found pictures that are not finite; none were kept")
        yield from images
