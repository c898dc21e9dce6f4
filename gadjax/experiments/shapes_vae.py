"""Training of the bundled world's autoencoder.

    python -m gadjax.experiments.shapes_vae --folder DIR

The vae of a pipeline folder is trained on rendered pictures and written back, with the scaling
factor that gives its latents unit variance.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from gadjax.experiments.fit import fit
from gadjax.experiments.folder import read_config, replace_component
from gadjax.models.module import functional
from gadjax.models.vae import autoencoder_kl
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.worlds import shapes

KL_WEIGHT = 2e-4  # mean KL per latent element, against the mean square per colour value


@pinned_jax_config()
def train(config: autoencoder_kl.Config, *, steps: int, batch: int, lr: float, seed: int):
    """Train the autoencoder on the world.

    Args:
      config: of the autoencoder.
      steps: updates.
      batch: pictures of an update.
      lr: peak learning rate.
      seed: of parameters and pictures.
    Returns: its parameters and the scaling factor 1 / (standard deviation of the mean latents).
    """
    net = functional(autoencoder_kl.build(config, remat=False))

    def loss(params, key, image):
        mean, logvar = net.apply(params, image, method="encode")
        noise = jax.random.normal(key, mean.shape)
        decoded = net.apply(params, mean + jnp.exp(0.5 * logvar) * noise, method="decode")
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        error = decoded - image
        square = jnp.mean(error**2)
        metrics = {"mse": square, "kl": kl, "spread": jnp.std(mean)}
        return square + 0.1 * jnp.mean(jnp.abs(error)) + KL_WEIGHT * kl, metrics

    def batches(step):
        return (shapes.sample_batch(seed, range(step * batch, (step + 1) * batch))[0],)

    params = fit(net.init(make_key(seed)), loss, batches, steps=steps, lr=lr, seed=seed)
    held_out = shapes.sample_batch(seed + 1, range(512))[0]
    latents = jax.jit(partial(net.apply, method="encode"))(params, held_out)[0]
    return params, float(1 / jnp.std(latents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="pipeline folder to update")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raw = read_config(args.folder, "vae")
    params, factor = train(
        autoencoder_kl.Config.from_dict(raw),
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )
    raw["scaling_factor"] = round(factor, 5)
    replace_component(args.folder, "vae", params, autoencoder_kl.FAMILY.keymap, raw)


if __name__ == "__main__":
    main()
