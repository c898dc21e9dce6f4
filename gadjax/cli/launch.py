"""Start and supervise a run's processes on this machine: report which one died, which one hangs."""

import argparse
import sys
import tempfile
from pathlib import Path

from gadjax.errors import InputError
from gadjax.io.storage import as_path, is_remote
from gadjax.runtime.supervisor import Limits, supervise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] -- train ARGS..."
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number on this machine; 1 joins the cluster of its environment",
    )
    parser.add_argument(
        "--hang",
        type=float,
        default=Limits.hang,
        metavar="SECONDS",
        help="time without a step before the run is ended, an hour more for the first step; longer "
        "than the slowest step with its checkpoint and preview; 0: never (default: %(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=Limits.grace,
        metavar="SECONDS",
        help="time for the others to end after one has failed (default: %(default)s)",
    )
    parser.add_argument(
        "--logs", type=Path, help="folder of logs; default for several processes: WORKDIR.logs"
    )


def run(args: argparse.Namespace, rest: list[str]) -> int:
    if args.processes < 1:
        raise InputError(f"--processes: found {args.processes}; expected 1 or more")
    for name in ("hang", "grace"):
        seconds = getattr(args, name)
        if not seconds >= 0:
            raise InputError(f"--{name}: found {seconds:g}; expected 0 or more seconds")
    if rest[:2] != ["--", "train"]:
        command = " ".join(rest[:2]) or "nothing"
        raise InputError(f"gadjax launch: found {command!r}; expected -- train ARGS...")
    train = rest[1:]
    workdir = _workdir(train)
    logs = args.logs
    if args.processes > 1 and logs is None:
        if workdir and not is_remote(workdir):  # next to it, as a new workdir has to be empty
            logs = workdir.with_name(f"{workdir.name}.logs")
        else:
            logs = Path(tempfile.mkdtemp(prefix="gadjax-logs-"))
    if logs:
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{logs}: found {error.strerror}; expected a folder for logs"
            ) from None
        print(f"gadjax launch: logs in {logs}", file=sys.stderr)
    commands = [[sys.executable, "-m", "gadjax", *train]] * args.processes
    return supervise(commands, Limits(args.hang, args.grace), logs, workdir)


def _workdir(arguments: list[str]) -> Path | None:
    """Return the --workdir in the arguments of train."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--workdir", nargs="?")
    workdir = parser.parse_known_args(arguments)[0].workdir
    return as_path(workdir) if workdir else None
