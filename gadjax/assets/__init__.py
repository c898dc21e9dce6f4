"""Bundled assets: teachers, prompts and the feature network of evaluations."""

from pathlib import Path

PREFIX = "asset:"


def resolve(name: str) -> Path:
    """Resolve a path as the user gave it; 'asset:NAME' is a file or folder of this package."""
    if name.startswith(PREFIX):
        return Path(__file__).parent / name.removeprefix(PREFIX)
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user: a literal ~name, which will not be found when it is opened
        return Path(name)
