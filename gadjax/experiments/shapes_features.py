"""Training of the evaluation features of the bundled world.

    python -m gadjax.experiments.shapes_features

A small network predicts a rendered picture's attributes, and the amounts of its corruptions,
through linear heads on 32 features. The heads are discarded; the features are shifted and scaled to
zero mean and unit variance over the world's pictures.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gadjax.assets import resolve
from gadjax.experiments.fit import fit
from gadjax.features.shapes import Config, network, save_features
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.types import Params
from gadjax.worlds import shapes

CHOICES = shapes.ATTRIBUTES
PLACE = ("x", "y", "radius")
CORRUPTIONS = ("blur", "noise", "ghost")
BLUR = np.exp(-0.5 * (np.arange(-4, 5) / 1.2) ** 2)  # 1.2 pixels
MAX_AMOUNT = {"blur": 1.0, "noise": 0.2, "ghost": 0.4}
HELD_OUT = 4096


def blur(image_BHWC: jax.Array) -> jax.Array:
    """A separable Gaussian blur with repeated borders."""
    taps, reach = BLUR / BLUR.sum(), len(BLUR) // 2
    for axis in (1, 2):
        pads = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded, size = jnp.pad(image_BHWC, pads, mode="edge"), image_BHWC.shape[axis]
        image_BHWC = sum(
            float(tap) * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i, tap in enumerate(taps)
        )
    return image_BHWC


def corrupt(key: jax.Array, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Corrupt half of the pictures with blur, noise and a ghost of another picture.

    Typical errors of few-step students must change the features, or a distance in them misses
    these errors.
    Returns: pictures, and the amount of each corruption [B, 3].
    """
    keys = jax.random.split(key, 3)
    count = len(image_BHWC)
    amount = jax.random.uniform(keys[0], (count, 3))
    amount *= jax.random.bernoulli(keys[1], 0.5, (count, 1))
    soft, noise, ghost = (
        amount[:, i, None, None, None] * MAX_AMOUNT[name] for i, name in enumerate(CORRUPTIONS)
    )
    image_BHWC += ghost * (jnp.roll(image_BHWC, 1, axis=0) - image_BHWC)
    image_BHWC += soft * (blur(image_BHWC) - image_BHWC)
    return image_BHWC + noise * jax.random.normal(keys[2], image_BHWC.shape), amount


def render_batch(seed: int, indices: range) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Rendered pictures, indices of their words, and centre and radius in [0, 1] [N, 3]."""
    images, _, scenes = shapes.sample_batch(seed, indices)
    labels = {
        name: np.array([words.index(getattr(scene, name)) for scene in scenes])
        for name, words in CHOICES.items()
    }
    places = np.array([[getattr(scene, name) for name in PLACE] for scene in scenes], np.float32)
    return images, labels, places / np.float32([shapes.SIZE, shapes.SIZE, shapes.SIZE / 4])


@pinned_jax_config()
def train(config: Config, *, steps: int, batch: int, lr: float, seed: int):
    """Train the network and its heads.

    Args:
      config: sizes of the network.
      steps: updates.
      batch: pictures of an update.
      lr: peak learning rate.
      seed: of parameters and pictures.
    Returns: the network's parameters, and the heads' scores on held-out pictures: accuracy by
      attribute, of all attributes together, and the error of the position.
    """
    net = network(config)

    def predict(params, image):
        features = net.apply(params["network"], image)
        return {name: features @ h["kernel"] + h["bias"] for name, h in params["heads"].items()}

    def loss(params, key, image, labels, place):
        image, amounts = corrupt(key, image)
        outputs = predict(params, image)
        words = sum(
            optax.softmax_cross_entropy_with_integer_labels(outputs[name], labels[name]).mean()
            for name in CHOICES
        )
        position = jnp.mean((outputs["place"] - place) ** 2)
        corruption = jnp.mean((outputs["corruption"] - amounts) ** 2)
        return words + 20 * position + 5 * corruption, {
            "words": words,
            "place": position,
            "corruption": corruption,
        }

    sizes = {name: len(words) for name, words in CHOICES.items()}
    sizes |= {"place": len(PLACE), "corruption": len(CORRUPTIONS)}
    first, second = jax.random.split(make_key(seed))
    heads = {
        name: {
            "kernel": 0.1
            * jax.random.normal(jax.random.fold_in(second, i), (config.features, size)),
            "bias": jnp.zeros(size),
        }
        for i, (name, size) in enumerate(sizes.items())
    }
    params = fit(
        {"network": net.init(first), "heads": heads},
        loss,
        lambda step: render_batch(seed, range(step * batch, (step + 1) * batch)),
        steps=steps,
        lr=lr,
        seed=seed,
    )
    images, labels, places = render_batch(seed + 1, range(HELD_OUT))
    outputs = jax.device_get(jax.jit(predict)(params, images))
    right = {name: outputs[name].argmax(1) == labels[name] for name in CHOICES}
    scores = {name: float(hits.mean()) for name, hits in right.items()}
    scores["all five"] = float(np.all(list(right.values()), axis=0).mean())
    errors = (outputs["place"] - places) * np.float32([shapes.SIZE, shapes.SIZE, shapes.SIZE / 4])
    scores |= {
        f"{name}, pixels": float(error)
        for name, error in zip(PLACE, np.sqrt((errors**2).mean(0)), strict=True)
    }
    features = np.asarray(jax.jit(net.apply)(params["network"], images))
    return standardise(params["network"], features), scores


def standardise(params: Params, features_ND: np.ndarray) -> Params:
    """Rescale the last layer so that these features have mean 0 and standard deviation 1."""
    mean, spread = features_ND.mean(0), features_ND.std(0)
    last = params["linear_2"]
    scaled = {"kernel": last["kernel"] / spread, "bias": (last["bias"] - mean) / spread}
    return {**params, "linear_2": scaled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=resolve("asset:shapes_features"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = Config()
    params, scores = train(config, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    for name, score in scores.items():
        print(f"held-out {name}: {score:.4f}")
    save_features(args.out, config, params)


if __name__ == "__main__":
    main()
