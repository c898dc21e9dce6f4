"""Command line `gadjax COMMAND ...`: one module per command, imported on use."""

import argparse
import errno
import importlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from gadjax.errors import InputError, RunStopped
from gadjax.parallel import libtpu

COMMANDS = {
    "train": "distil a student, or train a teacher",
    "plan": "memory, FLOPs and traffic of a run per chip, without the hardware",
    "launch": "start and supervise a run's processes",
    "status": "status of a run",
    "sample": "sample images from a pipeline folder or a workdir",
    "evaluate": "compare students with their teacher",
    "compare": "the numbers of several reports side by side",
    "repair": "a LoRA that brings back what a distilled student lost",
    "convert": "diffusers pipeline folder -> gadjax's own folder, and back",
    "export": "a workdir's student as a diffusers pipeline folder",
    "lora": "contents of LoRA files; a LoRA out of two models; a model with LoRAs merged",
    "embed": "prompt embeddings, and latents of images, ahead of training",
    "doctor": "versions, devices, missing packages",
}
# Commands that get unknown flags: --config.a.b=v for the config's parser, or the flags of train.
FORWARDS_ARGUMENTS = ("train", "plan", "launch", "repair")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{self.prog}: {message}")


class _Version(argparse.Action):
    """Flag that prints the version, looked up only then, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib import metadata

        try:
            version = metadata.version("gadjax")
        except metadata.PackageNotFoundError:  # a clone on PYTHONPATH
            version = "(not installed: no version)"
        print(f"gadjax {version}")
        parser.exit()


def _set_compilation_cache() -> None:
    """Set JAX's compilation cache to a folder in the user's cache, for the next start.

    JAX_COMPILATION_CACHE_DIR chooses another folder, or none if it is empty. Does nothing in a
    program that has imported JAX already, and for a user without a writable cache folder.
    """
    folders = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    cache = next(filter(os.path.isabs, folders), "")  # without a home the ~ stays
    if "jax" not in sys.modules and _is_writable(cache):
        folder = os.path.join(cache, "gadjax", "compiled")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
        # JAX's default, one second, leaves out small programs that together take as long.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _is_writable(folder: str) -> bool:
    """Return True if the folder can be written to, or created."""
    while folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for invalid input (one line on stderr), 3 for a stopped run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _set_compilation_cache()
    libtpu.disable_without_tpu()
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters outside its encoding are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _Parser(prog="gadjax", description=__doc__)
    parser.add_argument("--version", action=_Version, help="print the installed version")
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        names.add_parser(name, help=text, add_help=False)
    try:
        command = parser.parse_args(arguments[:1]).command
        module = importlib.import_module(f"gadjax.cli.{command}")
        subparser = _Parser(prog=f"gadjax {command}", description=module.__doc__)
        module.add_arguments(subparser)
        given = arguments[1:]
        cut = given.index("--") if command == "launch" and "--" in given else len(given)
        args, rest = subparser.parse_known_args(given[:cut])
        rest += given[cut:]
        if rest and command not in FORWARDS_ARGUMENTS:
            raise InputError(f"gadjax {command}: found {rest[0]!r}; expected only known flags")
        args.command_line = shlex.join(["gadjax", *arguments])  # for reports
        code = module.run(args, rest) if command in FORWARDS_ARGUMENTS else module.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output has exited, as head does
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
        if error.errno != errno.ENAMETOOLONG:  # any call may raise it for a long path
            raise
        invalid = InputError(f"{error.filename}: found {error.strerror}; expected a shorter name")
        print(f"gadjax: {invalid}", file=sys.stderr)
        return 2
