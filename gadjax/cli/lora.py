"""LoRA files: their contents, the difference of two models as a LoRA, a model with LoRAs merged.

info FILE: networks, spelling of the keys, ranks, scales, metadata.
extract A B: LoRA that makes B of A, by singular value decomposition.
merge FOLDER LORA[:WEIGHT]...: a diffusers folder with the LoRAs added to its weights.
"""

import argparse
from pathlib import Path

from gadjax.assets import resolve
from gadjax.cli.output import check_at_least, parse_dtype, stop_on_write_error
from gadjax.errors import InputError, check_choice
from gadjax.formats.lora_file import parse_lora_flag
from gadjax.formats.lora_info import lora_lines
from gadjax.formats.lora_writer import KEYS
from gadjax.formats.model_card import verified_text
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.io.atomic import atomic_folder, check_no_overlap, check_target
from gadjax.pipelines import extract_lora
from gadjax.pipelines.adapted import write_merged
from gadjax.pipelines.lora_folder import write_lora_folder
from gadjax.runtime.settings import pinned_jax_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="contents of a LoRA file")
    info.add_argument("file", type=Path, metavar="FILE", help="safetensors file, or its folder")
    extract = actions.add_parser("extract", help="difference of two models as a LoRA")
    extract.add_argument("before", metavar="A", help="pipeline folder that the LoRA is for")
    extract.add_argument("after", metavar="B", help="pipeline folder with other weights")
    size = extract.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="of every layer; 64 by default")
    size.add_argument(
        "--energy", type=float, help="share of the squared difference that is kept, in place of it"
    )
    extract.add_argument("--prompt", help="compare pictures of this prompt, too")
    extract.add_argument("--keys", default="diffusers", help=f"names: {', '.join(KEYS)}")
    merge = actions.add_parser("merge", help="model with LoRAs added to its weights")
    merge.add_argument("folder", metavar="FOLDER", help="pipeline folder, or asset:NAME")
    merge.add_argument("loras", nargs="+", metavar="LORA[:WEIGHT]", help="files or folders")
    for action in (extract, merge):
        action.add_argument("--out", type=Path, required=True, help="new folder")
        action.add_argument("--dtype", help="of the files: float32, bfloat16 or float16")
        action.add_argument("--overwrite", action="store_true", help="replace an earlier result")


@pinned_jax_config()
def run(args: argparse.Namespace) -> int:
    return {"info": _info, "extract": _extract, "merge": _merge}[args.action](args)


def _info(args: argparse.Namespace) -> int:
    print("\n".join(lora_lines(args.file)))
    return 0


def _extract(args: argparse.Namespace) -> int:
    check_choice("--keys", args.keys, KEYS)
    check_at_least("--rank", args.rank, 1)
    if args.energy is not None and not 0 < args.energy <= 1:
        raise InputError(f"--energy: found {args.energy}; expected a share above 0, up to 1")
    dtype, before, after = parse_dtype(args.dtype), resolve(args.before), resolve(args.after)
    check_target(args.out, overwrite=args.overwrite, marker=GADJAX_JSON)
    check_no_overlap(args.out, before, after)
    rank = args.rank or (None if args.energy else 64)
    extracted = extract_lora.extract(before, after, rank, args.energy)
    print(extract_lora.table(extracted.difference))
    if args.prompt is not None:
        errors = extract_lora.picture_errors(extracted, args.prompt)
        print(
            f"pictures of {args.prompt!r}: {errors['lora']:.4f} from {after.name} with the LoRA, "
            f"{errors['before']:.4f} without (root mean square, values in [0, 1])"
        )
    lora = extract_lora.lora_export(extracted, args.out.resolve().name)
    with (
        stop_on_write_error(args.out),
        atomic_folder(args.out, overwrite=args.overwrite, marker=GADJAX_JSON) as out,
    ):
        verified = write_lora_folder(out, lora, keys=args.keys, dtype=dtype)
        text = extract_lora.errors_json(extracted.difference)
        (out / "errors.json").write_text(text + "\n", encoding="utf-8")
    print(verified_text(str(args.out), verified, lora=True))
    return 0


def _merge(args: argparse.Namespace) -> int:
    loras = [parse_lora_flag(text) for text in args.loras]
    dtype, folder = parse_dtype(args.dtype), resolve(args.folder)
    with stop_on_write_error(args.out):
        write_merged(folder, loras, args.out, dtype=dtype, overwrite=args.overwrite)
    names = ", ".join(f"{path.name} ({weight:g})" for path, weight in loras)
    print(f"{args.out}: {folder.name} with {names}")
    return 0
