"""Prompts that a run uses, and their second versions, which teachers read in their place."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gadjax.errors import InputError, short_repr

OPTIONS = "match", "forget", "styles"


def check_versions(data: Mapping[str, Any]) -> None:
    """Check the options of `data` that choose or rewrite prompts.

    Raises: InputError for such options without data.prompts, two versions at once, a replacement
      of nothing, styles that are no texts or the same twice, and a broken regex.
    """
    given = [name for name in OPTIONS if data[name]]
    if given and not data["prompts"]:
        raise InputError(f"data.{given[0]}: found it without data.prompts; expected the two")
    if data["forget"] and data["styles"]:
        raise InputError("data.styles: found it beside data.forget; expected one of the two")
    if data["replacement"] and not data["forget"]:
        raise InputError("data.replacement: found it without data.forget; expected the two")
    styles = tuple(data["styles"])
    if styles and (len(set(styles)) < 2 or len(set(styles)) < len(styles)):
        raise InputError(
            f"data.styles: found {short_repr(styles)}; expected two different texts or more"
        )
    try:
        re.compile(data["match"])
    except re.error as error:
        raise InputError(
            f"data.match: found {short_repr(data['match'])} ({error}); expected a regex"
        ) from None


def matching(prompts: Sequence[str], pattern: str) -> list[str]:
    """Prompts in which a regex matches somewhere. Raises: InputError if there are none."""
    kept = [prompt for prompt in prompts if re.search(pattern, prompt)]
    if not kept:
        raise InputError(
            f"data.match: found {short_repr(pattern)}, which matches none of {len(prompts)} "
            "prompts; expected a regex of some"
        )
    return kept


def versions(
    prompts: Sequence[str], data: Mapping[str, Any], tokenize: Callable
) -> tuple[list[str], dict[str, np.ndarray] | None]:
    """Prompts of a run, and the arrays of their second versions.

    Args:
      prompts: as they are in the file.
      data: options; with `forget` the second version has `replacement` in the place of those words
        and the label 1 where it differs; with `styles` each prompt is there with each ending, its
        second version has none, and the label is the number of the ending.
      tokenize: prompts -> ids [N, L], mask [N, L].

    Returns: the prompts, and override_ids, override_mask [N, L] and label [N], or None.
    Raises: InputError if no prompt has the words to forget.
    """
    forget, styles = data["forget"], tuple(data["styles"])
    if forget:
        others = [prompt.replace(forget, data["replacement"]) for prompt in prompts]
        labels = [a != b for a, b in zip(prompts, others, strict=True)]
        if not any(labels):
            raise InputError(
                f"data.forget: found {short_repr(forget)} in none of {len(prompts)} prompts; "
                "expected words of some"
            )
    elif styles:
        others = list(prompts) * len(styles)
        labels = np.repeat(np.arange(len(styles)), len(prompts))
        prompts = [prompt + style for style in styles for prompt in prompts]
    else:
        return list(prompts), None
    ids, mask = tokenize(others)
    return list(prompts), {
        "override_ids": ids,
        "override_mask": mask,
        "label": np.asarray(labels, np.int32),
    }
