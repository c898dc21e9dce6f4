"""Sample images: PROMPT-NUMBER.png for every prompt, prompts.jsonl, and a contact sheet grid.png.

Image n of prompt p starts from noise p of seed SEED + n, whatever else is sampled.

Unlike diffusers' pipelines of PixArt and SANA it samples at the requested size (no resolution
binning) and does not clean captions: use_resolution_binning=False and clean_caption=False make
theirs do the same.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gadjax.api import Model, load, with_sampling
from gadjax.assets import resolve
from gadjax.cli.output import add_lora_argument, check_at_least, stop_on_write_error
from gadjax.cli.route import Route, add_route_argument, parse_routes, route_prompts
from gadjax.data.prompts import check_prompt
from gadjax.errors import InputError, RunStopped, check_choice
from gadjax.evaluation.layouts import LAYOUTS, open_layout
from gadjax.io.atomic import atomic_folder, check_no_overlap, check_target
from gadjax.io.image_grid import grid, save_png, to_uint8
from gadjax.pipelines.known_students import PUBLISHED_STUDENTS
from gadjax.pipelines.sampling import BATCH, draw, initial_noise, sampler_and_times
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import check_seed

INDEX = "prompts.jsonl"
GRID_LIMIT = 8  # prompts on the contact sheet, and images per prompt
GRID_SIDE = 128  # pixels; smaller images are enlarged to about this side
MAX_IMAGE_BYTES = 1 << 30  # of images in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="pipeline folder, workdir, or asset:NAME")
    parser.add_argument("--teacher", help="teacher of a workdir's run, if it has moved since")
    add_lora_argument(parser)
    add_route_argument(parser)
    parser.add_argument("--prompts", required=True, help=".txt, .jsonl or .csv, or asset:NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="by default those of the model or its family")
    parser.add_argument("--guidance", type=float, help="by default that of the model or its family")
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument(
        "--nasa",
        type=float,
        default=0.0,
        metavar="S",
        help="subtract S times the negative prompt's attention (NASA), for students without "
        "guidance",
    )
    parser.add_argument(
        "--size",
        help="image size, HEIGHTxWIDTH in pixels, sampled as given (no resolution binning); by "
        "default the network's",
    )
    parser.add_argument(
        "--student-preset",
        help="sampling settings of a published student, if the folder has none: "
        f"{', '.join(PUBLISHED_STUDENTS)}",
    )
    parser.add_argument("--per-prompt", type=int, default=1, help="images per prompt")
    parser.add_argument("--batch", type=int, default=BATCH, help="images per batch")
    parser.add_argument("--dtype", default="float32", help="of the networks: float32 or bfloat16")
    parser.add_argument("--variant", help="variant of the weight files, such as fp16")
    parser.add_argument(
        "--layout",
        default="plain",
        help=f"names and folders of the images, as outside scripts take them: {', '.join(LAYOUTS)}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier images")


@pinned_jax_config()
def run(args: argparse.Namespace) -> int:
    routes = parse_routes(args.route)
    sources = [args.model, *(route.model for route in routes), args.prompts]
    check_target(args.out, overwrite=args.overwrite, marker=INDEX)
    check_no_overlap(args.out, *map(resolve, sources))
    for flag in ("steps", "per_prompt", "batch"):
        check_at_least(f"--{flag.replace('_', '-')}", getattr(args, flag), 1)
    check_seed(args.seed, "--seed", args.per_prompt)
    check_prompt(args.negative or "", "--negative")
    layout = open_layout(args.layout, resolve(args.prompts), args.per_prompt)
    prompts = layout.prompts
    if args.student_preset is not None:
        check_choice("--student-preset", args.student_preset, PUBLISHED_STUDENTS)
    route_P = route_prompts(routes, prompts)
    models = _load_models(args, routes, sorted({0, *route_P}))
    for model in models.values():
        layout.check_size(*model.pipeline.latent[:2])

    # (index of the prompt, index of the image)
    jobs = [(p, n) for p in range(len(prompts)) for n in range(args.per_prompt)]
    lines, shown = {}, {}
    with (
        stop_on_write_error(args.out),
        atomic_folder(args.out, overwrite=args.overwrite, marker=INDEX) as out,
    ):
        with tqdm(total=len(jobs), unit="image", disable=None) as bar:
            for (p, n), image in _draw_routed(models, route_P, prompts, jobs, args, bar.update):
                name = layout.save(out, p, n, to_uint8(image))
                line = {"file": name, "prompt": prompts[p], "seed": args.seed + n, "noise": p}
                if routes:
                    line["model"] = sources[route_P[p]]
                lines[p, n] = json.dumps(line) + "\n"
                if p < GRID_LIMIT and n < GRID_LIMIT:
                    shown[p, n] = image
        layout.save_files(out)
        (out / INDEX).write_text("".join(lines[job] for job in jobs), encoding="utf-8")
        _save_grid(shown, prompts, args.seed, out / "grid.png")
    steps = " or ".join(dict.fromkeys(str(model.sampling.steps) for model in models.values()))
    print(f"{args.out}: {len(jobs)} images in {steps} steps each")
    return 0


def _load_models(
    args: argparse.Namespace, routes: list[Route], numbers: list[int]
) -> dict[int, Model]:
    """Models by number, with the sampling settings of the flags; 0 is --model, others are routes.

    Raises: InputError for settings that one of them does not have, and for latents of two sizes.
    """
    models, size = {}, _size(args.size)
    base_options = {
        "student_preset": args.student_preset,
        "teacher": args.teacher,
        "lora": args.lora,
    }
    for number in numbers:
        name, options = (routes[number - 1].model, {}) if number else (args.model, base_options)
        model = load(name, dtype=args.dtype, variant=args.variant, **options)
        try:
            model = with_sampling(model, args.steps, args.guidance, args.negative, size, args.nasa)
        except InputError as error:
            raise InputError(f"--{error}") from error
        sampler_and_times(model.pipeline, model.sampling)  # refuses unsupported steps before work
        models[number] = model
    sizes = {(*model.pipeline.latent, model.pipeline.upscale) for model in models.values()}
    if len(sizes) > 1:
        raise InputError(
            f"--route: found latents and scales {', '.join(map(str, sorted(sizes)))}; expected one "
            "for all models"
        )
    return models


def _save_grid(
    shown: dict[tuple[int, int], np.ndarray], prompts: list[str], seed: int, path: Path
) -> None:
    """Write the contact sheet: a row for each seed.

    Args:
      shown: images by (index of the prompt, index of the image).
      prompts: all prompts.
      seed: of the first row.
      path: of the file.
    """
    numbers = sorted({n for _, n in shown})
    rows = [
        (f"seed {seed + n}", np.stack([shown[p, m] for p, m in sorted(shown) if m == n]))
        for n in numbers
    ]
    scale = max(1, GRID_SIDE // rows[0][1].shape[1])
    save_png(grid(rows, prompts[:GRID_LIMIT], scale), path)


def _draw_routed(
    models: dict[int, Model],
    route_P: list[int],
    prompts: list[str],
    jobs: list[tuple[int, int]],
    args: argparse.Namespace,
    progress: Callable[[int], object],
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Sample the image of every job with its prompt's model; as `_draw`, model by model.

    Args:
      models: by number.
      route_P: number of each prompt's model.
      prompts, jobs, args, progress: as for `_draw`.
    """
    for number, model in models.items():
        model_jobs = [job for job in jobs if route_P[job[0]] == number]
        yield from zip(model_jobs, _draw(model, prompts, model_jobs, args, progress), strict=True)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise InputError(f"--size: found {text!r}; expected HEIGHTxWIDTH, such as 512x768")
    return int(match[1]), int(match[2])


def _draw(
    model: Model,
    prompts: list[str],
    jobs: list[tuple[int, int]],
    args: argparse.Namespace,
    progress: Callable[[int], object],
) -> Iterator[np.ndarray]:
    """Sample the image of every job, in parts that fit MAX_IMAGE_BYTES.

    Args:
        model: with the sampling settings of the flags.
        prompts: all prompts.
        jobs: (index of the prompt, index of the image).
        args: flags of the command.
        progress: gets numbers of finished images.

    Yields:
        image_HWC, in the order of the jobs.

    Raises:
        RunStopped: the images are not finite.
    """
    latent, upscale = model.pipeline.latent, model.pipeline.upscale
    seeds = range(args.seed, args.seed + args.per_prompt)
    noise = np.stack([initial_noise(seed, len(prompts), latent) for seed in seeds], axis=1)
    image_bytes = latent[0] * latent[1] * upscale**2 * 3 * 4
    # Every part compiles again, so it is as large as memory allows.
    most = max(1, MAX_IMAGE_BYTES // (image_bytes * args.batch)) * args.batch
    for start in range(0, len(jobs), most):
        part = jobs[start : start + most]
        images = draw(
            model,
            [prompts[p] for p, _ in part],
            np.stack([noise[job] for job in part]),
            batch=args.batch,
            progress=progress,
        )
        if not np.isfinite(images).all():
            raise RunStopped(f"{args.model}: found images that are not finite; none were kept")
        yield from images
