"""Noise sensitivity: tangents J v of the map from noise to x0, of student and teacher."""

from collections.abc import Callable, Sequence

import numpy as np

from gadjax.diffusion.geometry import tangent
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import Noises, clean_latent, map_prompts


def map_tangents(
    model: Model,
    prompts: Sequence[str],
    noise_NHWC: Noises,
    directions_NHWC: Noises,
    *,
    batch: int,
    progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Tangents J v [N, H, W, C] of the map from noise to x0, guidance and all steps included.

    Exact (jax.jvp). Costs two to three times as much as sampling N pictures.

    Args:
      model: pipeline, parameters and sampling settings.
      prompts: N prompts.
      noise_NHWC: initial noises.
      directions_NHWC: tangent directions v.
      batch: noises at a time.
      progress: called with the number of noises that are done.
    """

    pipeline = model.pipeline

    def push(params, z, v, cond, null):
        def x0(z):
            return clean_latent(pipeline, params[pipeline.backbone], model.sampling, z, cond, null)

        return tangent(x0, z, v)[1]

    arrays = (noise_NHWC, directions_NHWC)
    return map_prompts(push, model, prompts, arrays, batch=batch, progress=progress)


def compare_tangents(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and norm ratio (student over teacher) of N pairs of tangents [N, ...]: [N] each."""
    student, teacher = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (student, teacher))
    sizes = np.linalg.norm(student, axis=1), np.linalg.norm(teacher, axis=1)
    tiny = np.finfo(np.float64).tiny
    cosine = np.sum(student * teacher, axis=1) / np.maximum(sizes[0] * sizes[1], tiny)
    return cosine, sizes[0] / np.maximum(sizes[1], tiny)
