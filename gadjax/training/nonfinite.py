"""Report updates skipped for non-finite values.

They are masked on the devices (`gadjax.training.updates.apply_update`), and counted there in a row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from gadjax.errors import RunStopped
from gadjax.training.updates import split_metrics
from gadjax.types import Metrics

MAX_SAMPLES = 16  # listed in a line


class Update(NamedTuple):
    """A dispatched update, its metrics still on the devices.

    Attributes:
      first: number of its first sample in the data's stream.
      prompt_numbers: the prompts' numbers [B], where the source has them.
      metrics: scalars, and values per sample [B].
    """

    first: int
    prompt_numbers: jax.Array | None
    metrics: Metrics


def merge_scalars(updates: Sequence[Update]) -> Metrics:
    """Scalar metrics of a step; of a name in several updates, the last one's."""
    return {name: x for update in updates for name, x in split_metrics(update.metrics)[0].items()}


def check_nonfinite(
    updates: Sequence[Update], step: int, most: int, note: Callable[[str], None]
) -> None:
    """Report a step's skipped updates: what was not finite, and for which samples.

    Called with the step before the newest, so that it does not wait for a device; every process
    calls it.

    Args:
      updates: the step's updates.
      step: number of the step.
      most: skipped updates of a network in a row at which the run stops.
      note: receives one line for each skipped update.

    Raises: RunStopped once `most` updates of a network in a row were skipped.
    """
    counts = [{k: v for k, v in u.metrics.items() if k.endswith("/bad")} for u in updates]
    for update, update_counts in zip(updates, jax.device_get(counts), strict=True):
        for name, count in update_counts.items():
            if not count:
                continue
            role = name.removesuffix("/bad")
            cause = nonfinite_cause(update, role)
            if count >= most:
                raise RunStopped(
                    f"step {step}: the last {count} updates of the {role} were not finite and were "
                    f"skipped, the newest for {cause}; expected finite losses (lower optim.lr, or "
                    f"debug it with --reproduce-step {step})"
                )
            note(f"step {step}: an update of the {role} was not finite and was skipped: {cause}")


def nonfinite_cause(update: Update, role: str) -> str:
    """Cause of a skipped update: the non-finite quantity, and the samples whose loss is not finite.

    If every sample's loss is finite, the cause names the whole batch.
    """
    metrics = jax.device_get(update.metrics)
    bad = np.flatnonzero(~np.isfinite(metrics[f"{role}/loss_B"]))
    if not np.isfinite(metrics[f"{role}/loss"]):
        terms = [k for k in metrics if k.startswith("loss/")] if role == "student" else []
        names = [k for k in terms if not np.isfinite(metrics[k])] or [f"{role}/loss"]
        quantity = ", ".join(names)
    elif not np.isfinite(metrics[f"{role}/grad_norm"]):
        quantity = "the gradient of a finite loss"
    else:
        quantity = "the optimizer's update for a finite gradient"
    kind, numbers = sample_numbers(update, len(metrics[f"{role}/loss_B"]))
    listed = numbers[bad] if len(bad) else numbers
    text = ", ".join(map(str, listed[:MAX_SAMPLES]))
    more = f" and {len(listed) - MAX_SAMPLES} more" if len(listed) > MAX_SAMPLES else ""
    return f"{quantity} of {kind if len(bad) else f'the whole batch, {kind}'} {text}{more}"


def sample_numbers(update: Update, size: int) -> tuple[str, np.ndarray]:
    """Kind and numbers [B] by which an update's samples are listed.

    "prompts" are numbered by their place in the file from 0, "samples" by their place in the
    stream.
    """
    if update.prompt_numbers is None:
        return "samples", update.first + np.arange(size)
    return "prompts", multihost_utils.process_allgather(update.prompt_numbers, tiled=True)
