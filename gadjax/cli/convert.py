"""Convert a diffusers pipeline folder to gadjax's own (Orbax), or back: bit for bit.

With --lora the result has the LoRA merged into its weights.
"""

import argparse
from pathlib import Path

from gadjax.assets import resolve
from gadjax.cli.output import add_lora_argument, parse_dtype, stop_on_write_error
from gadjax.errors import InputError, RunStopped
from gadjax.formats.diffusers_folder import INDEX, PipelineFolder, check_pipeline
from gadjax.formats.fingerprints import text_fingerprint
from gadjax.formats.lora_file import parse_lora_flag
from gadjax.formats.orbax_folder import (
    MANIFEST,
    is_gadjax_folder,
    open_folder,
    read_gadjax_folder,
    write_diffusers_folder,
    write_gadjax_folder,
)
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.io.atomic import atomic_folder, check_no_overlap, check_target
from gadjax.pipelines import parity
from gadjax.pipelines.adapted import merge_into_folder, record_sampling
from gadjax.runtime.settings import pinned_jax_config
from gadjax.training.workdir import is_workdir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="folder of either kind, or asset:NAME")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder of the other kind")
    add_lora_argument(parser)
    parser.add_argument("--check", action="store_true", help="compare with diffusers (needs torch)")
    parser.add_argument("--dtype", help="cast to float32, bfloat16 or float16")
    parser.add_argument("--variant", help="variant of the weight files, such as fp16")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .bin with torch's weights-only unpickler"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")


@pinned_jax_config()
def run(args: argparse.Namespace) -> int:
    src, dtype = resolve(args.src), parse_dtype(args.dtype)
    back = is_gadjax_folder(src)
    marker = INDEX if back else MANIFEST
    loras = [parse_lora_flag(text) for text in args.lora]
    if args.check:
        parity.require("--check")
    if args.check and loras and not back:
        raise InputError("--check: found it with --lora; expected one of them")
    if is_workdir(src):
        raise InputError(f"{src}: found a workdir; expected a pipeline folder (see gadjax export)")
    check_target(args.dst, overwrite=args.overwrite, marker=marker)
    check_no_overlap(args.dst, src)
    reading = {"variant": args.variant, "allow_pickle": args.allow_pickle}
    pipeline, sampling = merge_into_folder(open_folder(src, dtype=dtype, **reading), loras)
    with (
        stop_on_write_error(args.dst),
        atomic_folder(args.dst, overwrite=args.overwrite, marker=marker) as out,
    ):
        if back:
            write_diffusers_folder(pipeline, out)
        else:
            has_text = "text_encoder" in pipeline.components
            text = text_fingerprint(src, dtype=dtype, **reading) if has_text else ""
            write_gadjax_folder(pipeline, out, text)
        if sampling is not None:
            record_sampling(out / GADJAX_JSON, sampling, out / GADJAX_JSON)
        if args.check:
            converted = pipeline if back else read_gadjax_folder(out)
            other = check_pipeline(out) if back else check_pipeline(src, **reading)
            _check(converted, other, dtype, args.dst)
    kind = "a diffusers folder" if back else "gadjax's own folder"
    read = "" if back else f", from {pipeline.files}"
    print(f"{args.dst}: {kind} of {src}{read}")
    return 0


def _check(converted: PipelineFolder, other: PipelineFolder, dtype, dst: Path) -> None:
    """Compare every network's outputs with diffusers'.

    Raises: RunStopped if a relative difference is above parity.NETWORK_BOUND.
    """
    errors = parity.compare_networks(converted, other, dtype)
    for name, error in errors.items():
        print(f"{name}: largest relative difference from diffusers {error:.1e}")
    name = max(errors, key=errors.__getitem__)
    if errors[name] > parity.NETWORK_BOUND:
        raise RunStopped(
            f"{name}: found a relative difference of {errors[name]:.1e} from diffusers; expected "
            f"at most {parity.NETWORK_BOUND:g}; {dst} was not written"
        )
