"""Plan a run for hardware that is absent: memory, FLOPs and traffic per chip, by compilation."""

import argparse
import json
import os
import sys

from gadjax.training.config import CONFIG_HELP, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="TPUs such as v5e:4x4, or GPUs such as h100:8 (an estimate without JAX's CUDA plugin)",
    )
    parser.add_argument(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="LoRA of the teacher at which the student starts, and which it trains on: at the "
        "file's rank and modules, where the config has no student.lora.rank",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="share of the chip's bfloat16 peak that the throughput ceiling assumes",
    )
    parser.add_argument("--largest", action="store_true", help="search the largest batch that fits")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.epilog = CONFIG_HELP


def run(args: argparse.Namespace, rest: list[str]) -> int:
    config = read_config(rest)
    # Before JAX starts: this machine's chips may be in use by a run.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Programs compiled for other chips cannot be read back from the cache here.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from gadjax.formats.lora_file import parse_lora_flag
    from gadjax.plan.plan import plan
    from gadjax.plan.plan_table import table

    def log(text: str) -> None:
        print(f"gadjax plan: {text}", file=sys.stderr, flush=True)

    # A weight changes nothing in a plan.
    lora = args.lora and parse_lora_flag(args.lora)[0]
    planned = plan(
        config,
        args.topology,
        lora=lora,
        utilisation=args.utilisation,
        largest=args.largest,
        log=log,
    )
    print(json.dumps(planned) if args.json else table(planned))
    return 0
