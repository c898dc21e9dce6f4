"""Text that others wrote (captions, names, values of configs) where it is shown in Markdown, in
which a pipe would end a cell and `<script>` be one."""

import re
from typing import Any

from gadjax.errors import escape_nonprintable

# What Markdown may take for markup, wherever it stands; an underscore inside a word is none. GitHub
# reads dollars as mathematics and tildes as strokes. A reference such as &lt; would become a sign.
_MARKUP = re.compile(r"[\\`*\[\]|#~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w)")
_BLOCK = re.compile(r"^([-+=]|\d+(?=[.)]))")  # begins a list or underlines a heading


def escape_markdown(value: Any) -> str:
    """A value's text on one line, which Markdown shows as it is: in a paragraph, a heading, an item
    of a list or a cell of a table, but not in code, where nothing can be escaped."""
    text = escape_nonprintable(" ".join(str(value).split()))
    text = _MARKUP.sub(lambda found: "&amp;" if found[0] == "&" else "\\" + found[0], text)
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return _BLOCK.sub(lambda f: f[0] + "\\" if f[0].isdecimal() else "\\" + f[0], text)
