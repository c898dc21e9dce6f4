"""A loop for the bundled world's small helpers: autoencoder, text encoder, evaluation features."""

from collections.abc import Callable

import jax
import optax
from tqdm import tqdm

from gadjax.seeds import make_key
from gadjax.types import Params


def fit(
    params: Params,
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    batches: Callable[[int], tuple],
    *,
    steps: int,
    lr: float,
    seed: int,
    average: float = 0.995,
) -> Params:
    """AdamW with warm-up and cosine decay to zero; returns the running average of the parameters.

    loss: (params, key, *batch) -> (scalar, metrics); batches: step -> its arrays.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(200, steps // 10), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4)
    )

    @jax.jit
    def update(params, mean, state, step, batch):
        key = jax.random.fold_in(make_key(seed), step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, key, *batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        share = jax.numpy.minimum(average, (1.0 + step) / (10.0 + step))
        mean = jax.tree.map(lambda m, p: m + (1 - share) * (p - m), mean, params)
        return params, mean, state, {"loss": value, **metrics}

    mean, state = params, optimizer.init(params)
    bar = tqdm(range(steps), mininterval=5.0)
    for step in bar:
        params, mean, state, metrics = update(params, mean, state, step, batches(step))
        if step % 50 == 0:
            bar.set_postfix({k: f"{float(v):.4f}" for k, v in metrics.items()})
    return mean
