"""Escape untrusted text (captions, names, values of configs) in Markdown, where a pipe would end a
table cell and `<script>` would be markup."""

import re
from typing import Any

from gadjax.errors import escape_nonprintable

# Characters that Markdown may take for markup anywhere; an underscore inside a word is none. GitHub
# renders dollars as mathematics and tildes as strikethrough. &lt; and the like are entities.
_MARKUP = re.compile(r"[\\`*\[\]|#~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w)")
_BLOCK = re.compile(r"^([-+=]|\d+(?=[.)]))")  # begins a list or underlines a heading


def escape_markdown(value: Any) -> str:
    """Escape a value's text, on one line, so that Markdown renders it literally: in a paragraph, a
    heading, a list item or a table cell, but not in code, where nothing can be escaped."""
    text = escape_nonprintable(" ".join(str(value).split()))
    text = _MARKUP.sub(lambda match: "&amp;" if match[0] == "&" else "\\" + match[0], text)
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return _BLOCK.sub(lambda m: m[0] + "\\" if m[0].isdecimal() else "\\" + m[0], text)
