"""Show the status of a run: step, time left, speed, goodput, last checkpoint."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", help="folder, or gs://BUCKET/...")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the block")


def run(args: argparse.Namespace) -> int:
    from gadjax.runtime.status import read_status, table  # without JAX, so that it starts at once

    status = read_status(args.workdir)
    print(json.dumps(status) if args.json else table(status))
    return 0
