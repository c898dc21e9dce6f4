"""Export a workdir's weights as a complete diffusers pipeline folder, checked against diffusers.

The check needs torch and diffusers; without them the model card reads "Not verified" until
`gadjax export --verify DIR`.
"""

import argparse
import os
import shutil
from pathlib import Path

from gadjax.assets import resolve
from gadjax.cli.output import check_at_least, parse_dtype, stop_on_write_error
from gadjax.errors import InputError
from gadjax.formats.lora_header import DIFFUSERS_WEIGHTS
from gadjax.formats.lora_writer import KEYS
from gadjax.formats.model_card import record_verification, verified_text
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.io.atomic import atomic_folder
from gadjax.io.storage import as_path
from gadjax.pipelines import parity
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.export import export
from gadjax.training.export_lora import export_lora
from gadjax.training.export_single import export_single
from gadjax.training.workdir import read_trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", help="of gadjax train")
    parser.add_argument("--out", type=Path, help="new folder")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="export the EMA weights, or the weights after the last update",
    )
    parser.add_argument("--step", type=int, help="by default the newest")
    parser.add_argument("--teacher", help="teacher folder, if it has moved since the run")
    parser.add_argument("--dtype", help="dtype of the weights: float32, bfloat16 or float16")
    parser.add_argument(
        "--report", type=Path, help="report.json of gadjax evaluate, for the model card"
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="export the adapters of a LoRA run, not the merged pipeline",
    )
    parser.add_argument(
        "--keys", default="diffusers", help=f"names in a LoRA's file: {', '.join(KEYS)}"
    )
    parser.add_argument(
        "--single-file",
        action="store_true",
        help="export the backbone as one file, and of SD1.5, SDXL and SD3 the pipeline in the "
        "original names, with a workflow of ComfyUI",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="only check an earlier export")


@pinned_jax_config()
def run(args: argparse.Namespace) -> int:
    if args.verify is not None:
        return _verify_only(args.verify)
    for flag in ("workdir", "out"):
        if getattr(args, flag) is None:
            raise InputError(f"--{flag}: found nothing; expected a folder")
    if args.lora and args.single_file:
        raise InputError("--single-file: found it with --lora; expected one of them")
    check_at_least("--step", args.step, 0)
    dtype, part = parse_dtype(args.dtype), "ema" if args.ema else "student"
    trained = read_trained(as_path(args.workdir), part, args.step)
    options = {
        "teacher": resolve(args.teacher) if args.teacher else None,
        "dtype": dtype,
        "overwrite": args.overwrite,
    }
    with stop_on_write_error(args.out):
        if args.lora:
            verified = export_lora(trained, args.out, keys=args.keys, **options)
        elif args.single_file:
            verified = export_single(trained, args.out, **options)
        else:
            verified = export(trained, args.out, report=args.report, **options)
    print(f"{args.out}: {'average' if args.ema else 'weights'} of step {trained.step}")
    print(verified_text(str(args.out), verified, args.lora))
    return 0


def _verify_only(folder: Path) -> int:
    parity.require("--verify")
    if (folder / DIFFUSERS_WEIGHTS).is_file():
        raise InputError(
            f"{folder}: found a LoRA, which is compared when it is exported; expected a pipeline"
        )
    if not (folder / GADJAX_JSON).is_file():
        raise InputError(
            f"{folder}: found no {GADJAX_JSON}; expected a folder written by gadjax export"
        )
    verified = parity.verify(folder)
    with (
        stop_on_write_error(folder),
        atomic_folder(folder, overwrite=True, marker=GADJAX_JSON) as new,
    ):
        shutil.copytree(folder, new, copy_function=_link, dirs_exist_ok=True)
        record_verification(new, verified)
    print(verified_text(str(folder), verified))
    return 0


def _link(src: str, dst: str) -> None:
    """Hard-link a file, or copy it if links fail; replacing one leaves the other as it is."""
    try:
        os.link(src, dst)
    except OSError:
        shutil.copy2(src, dst)
