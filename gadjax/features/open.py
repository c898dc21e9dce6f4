"""Feature extractors of any kind, by what is at a path."""

from pathlib import Path

from gadjax.features.inception import is_inception, load_inception
from gadjax.features.network import FolderExtractor, load_extractor
from gadjax.features.shapes import is_shapes, load_shapes


def open_extractor(
    name: str, path: Path, vector: str | None = None, recipe: str | None = None
) -> FolderExtractor:
    """Load a feature extractor: a folder of transformers', Inception's file, or the bundled one.

    Args:
      name: for reports and messages.
      path: folder, or a safetensors file with FID's Inception.
      vector: which of its vectors; None for the usual one.
      recipe: named preprocessing in place of the usual one.

    Raises: InputError for files that are missing, malformed or unsupported.
    """
    if is_inception(path):
        load = load_inception
    else:
        load = load_shapes if is_shapes(path) else load_extractor
    return load(name, path, vector, recipe)
