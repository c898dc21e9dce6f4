"""Whether a change of the noise changes the student's picture as it changes the teacher's."""

from collections.abc import Callable, Sequence

import numpy as np

from gadjax.diffusion.geometry import tangent
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.pipeline import Pipeline
from gadjax.pipelines.sampling import clean_latent, map_prompts
from gadjax.types import Params


def map_tangents(
    pipeline: Pipeline,
    params: dict[str, Params],
    sampling: SamplingConfig,
    prompts: Sequence[str],
    noise_NHWC: np.ndarray,
    directions_NHWC: np.ndarray,
    *,
    batch: int,
    progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """J v [N, H, W, C] of the whole map from noise to x0, guidance and all its steps included.

    Exact (jax.jvp). Costs two to three times what drawing N pictures does.
    """

    def moved(params, z, v, cond, null):
        def x0(z):
            return clean_latent(pipeline, params[pipeline.backbone], sampling, z, cond, null)

        return tangent(x0, z, v)[1]

    arrays = (noise_NHWC, directions_NHWC)
    return map_prompts(
        moved, pipeline, params, sampling, prompts, arrays, batch=batch, progress=progress
    )


def compare_tangents(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine, and norm of the first over norm of the second, of N pairs [N, ...]: [N] each."""
    found, wanted = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (found, wanted))
    sizes = np.linalg.norm(found, axis=1), np.linalg.norm(wanted, axis=1)
    tiny = np.finfo(np.float64).tiny
    cosine = np.sum(found * wanted, axis=1) / np.maximum(sizes[0] * sizes[1], tiny)
    return cosine, sizes[0] / np.maximum(sizes[1], tiny)
