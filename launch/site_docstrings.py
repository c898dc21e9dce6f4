"""Griffe extension: docstrings of gadjax as Markdown of the API pages.

`Returns: text` and `Raises: text` become the sections that Google's style has, and lines
`name: text` about the fields of a class become a list.
"""

import re

import griffe

SECTION = re.compile(r"^(Returns|Raises|Yields): +(.+(?:\n +.+)*)", re.MULTILINE)
FIELD = re.compile(r"^([a-z_0-9]\w*(?:, \w+)*|[A-Z][a-z]+): +(?=\S)", re.MULTILINE)
MARKUP = re.compile(r"<(?=[A-Za-z/!])|\*")  # HTML and emphasis, of which docstrings have none
ENTITIES = {"<": "&lt;", "*": "&#42;"}


def with_sections(text: str) -> str:
    """One-line sections as sections with an indented body."""

    def section(match: re.Match) -> str:
        name, body = match.groups()
        body = re.sub(r"\n +", " ", body)
        if name == "Raises":
            error, _, reason = body.partition(" ")
            error, colon, rest = (error.rstrip(".,;"), ":", reason.strip())
            body = f"{error}{colon} {rest or 'see above.'}"
        return f"\n{name}:\n    {body}\n"

    return SECTION.sub(section, text)


def with_list(text: str, fields: set[str]) -> str:
    """Lines `name: text` about `fields` as items of a list, `Cost: text` as a paragraph."""

    def item(match: re.Match) -> str:
        names = match.group(1).split(", ")
        if set(names) <= fields:
            return f"\n- {', '.join(f'`{name}`' for name in names)}: "
        return f"\n{match.group()}" if names[0][0].isupper() else match.group()

    return FIELD.sub(item, text)


def escaped(text: str) -> str:
    """Text whose `<` and `*` are no markup, outside code in backticks and indented blocks."""
    parts = re.split(r"(`[^`]*`|(?:\A|\n\n)(?: {4}.*(?:\n|\Z))+)", text)
    return "".join(
        MARKUP.sub(lambda match: ENTITIES[match.group()], part) if i % 2 == 0 else part
        for i, part in enumerate(parts)
    )


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of every object when it is complete."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.is_alias or obj.docstring is None:
            return
        text = obj.docstring.value
        if obj.is_class:
            text = with_list(text, {name for name, m in obj.members.items() if m.is_attribute})
        obj.docstring.value = escaped(with_sections(text)).strip()
