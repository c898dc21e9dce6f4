"""Training of the bundled world's text encoder.

    python -m gadjax.experiments.shapes_text --folder DIR

The T5 encoder of a pipeline folder learns to predict which attributes a caption names, and which it
leaves open, through linear heads on its mean token. The heads are discarded.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gadjax.experiments.fit import fit
from gadjax.experiments.folder import read_config, replace_component
from gadjax.models.module import functional
from gadjax.models.text import t5
from gadjax.models.text.tokenizer import load_tokenizer
from gadjax.runtime.settings import pinned_jax_config
from gadjax.seeds import make_key
from gadjax.worlds import shapes

LENGTH = 16  # the longest caption has 14 words
CHOICES = {name: ("", *words) for name, words in shapes.ATTRIBUTES.items()}


@pinned_jax_config()
def train(config: t5.Config, tokenizer, *, steps: int, batch: int, lr: float, seed: int):
    """Train the encoder.

    Args:
      config: of the T5 encoder.
      tokenizer: of the pipeline folder.
      steps: updates.
      batch: captions of an update.
      lr: peak learning rate.
      seed: of parameters and captions.
    Returns: its parameters, and its accuracy on held-out captions (all attributes right).
    """
    net = functional(t5.build(config, remat=False))

    def logits(params, ids, mask):
        hidden = net.apply(params["encoder"], ids, mask)
        pooled = jnp.sum(hidden * mask[..., None], 1) / jnp.sum(mask, 1, keepdims=True)
        return {name: pooled @ head for name, head in params["heads"].items()}

    def loss(params, key, ids, mask, labels):
        del key
        outputs = logits(params, ids, mask)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(outputs[name], labels[name]).mean()
            for name in CHOICES
        ]
        return sum(losses), {}

    def batches(step, seed=seed):
        captions = []
        for index in range(step * batch, (step + 1) * batch):
            rng = np.random.default_rng([seed, index])
            scene = shapes.sample_scene(rng)
            captions.append(shapes.caption(scene, shapes.sample_mentioned(rng)))
        parsed = [shapes.parse(text) for text in captions]
        labels = {
            name: np.array([words.index(r.get(name, "")) for r in parsed])
            for name, words in CHOICES.items()
        }
        return *tokenizer(captions, LENGTH), labels

    first, second = jax.random.split(make_key(seed))
    heads = {
        name: 0.1 * jax.random.normal(jax.random.fold_in(second, i), (config.d_model, len(words)))
        for i, (name, words) in enumerate(CHOICES.items())
    }
    start = {"encoder": net.init(first), "heads": heads}
    params = fit(start, loss, batches, steps=steps, lr=lr, seed=seed)
    ids, mask, labels = batches(0, seed=seed + 1)
    outputs = jax.jit(logits)(params, ids, mask)
    right = [np.argmax(outputs[name], -1) == labels[name] for name in CHOICES]
    return params["encoder"], float(np.mean(np.all(right, axis=0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="pipeline folder to update")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raw = read_config(args.folder, "text_encoder")
    params, right = train(
        t5.Config.from_dict(raw),
        load_tokenizer(args.folder / "tokenizer"),
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )
    print(f"held-out captions classified correctly: {right:.4f}")
    replace_component(args.folder, "text_encoder", params, t5.FAMILY.keymap, raw)


if __name__ == "__main__":
    main()
