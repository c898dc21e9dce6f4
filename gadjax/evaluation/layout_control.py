"""Layout control: optimize a noise, by the gradient through the sampler, to move a shape."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import clean_latent, map_prompts

SNAPSHOT_STEPS = (0, 2, 5, 10)  # gradient steps after which pictures are kept
MAX_STEP = 0.2  # largest step, as a share of the noise's norm
GRADIENT_EVALUATIONS = 4  # cost of the gradient of one evaluation, two of them forward


class PixelTargets(NamedTuple):
    """Targets of N pictures.

    Args:
      places_N2: target places (x, y) in pixels.
      distance: (image_HWC, place_2) -> distance of the picture from its target, 0 at best.
    """

    places_N2: np.ndarray
    distance: Callable[[jax.Array, jax.Array], jax.Array]


def polyak_descent(
    model: Model,
    prompts: Sequence[str],
    noise_NHWC: np.ndarray,
    targets: PixelTargets,
    *,
    batch: int,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Polyak descent on N noises towards target places in the pictures that they generate.

    z <- |z| u / |u|, u = z - min(d / |g|, L |z|) g / |g|, with d the distance of the picture
    generated from z (all steps of the sampler and the decoder) and g its gradient in z: Polyak's
    step (1987) for a function with minimum 0, capped at L = MAX_STEP; z stays on its sphere, where
    noise lies. Costs SNAPSHOT_STEPS[-1] + 1 gradients. The network is rematerialised in reverse, so
    that memory holds the activations of one evaluation at a time.

    Args:
      model: the model whose sampler is differentiated.
      prompts: N prompts.
      noise_NHWC: the noises to start from.
      targets: target places of the N pictures.
      batch: noises at a time.
      progress: called with the number of noises that are done.
    Returns: noises and pictures [N, R, H, W, C] after each of the R numbers in SNAPSHOT_STEPS.
    """
    denoiser = model.pipeline.denoiser
    denoiser = replace(denoiser, apply=jax.checkpoint(denoiser.apply))
    model = replace(model, pipeline=replace(model.pipeline, denoiser=denoiser))
    pipeline = model.pipeline

    def descend(params, z, places, cond, null):
        def distances(z):
            x0 = clean_latent(pipeline, params[pipeline.backbone], model.sampling, z, cond, null)
            image = pipeline.decode(params["vae"], x0)
            distance_B = jax.vmap(targets.distance)(image, places)
            return distance_B.sum(), (distance_B, image)  # every sample's gradient at once

        def step(z, _):
            g, (distance_B, image) = jax.grad(distances, has_aux=True)(z)
            flat = (x.reshape(len(x), -1) for x in (z, image))
            return polyak_step(z, g, distance_B), jnp.concatenate([*flat], axis=1)

        # The last gradient is not used: cheaper than compiling the sampler again without it.
        _, states = jax.lax.scan(step, z, None, length=SNAPSHOT_STEPS[-1] + 1)
        return states[jnp.array(SNAPSHOT_STEPS)].swapaxes(0, 1)

    states = map_prompts(
        descend,
        model,
        prompts,
        (noise_NHWC, targets.places_N2),
        batch=batch,
        progress=progress,
    )
    latent = noise_NHWC.shape[1:]
    z, images = np.split(states, [int(np.prod(latent))], axis=2)
    sides = [side * pipeline.upscale for side in latent[:2]]
    return z.reshape(*z.shape[:2], *latent), images.reshape(*z.shape[:2], *sides, 3)


def polyak_step(z_BHWC: jax.Array, g_BHWC: jax.Array, distance_B: jax.Array) -> jax.Array:
    """One Polyak step of `polyak_descent`, with z kept on its sphere.

    Args:
      z_BHWC: noises.
      g_BHWC: gradient of the distance in z.
      distance_B: distance of each picture from its target.
    """
    tiny = jnp.finfo(z_BHWC.dtype).tiny
    size, slope = _norm(z_BHWC), jnp.maximum(_norm(g_BHWC), tiny)
    reach = jnp.minimum(distance_B[:, None, None, None] / slope, MAX_STEP * size)
    stepped = z_BHWC - reach * (g_BHWC / slope)
    return stepped * (size / jnp.maximum(_norm(stepped), tiny))


def _norm(x_BHWC: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x_BHWC**2, axis=(1, 2, 3), keepdims=True))


def angles_degrees(a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> np.ndarray:
    """Angles in degrees between N pairs of noises: [N]; about 90 for independent ones."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a_NHWC, b_NHWC))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))
