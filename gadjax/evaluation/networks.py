"""Networks, protocol and imported numbers of an evaluation, read before anything is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gadjax.errors import check_choice
from gadjax.evaluation.external import read_external, with_external
from gadjax.evaluation.learned_metrics import describe_learned
from gadjax.evaluation.oracles import World
from gadjax.evaluation.protocols import PROTOCOLS
from gadjax.evaluation.results import Evaluation, EvaluationConfig
from gadjax.features.flags import load_named, write_caches
from gadjax.features.network import FolderExtractor
from gadjax.features.scorers import Scorer


@dataclass(frozen=True)
class Networks:
    """Networks, protocol and imported numbers of an evaluation, beside its world.

    features, scores: extractors and scorers by name.
    imported: numbers of outside scripts (`read_external`).
    protocol: a key of PROTOCOLS, or None.
    """

    features: Mapping[str, FolderExtractor] = field(default_factory=dict)
    scores: Mapping[str, Scorer] = field(default_factory=dict)
    imported: Sequence[dict[str, Any]] = ()
    protocol: str | None = None

    def configure(self, config: EvaluationConfig, world: World) -> tuple[EvaluationConfig, World]:
        """Configuration of the protocol, if there is one, and the world with the networks."""
        if self.protocol is not None:
            config = PROTOCOLS[self.protocol].apply(config)
        if self.features or self.scores:
            world = replace(world, features=self.features, scores=self.scores)
        return config, world

    def finish(self, evaluation: Evaluation) -> Evaluation:
        """Write the caches. Returns: the evaluation with the imported numbers. Raises: OSError."""
        write_caches(self.features, self.scores)
        return with_external(evaluation, self.imported)

    def describe(self) -> dict[str, str]:
        """Lines for the report's settings, once all pictures are scored."""
        lines = describe_learned(World(features=self.features, scores=self.scores))
        if self.protocol is None:
            return lines
        protocol = PROTOCOLS[self.protocol]
        about = {"protocol": f"{self.protocol}: {protocol.source}"}
        if missing := protocol.missing(self.features, self.scores):
            about["protocol, not measured"] = "; ".join(missing)
        return about | lines


def read_networks(
    features: Sequence[str],
    scores: Sequence[str],
    cache: Path | None,
    protocol: str | None,
    imported: Path | None,
    prompts: int,
) -> Networks:
    """Read the files that the flags of an evaluation name.

    Args:
      features, scores: values of --features and --scores.
      cache: folder of cached features, or None.
      protocol: name of a protocol, or None.
      imported: file of numbers of outside scripts, or None.
      prompts: number of prompts.
    Raises: InputError for a flag, or for files that are missing or unsupported.
    """
    results = read_external(imported, prompts) if imported else []
    extractors, scorers = load_named(features, scores, cache)
    if protocol is not None:
        check_choice("--protocol", protocol, PROTOCOLS)
        PROTOCOLS[protocol].missing(extractors, scorers)
    return Networks(extractors, scorers, results, protocol)
