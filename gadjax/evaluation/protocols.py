"""Protocols of published tables, by name: seeds, noises, and the networks that they need.

Prompts are the user's: those of the papers are read from their files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gadjax.errors import InputError
from gadjax.evaluation.results import EvaluationConfig
from gadjax.features.network import FolderExtractor
from gadjax.features.scorers import Scorer


@dataclass(frozen=True)
class Protocol:
    """Settings of a published table.

    Attributes:
      source: the paper, and what of it is not repeated here.
      seeds: pictures of a prompt.
      tangents: noise directions of a prompt.
      shared_noise: whether all prompts start from the same noises.
      features: "kind vector" of each extractor -> what the table calls it.
      scores: kinds of its scores.
    """

    source: str
    seeds: int
    tangents: int
    shared_noise: bool
    features: Mapping[str, str]
    scores: tuple[str, ...]

    def apply(self, config: EvaluationConfig) -> EvaluationConfig:
        """Configuration with the protocol's seeds, noises and directions, without noise control."""
        return replace(
            config,
            seeds=self.seeds,
            tangents=self.tangents,
            library=0,
            moves=0,
            shared_noise=self.shared_noise,
        )

    def missing(
        self, features: Mapping[str, FolderExtractor], scores: Mapping[str, Scorer]
    ) -> list[str]:
        """Parts of the table for which no folder was given.

        Raises: InputError where that is all of them.
        """
        kinds = {f"{extractor.kind} {extractor.vector}" for extractor in features.values()}
        given = {scorer.kind for scorer in scores.values()}
        absent = [
            f"{title} (--features NAME=FOLDER, {kind})"
            for kind, title in self.features.items()
            if kind not in kinds
        ]
        absent += [f"{kind} (--scores {kind}=FOLDER)" for kind in self.scores if kind not in given]
        if len(absent) == len(self.features) + len(self.scores):
            raise InputError(f"--protocol: found no folder for it; expected {'; '.join(absent)}")
        return absent


PROTOCOLS = {
    "dpdmd": Protocol(
        "DP-DMD, arXiv:2602.03139: 1 - cosine of 9 pictures a prompt; raw features, float32. Its "
        "prompts are Pick-a-Pic's test set and COCO; MANIQA and VisualQuality-R1 are outside",
        9,
        0,
        False,
        {"dinov3 pooled": "DINOv3 diversity", "clip raw": "CLIP diversity, raw class token"},
        ("pickscore",),
    ),
    "gad": Protocol(
        "GAD: prompt agreement, diversity, and a seed's identity by a classifier, whose form, "
        "seeds and prompts are not published (32 noises here); LPIPS is not measured",
        32,
        1,
        True,
        {"clip projected": "CLIP features"},
        ("clipscore", "pickscore"),
    ),
}
