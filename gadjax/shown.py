"""Text that others wrote (captions, names, values of configs) where it is shown.

In a terminal an escape sequence would move the cursor or colour the rest; in Markdown a pipe would
end a cell and `<script>` be one.
"""

import re
from reprlib import Repr
from typing import Any

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 10, 10, 10

# What Markdown may take for markup, wherever it stands; an underscore inside a word is none. GitHub
# reads dollars as mathematics and tildes as strokes. A reference such as &lt; would become a sign.
_MARKUP = re.compile(r"[\\`*\[\]|#~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w)")
_BLOCK = re.compile(r"^([-+=]|\d+(?=[.)]))")  # begins a list or underlines a heading


def printable(text: str) -> str:
    """One line: characters that do not print are spelt out as `repr` spells them (\\n, \\x1b,
    \\u202e); those that print stay as they are."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: Any, most: int = 80) -> str:
    """`repr` in one line of at most `most` characters, of nested values the outside only."""
    _SHORT.maxstring = _SHORT.maxother = most
    text = printable(_SHORT.repr(value))
    return text if len(text) <= most else text[: most - 3] + "..."


def in_markdown(value: Any) -> str:
    """A value's text on one line, which Markdown shows as it is: in a paragraph, a heading, an item
    of a list or a cell of a table, but not in code, where nothing can be escaped."""
    text = printable(" ".join(str(value).split()))
    text = _MARKUP.sub(lambda found: "&amp;" if found[0] == "&" else "\\" + found[0], text)
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return _BLOCK.sub(lambda f: f[0] + "\\" if f[0].isdecimal() else "\\" + f[0], text)
