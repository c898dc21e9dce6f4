"""Pictures of a closed-form world, and the discriminator of pictures written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from closed_form import World

RNG = np.random.default_rng(11)
MIX = RNG.normal(size=(2, 3))


def decode(params, latent_BHWC):
    """Pictures [B, 16, 16, 3] of latents [B, 2, 2, 2]."""
    wide = jnp.repeat(jnp.repeat(latent_BHWC, 8, 1), 8, 2)
    return jnp.tanh(wide @ params["mix"])


def autoencoder(dtype=jnp.float32):
    return {"vae": {"mix": np.asarray(MIX, dtype)}}


def with_pixels(world: World) -> World:
    """The world with an autoencoder."""
    world = World(world.schedule, world.kind, world.times)
    plain = world.step_spec
    object.__setattr__(world, "step_spec", lambda term, **more: plain(term, decode=decode, **more))
    return world


def discriminator_params(term, dtype=jnp.float32):
    """Parameters of a discriminator with non-zero logits and biases."""
    rng = np.random.default_rng(4)
    params = term.init_discriminator(jax.random.key(0), 3)
    return jax.tree.map(lambda p: np.asarray(rng.normal(size=p.shape) / 3, dtype), params)


def logits_by_hand(params, image):
    """Logits of each layer [K, B], the convolutions as sums over their nine taps."""
    x, values = image, []
    for k in range(4):
        conv, head = params[f"conv_{k}"], params[f"head_{k}"]
        padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        size = x.shape[1]
        taps = [
            padded[:, a : a + size : 2, b : b + size : 2] @ conv["kernel"][a, b]
            for a in range(3)
            for b in range(3)
        ]
        x = sum(taps) + conv["bias"]
        x = jnp.where(x > 0, x, 0.2 * x)
        values.append((x @ head["kernel"] + head["bias"])[..., 0].mean((1, 2)))
    return jnp.stack(values)
