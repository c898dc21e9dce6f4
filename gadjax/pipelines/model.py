"""A pipeline with its parameters and sampling settings."""

from dataclasses import dataclass

from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.pipeline import Pipeline
from gadjax.types import Params


@dataclass(frozen=True)
class Model:
    """A pipeline with its parameters and sampling settings. name: for messages."""

    name: str
    pipeline: Pipeline
    params: dict[str, Params]
    sampling: SamplingConfig

    @property
    def evaluations(self) -> int:
        """Network evaluations per image; two per step with classifier-free guidance."""
        steps = self.sampling.steps
        if self.sampling.timesteps is None:
            steps += self.pipeline.sampler.extra_evaluations if steps > 1 else 0
        return steps * (2 if self.guided else 1)

    @property
    def guided(self) -> bool:
        """True if images are sampled with classifier-free guidance."""
        return self.pipeline.guided(self.sampling.guidance)
