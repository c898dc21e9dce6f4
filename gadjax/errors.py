"""The two ways a command ends badly on purpose, each said in one line.

And how text that others wrote (captions, names, values of configs) is shown in it: in a terminal an
escape sequence would move the cursor or colour the rest.
"""

from reprlib import Repr
from typing import Any

LONGEST = 2000  # characters

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 10, 10, 10


def printable(text: str) -> str:
    """One line: characters that do not print are spelt out as `repr` spells them (\\n, \\x1b,
    \\u202e); those that print stay as they are."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: Any, most: int = 80) -> str:
    """`repr` in one line of at most `most` characters, of nested values the outside only."""
    _SHORT.maxstring = _SHORT.maxother = most
    text = printable(_SHORT.repr(value))
    return text if len(text) <= most else text[: most - 3] + "..."


class _Said(Exception):
    def __str__(self) -> str:
        """One line whatever it quotes (names in a file, a path, another library's reason), which
        others wrote; without its middle where it is very long."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
        text = printable(text)
        return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


class InputError(_Said, ValueError):
    """What the user gave is wrong: one line (file, key or flag; found; expected), exit code 2."""


class RunStopped(_Said, RuntimeError):
    """The run stopped itself (non-finite values, storage): exit code 3."""
