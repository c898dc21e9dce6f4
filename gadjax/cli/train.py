"""Distil a student (or train a teacher) for the config's steps; run again to resume."""

import argparse
import sys

from gadjax.errors import InputError
from gadjax.io.storage import as_path, check_access
from gadjax.training.config import CONFIG_HELP, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder, or gs://BUCKET/...")
    parser.add_argument(
        "--devices", type=int, help="expected number of devices of all processes in total"
    )
    parser.add_argument(
        "--profile", metavar="START:N", help="trace N steps after START into WORKDIR/profile"
    )
    parser.add_argument(
        "--reproduce-step",
        metavar="N",
        help="repeat step N of WORKDIR's run with instrumented updates; writes nothing there",
    )
    parser.epilog = CONFIG_HELP


def run(args: argparse.Namespace, rest: list[str]) -> int:
    config = read_config(rest)  # before anything heavy is imported
    workdir = as_path(args.workdir)
    replays = args.reproduce_step is not None
    if replays and args.profile is not None:
        raise InputError("--profile: found it beside --reproduce-step; expected one of the two")
    check_access(workdir, write=not replays)
    import jax

    from gadjax.cli.doctor import unused_accelerators
    from gadjax.runtime.distributed import initialize_distributed
    from gadjax.runtime.profiler import parse_profile
    from gadjax.training.loop import train
    from gadjax.training.replay import parse_step, replay_step

    if replays:
        step = parse_step(args.reproduce_step)
        initialize_distributed()
        replay_step(config, workdir, step, args.devices)
        return 0
    profile = parse_profile(args.profile, config.steps) if args.profile is not None else None
    initialize_distributed()
    for line in unused_accelerators(jax.default_backend()):
        print(f"gadjax train: {line}", file=sys.stderr)
    train(config, workdir, args.devices, profile)
    return 0
