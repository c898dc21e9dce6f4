"""Print the numbers of several reports of gadjax evaluate side by side."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports", metavar="REPORT", nargs="+", type=Path, help="report.json, or the folder of one"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also written there, as Markdown")


def run(args: argparse.Namespace) -> int:
    from gadjax.cli.output import stop_on_write_error
    from gadjax.evaluation.compare import comparison, read_reports
    from gadjax.io.storage import write_atomic

    text = comparison(read_reports(args.reports))
    if args.out is not None:
        with stop_on_write_error(args.out):
            write_atomic(args.out, text)
    print(text, end="")
    return 0
