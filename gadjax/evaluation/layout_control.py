"""Layout control: following the gradient of a wanted place back through a model to its noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import clean_latent, map_prompts

SNAPSHOT_STEPS = (0, 2, 5, 10)  # of the gradient, after which a picture is looked at
MAX_STEP = 0.2  # a step as a share of the noise's norm
GRADIENT_EVALUATIONS = (
    4  # network evaluations that the gradient of one is counted as: two of them forward
)


def polyak_descent(
    model: Model,
    prompts: Sequence[str],
    noise_NHWC: np.ndarray,
    places_N2: np.ndarray,
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    batch: int,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The noises and pictures [N, R, H, W, C] after each of STEPS steps towards a wanted place.

    z <- |z| u / |u|, u = z - min(d / |g|, LARGEST |z|) g / |g|, with d the distance of the picture
    drawn from z, by the whole walk and the decoder, and g its gradient in z: Polyak's step (1987)
    for a function whose least value is 0, capped; z stays on its sphere, where noise lies.
    Costs STEPS[-1] + 1 gradients. The network's insides are computed again on the way back, so
    that memory holds those of one evaluation at a time.
    """
    denoiser = model.pipeline.denoiser
    pipeline = replace(
        model.pipeline, denoiser=replace(denoiser, apply=jax.checkpoint(denoiser.apply))
    )

    def walk(params, z, places, cond, null):
        def off(z):
            x0 = clean_latent(pipeline, params[pipeline.backbone], model.sampling, z, cond, null)
            image = pipeline.decode(params["vae"], x0)
            found = jax.vmap(distance)(image, places)
            return found.sum(), (found, image)  # every sample's gradient at once

        def step(z, _):
            g, (found, image) = jax.grad(off, has_aux=True)(z)
            both = (x.reshape(len(x), -1) for x in (z, image))
            return polyak_step(z, g, found), jnp.concatenate([*both], axis=1)

        # The last gradient is not used: cheaper than compiling the walk a second time without it.
        _, states = jax.lax.scan(step, z, None, length=SNAPSHOT_STEPS[-1] + 1)
        return states[jnp.array(SNAPSHOT_STEPS)].swapaxes(0, 1)

    states = map_prompts(
        walk,
        pipeline,
        model.params,
        model.sampling,
        prompts,
        (noise_NHWC, places_N2),
        batch=batch,
        progress=progress,
    )
    latent = noise_NHWC.shape[1:]
    z, images = np.split(states, [int(np.prod(latent))], axis=2)
    sides = [side * pipeline.upscale for side in latent[:2]]
    return z.reshape(*z.shape[:2], *latent), images.reshape(*z.shape[:2], *sides, 3)


def polyak_step(z_BHWC: jax.Array, g_BHWC: jax.Array, distance_B: jax.Array) -> jax.Array:
    """One step of `polyak_descent`."""
    tiny = jnp.finfo(z_BHWC.dtype).tiny
    size, slope = _norm(z_BHWC), jnp.maximum(_norm(g_BHWC), tiny)
    reach = jnp.minimum(distance_B[:, None, None, None] / slope, MAX_STEP * size)
    moved = z_BHWC - reach * (g_BHWC / slope)
    return moved * (size / jnp.maximum(_norm(moved), tiny))


def _norm(x_BHWC: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x_BHWC**2, axis=(1, 2, 3), keepdims=True))


def angles_degrees(a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> np.ndarray:
    """Between N pairs of noises, in degrees; independent ones are at about 90."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a_NHWC, b_NHWC))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))
