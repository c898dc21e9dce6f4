"""Distil a student (or train a teacher) until the config's steps; run again to resume."""

import argparse
from pathlib import Path

from gadjax.training.config import read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, required=True)
    parser.epilog = "--config FILE[:variant] and --config.a.b=value choose and change the config"


def run(args: argparse.Namespace, rest: list[str]) -> int:
    config = read_config(rest)  # before anything heavy is imported
    from gadjax.training.loop import train

    train(config, args.workdir)
    return 0
