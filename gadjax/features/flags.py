"""Flags of `gadjax evaluate` for extractors and scorers: --features and --scores NAME=FOLDER."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gadjax.assets import resolve
from gadjax.errors import InputError
from gadjax.features.cache import FeatureCache
from gadjax.features.network import FolderExtractor
from gadjax.features.open import open_extractor
from gadjax.features.scorers import Scorer, load_scorer

# Names stand in tables and in keys of report.json; a slash ends them there.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.@-]{0,39}")
OPTION = re.compile(r"(.*),(vector|recipe)=([A-Za-z0-9.-]+)", re.DOTALL)


def parse_named(flag: str, text: str) -> tuple[str, Path, dict[str, str]]:
    """Name, folder and options of NAME=FOLDER[,vector=VECTOR][,recipe=RECIPE].

    Raises: InputError for another form, naming the flag.
    """
    name, separator, folder = text.partition("=")
    options: dict[str, str] = {}
    while match := OPTION.fullmatch(folder):
        folder = match[1]
        options.setdefault(match[2], match[3])
    if not separator or not folder or not NAME.fullmatch(name):
        raise InputError(
            f"{flag}: found {text!r}; expected NAME=FOLDER with a name of letters, digits, ., @ "
            "and -, and ,vector=VECTOR or ,recipe=RECIPE behind the folder"
        )
    return name, resolve(folder), options


def load_named(
    features: Sequence[str], scores: Sequence[str], cache: Path | None = None
) -> tuple[dict[str, FolderExtractor], dict[str, Scorer]]:
    """Extractors and scorers of the flags, by name.

    Args:
      features, scores: values of the flags.
      cache: folder of cached features; None for none.
    Raises: InputError for a flag, or for files that are missing or unsupported.
    """
    if cache is not None and cache.exists() and not cache.is_dir():
        raise InputError(f"--feature-cache: found the file {cache}; expected a folder")
    extractors: dict[str, FolderExtractor] = {}
    scorers: dict[str, Scorer] = {}
    caches: dict[str, FeatureCache] = {}

    def cached(extractor: FolderExtractor) -> FolderExtractor:
        if cache is None:
            return extractor
        key = extractor.fingerprint
        if key not in caches:
            caches[key] = FeatureCache(cache, key, extractor.width)
        return replace(extractor, cache=caches[key])

    for text in features:
        name, folder, options = parse_named("--features", text)
        _check_new("--features", name, extractors)
        extractors[name] = cached(open_extractor(name, folder, **options))
    for text in scores:
        name, folder, options = parse_named("--scores", text)
        _check_new("--scores", name, extractors | scorers)
        if "vector" in options:
            raise InputError(f"--scores {name}: found a vector; expected none, it is the projected")
        scorer = load_scorer(name, folder, **options)
        scorers[name] = replace(scorer, extractor=cached(scorer.extractor))
    return extractors, scorers


def write_caches(extractors: dict[str, FolderExtractor], scorers: dict[str, Scorer]) -> None:
    """Write the caches of all extractors, where they have one. Raises: OSError."""
    for extractor in [*extractors.values(), *(scorer.extractor for scorer in scorers.values())]:
        if extractor.cache is not None:
            extractor.cache.write()


def _check_new(flag: str, name: str, present: dict) -> None:
    if name in present:
        raise InputError(f"{flag}: found the name {name} twice; expected different ones")
