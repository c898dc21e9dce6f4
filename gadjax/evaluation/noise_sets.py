"""Prompts and noises of an evaluation's sets of pictures. P prompts, S seeds."""

from collections.abc import Sequence

from gadjax.evaluation.metric_catalogue import NEAR, NEAR_SHARE
from gadjax.evaluation.noises import SeedNoises, Sets
from gadjax.evaluation.results import EvaluationConfig
from gadjax.evaluation.strips import strip_prompts, strip_set
from gadjax.pipelines.sampling import Noises


def evaluation_sets(
    prompts: Sequence[str], latent: tuple[int, int, int], config: EvaluationConfig
) -> Sets:
    """Prompts and noises to draw, seed by seed, by name.

    "own": every prompt at the evaluated seeds. "others": every prompt at as many later seeds.
    "near": the first prompts at perturbed seeds, z -> sqrt(1 - r^2) z + r n. "strips": some prompts
    along ways between and from their noises.

    Args:
      prompts: P prompts.
      latent: shape (H, W, C) of a noise.
      config: numbers of seeds and tangents.
    """
    first, count = list(prompts[:NEAR]), len(prompts)

    def noises(start: int, count: int) -> SeedNoises:
        return SeedNoises(start, config.seeds, count, latent, config.shared_noise)

    # New noise of seeds that are neither drawn from nor directions of tangents.
    new = noises(2 * config.seeds + config.tangents, len(first)).all()
    near = (1 - NEAR_SHARE**2) ** 0.5 * noises(0, len(first)).all() + NEAR_SHARE * new
    prompts_by_seed = [*prompts] * config.seeds
    sets: dict[str, tuple[Sequence[str], Noises]] = {
        "own": (prompts_by_seed, noises(0, count)),
        "others": (prompts_by_seed, noises(config.seeds, count)),
        "near": (first * config.seeds, near),
    }
    if config.strips:
        shown = strip_prompts(count, config.strips)
        sets["strips"] = strip_set(prompts, shown, latent, 2 * config.seeds)
    return sets
