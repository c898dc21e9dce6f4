"""Routes: prompts that are drawn by another model than the command's own."""

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple

from gadjax.errors import InputError, short_repr


class Route(NamedTuple):
    """Route of the prompts in which a regex matches somewhere, to a model."""

    pattern: re.Pattern[str]
    model: str


def add_route_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="REGEX=MODEL",
        help="draw the prompts that match with another model, as multi-student distillation does; "
        "may be given again: the first that matches decides",
    )


def parse_routes(texts: Sequence[str]) -> list[Route]:
    """Routes from REGEX=MODEL, cut at the last =. Raises: InputError."""
    routes = []
    for text in texts:
        pattern, equals, model = text.rpartition("=")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"--route: found {short_repr(text)} ({error}); expected REGEX=MODEL"
            ) from error
        if not (equals and pattern and model):
            raise InputError(f"--route: found {short_repr(text)}; expected REGEX=MODEL")
        routes.append(Route(compiled, model))
    return routes


def route_prompts(routes: Sequence[Route], prompts: Sequence[str]) -> list[int]:
    """Number of each prompt's route, counted from 1; 0 for a prompt without one."""
    return [
        next((k for k, route in enumerate(routes, 1) if route.pattern.search(prompt)), 0)
        for prompt in prompts
    ]
