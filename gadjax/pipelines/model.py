"""A pipeline with its parameters, and how it is sampled."""

from dataclasses import dataclass

from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.pipeline import Pipeline
from gadjax.types import Params


@dataclass(frozen=True)
class Model:
    """A pipeline and how it is sampled. name: for messages."""

    name: str
    pipeline: Pipeline
    params: dict[str, Params]
    sampling: SamplingConfig

    @property
    def evaluations(self) -> int:
        """Of the network, for one picture."""
        steps = self.sampling.steps
        if self.sampling.timesteps is None:
            steps += self.pipeline.sampler.extra_evaluations if steps > 1 else 0
        return steps * (2 if self.guided else 1)

    @property
    def guided(self) -> bool:
        """Whether pictures are drawn with classifier-free guidance."""
        denoiser = self.pipeline.denoiser
        return (
            not denoiser.guidance_embedded and denoiser.guidance_scale(self.sampling.guidance) != 1
        )
