"""Where a run stands: step, time left, speed, where the time goes, the last checkpoint."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", help="folder, or gs://BUCKET/...")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the block")


def run(args: argparse.Namespace) -> int:
    from gadjax.runtime.status import read_status, table  # without JAX: it answers at once

    found = read_status(args.workdir)
    print(json.dumps(found) if args.json else table(found))
    return 0
