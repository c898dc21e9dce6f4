"""`gadjax COMMAND ...`: one module per command, imported when it is asked for."""

import argparse
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from gadjax.errors import InputError, RunStopped
from gadjax.parallel import libtpu

COMMANDS = {
    "train": "distil a student, or train a teacher",
    "plan": "what a run needs of which hardware, before there is any",
    "launch": "start a run's processes and watch over them",
    "status": "where a run stands",
    "sample": "draw pictures with a pipeline folder or a workdir",
    "evaluate": "compare a student with its teacher",
    "convert": "diffusers pipeline folder -> gadjax's own folder, and back",
    "export": "a workdir's student as a diffusers pipeline folder",
    "embed": "text embeddings, and latents of pictures, ahead of time",
    "doctor": "versions, devices, what is missing",
}
# Those whose --config.a.b=v are for the config's own parser, and the one that hands on the rest.
CONFIGURED = ("train", "plan", "launch")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{self.prog}: {message}")


def _keep_compiled() -> None:
    """Compiled programs are kept for the next start, in a folder of the user's; JAX's own variable
    says another one, or none where it is empty. Does nothing in a program that has JAX already, and
    for a user without a folder to write to."""
    places = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    place = next(filter(os.path.isabs, places), "")  # of no home there is a ~ left
    if "jax" not in sys.modules and _can_be_made(place):
        folder = os.path.join(place, "gadjax", "compiled")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)


def _can_be_made(folder: str) -> bool:
    """Whether a folder may be written to, or made."""
    while folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 2 for bad input (one line on stderr), or 3 where the run stopped itself."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _keep_compiled()
    libtpu.disable_without_tpu()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _Parser(prog="gadjax", description=__doc__)
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        names.add_parser(name, help=text, add_help=False)
    try:
        command = parser.parse_args(arguments[:1]).command
        module = importlib.import_module(f"gadjax.cli.{command}")
        own = _Parser(prog=f"gadjax {command}", description=module.__doc__)
        module.add_arguments(own)
        given = arguments[1:]
        cut = given.index("--") if command == "launch" and "--" in given else len(given)
        args, rest = own.parse_known_args(given[:cut])
        rest += given[cut:]
        if rest and command not in CONFIGURED:
            raise InputError(f"gadjax {command}: found {rest[0]!r}; expected only known flags")
        code = module.run(args, rest) if command in CONFIGURED else module.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has left, as head does
        with suppress(OSError, ValueError, AttributeError):  # Python would flush it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except InputError as error:
        print(f"gadjax: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"gadjax: stopped: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # which every call on such a path says
            raise
        said = InputError(f"{error.filename}: found {error.strerror}; expected a shorter name")
        print(f"gadjax: {said}", file=sys.stderr)
        return 2
