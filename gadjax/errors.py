"""The two ways a command ends badly on purpose, each said in one line.

And how text that others wrote (captions, names, values of configs) is shown in it: in a terminal an
escape sequence would move the cursor or colour the rest.
"""

from reprlib import Repr
from typing import Any

MAX_CHARS = 2000  # characters

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 10, 10, 10


def escape_nonprintable(text: str) -> str:
    """One line: characters that do not print are spelt out as `repr` spells them (\\n, \\x1b,
    \\u202e); those that print stay as they are."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short_repr(value: Any, most: int = 80) -> str:
    """`repr` in one line of at most `most` characters, of nested values the outside only."""
    _SHORT.maxstring = _SHORT.maxother = most
    text = escape_nonprintable(_SHORT.repr(value))
    return text if len(text) <= most else text[: most - 3] + "..."


class _Said(Exception):
    def __str__(self) -> str:
        """One line whatever it quotes (names in a file, a path, another library's reason), which
        others wrote; without its middle where it is very long."""
        text = super().__str__()
        if len(text) > MAX_CHARS:
            text = f"{text[: MAX_CHARS // 2]} ... {text[-MAX_CHARS // 4 :]}"
        text = escape_nonprintable(text)
        return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 4] + " ..."


class InputError(_Said, ValueError):
    """What the user gave is wrong: one line (file, key or flag; found; expected), exit code 2."""


class RunStopped(_Said, RuntimeError):
    """The run stopped itself (non-finite values, storage): exit code 3."""
