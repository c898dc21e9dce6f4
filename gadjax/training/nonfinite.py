"""What the host says of updates that were left out because something in them was not finite.

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

SHOWN = 16  # numbers of samples in a line


class Update(NamedTuple):
    """One update as it was begun, still on the devices.

    first: the number of its first sample in the data's stream. which: the prompts' numbers [B],
    where the source has them.
    """

    first: int
    which: jax.Array | None
    metrics: Metrics


def merge_scalars(updates: Sequence[Update]) -> Metrics:
    """What is reported of a step: of every scalar that of the last update that says it."""
    return {name: x for update in updates for name, x in split_metrics(update.metrics)[0].items()}


def check_nonfinite(
    updates: Sequence[Update], step: int, most: int, note: Callable[[str], None]
) -> None:
    """Say which of a step's updates were masked: what was not finite, and of which samples.

    Called with the step before the newest, so that it does not wait for a device; every process
    calls it. note: is told one line for each.
    Raises: RunStopped once `most` updates of a network in a row were masked.
    """
    counts = [{k: v for k, v in u.metrics.items() if k.endswith("/bad")} for u in updates]
    for update, found in zip(updates, jax.device_get(counts), strict=True):
        for name, count in found.items():
            if not count:
                continue
            role = name.removesuffix("/bad")
            cause = nonfinite_cause(update, role)
            if count >= most:
                raise RunStopped(
                    f"step {step}: the last {count} updates of the {role} were not finite and were "
                    f"left out, the newest for {cause}; expected finite losses (lower optim.lr, or "
                    f"look at it with --reproduce-step {step})"
                )
            note(f"step {step}: an update of the {role} was not finite and was left out: {cause}")


def nonfinite_cause(update: Update, role: str) -> str:
    """What of a masked update was not finite, and of which samples: those whose own loss was not,
    or the whole batch."""
    metrics = jax.device_get(update.metrics)
    bad = np.flatnonzero(~np.isfinite(metrics[f"{role}/loss_B"]))
    if not np.isfinite(metrics[f"{role}/loss"]):
        terms = [k for k in metrics if k.startswith("loss/")] if role == "student" else []
        names = [k for k in terms if not np.isfinite(metrics[k])] or [f"{role}/loss"]
        what = ", ".join(names)
    elif not np.isfinite(metrics[f"{role}/grad_norm"]):
        what = "the gradient of a finite loss"
    else:
        what = "the optimizer's update for a finite gradient"
    kind, numbers = sample_numbers(update, len(metrics[f"{role}/loss_B"]))
    chosen = numbers[bad] if len(bad) else numbers
    shown = ", ".join(map(str, chosen[:SHOWN]))
    more = f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
    return f"{what} of {kind if len(bad) else f'the whole batch, {kind}'} {shown}{more}"


def sample_numbers(update: Update, size: int) -> tuple[str, np.ndarray]:
    """What the samples of an update are called: "prompts" by their place in the file from 0, or
    "samples" by their place in the stream; and the numbers [B]."""
    if update.which is None:
        return "samples", update.first + np.arange(size)
    return "prompts", multihost_utils.process_allgather(update.which, tiled=True)
