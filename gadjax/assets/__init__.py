"""What the package brings along: the bundled teacher, its prompts, its evaluation network."""

from pathlib import Path

PREFIX = "asset:"


def resolve(name: str) -> Path:
    """A path as the user gave it; 'asset:NAME' is a file or folder of this package."""
    if name.startswith(PREFIX):
        return Path(__file__).parent / name.removeprefix(PREFIX)
    return Path(name).expanduser()
