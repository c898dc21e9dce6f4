"""What the package brings along: the bundled teacher, its prompts, its evaluation network."""

from pathlib import Path

PREFIX = "asset:"


def resolve(name: str) -> Path:
    """A path as the user gave it; 'asset:NAME' is a file or folder of this package."""
    if name.startswith(PREFIX):
        return Path(__file__).parent / name.removeprefix(PREFIX)
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of nobody: a folder of that name, which whoever opens it will miss
        return Path(name)
