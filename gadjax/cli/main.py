"""`gadjax COMMAND ...`: one module per command, imported when it is asked for."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from gadjax.errors import InputError, RunStopped

COMMANDS = {
    "train": "distil a student, or train a teacher",
    "sample": "draw pictures with a pipeline folder or a workdir",
    "evaluate": "compare a student with its teacher",
    "convert": "diffusers pipeline folder -> gadjax's own folder, and back",
    "export": "a workdir's student as a diffusers pipeline folder",
    "embed": "text embeddings, and latents of pictures, ahead of time",
    "doctor": "versions, devices, what is missing",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{self.prog}: {message}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 2 for bad input (one line on stderr), or 3 where the run stopped itself."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _Parser(prog="gadjax", description=__doc__)
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        names.add_parser(name, help=text, add_help=False)
    try:
        command = parser.parse_args(arguments[:1]).command
        module = importlib.import_module(f"gadjax.cli.{command}")
        own = _Parser(prog=f"gadjax {command}", description=module.__doc__)
        module.add_arguments(own)
        # train's --config.a.b=v are for the config's own parser.
        args, rest = own.parse_known_args(arguments[1:])
        if rest and command != "train":
            raise InputError(f"gadjax {command}: found {rest[0]!r}; expected only known flags")
        return module.run(args, rest) if command == "train" else module.run(args)
    except InputError as error:
        print(f"gadjax: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"gadjax: stopped: {error}", file=sys.stderr)
        return 3
