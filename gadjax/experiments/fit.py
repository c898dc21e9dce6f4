"""Training loop of the bundled small networks: autoencoder, text encoder, evaluation features."""

from collections.abc import Callable

import jax
import optax
from tqdm import tqdm

from gadjax.seeds import make_key
from gadjax.types import Params

EMA_DECAY = 0.995  # lower in the first steps


def fit(
    params: Params,
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    batches: Callable[[int], tuple],
    *,
    steps: int,
    lr: float,
    seed: int,
) -> Params:
    """Train with AdamW, warm-up and cosine decay to zero.

    Args:
      params: initial parameters.
      loss: (params, key, *batch) -> (scalar, metrics).
      batches: step -> arrays of its batch.
      steps: number of updates.
      lr: peak learning rate.
      seed: of the keys.
    Returns: the EMA of the parameters.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(200, steps // 10), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4)
    )

    @jax.jit
    def update(params, ema, state, step, batch):
        key = jax.random.fold_in(make_key(seed), step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, key, *batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        decay = jax.numpy.minimum(EMA_DECAY, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda m, p: m + (1 - decay) * (p - m), ema, params)
        return params, ema, state, {"loss": value, **metrics}

    ema, state = params, optimizer.init(params)
    bar = tqdm(range(steps), mininterval=5.0)
    for step in bar:
        params, ema, state, metrics = update(params, ema, state, step, batches(step))
        if step % 50 == 0:
            bar.set_postfix({k: f"{float(v):.4f}" for k, v in metrics.items()})
    return ema
