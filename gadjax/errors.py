"""User-facing errors: invalid input (exit code 2), a run that stopped (exit code 3).

Untrusted text in them (captions, names, values of configs) is escaped: in a terminal an escape
sequence would move the cursor or colour the rest.
"""

from collections.abc import Collection
from reprlib import Repr
from typing import Any

MAX_CHARS = 2000

_REPR = Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 10, 10, 10


def escape_nonprintable(text: str) -> str:
    """Escape nonprintable characters as `repr` does (\\n, \\x1b, \\u202e), which gives one line;
    printable ones stay as they are."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short_repr(value: Any, max_chars: int = 80) -> str:
    """Truncated `repr`: one line of at most `max_chars` characters, nested values abbreviated."""
    _REPR.maxstring = _REPR.maxother = max_chars
    text = escape_nonprintable(_REPR.repr(value))
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


class _OneLine(Exception):
    def __str__(self) -> str:
        """One-line message, whatever untrusted text it quotes (names in a file, a path, another
        library's reason); the middle of a very long one is left out."""
        text = super().__str__()
        if len(text) > MAX_CHARS:
            text = f"{text[: MAX_CHARS // 2]} ... {text[-MAX_CHARS // 4 :]}"
        text = escape_nonprintable(text)
        return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 4] + " ..."


class InputError(_OneLine, ValueError):
    """Invalid user input: one line (file, key or flag; found; expected), exit code 2."""


class RunStopped(_OneLine, RuntimeError):
    """Run that stopped itself (non-finite values, storage): exit code 3."""


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that an option's value is one of the choices. Raises: InputError naming all of them."""
    if value not in choices:
        raise InputError(f"{name}: found {value!r}; expected one of {', '.join(choices)}")
