"""Workdirs made by hand: what `gadjax train` leaves behind, without training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gadjax.checkpoints.checkpoint import Checkpoints
from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.models.adapters import abstract_adapters, init_adapters
from gadjax.models.params import split_frozen
from gadjax.training.config import as_json, default_config, write_json
from gadjax.training.lora import loras
from gadjax.training.state import create_state

TIMESTEPS = (899, 674, 449, 224)
LENGTH = 8
OBJECTIVE = {"dmd": {}, "gad": {"weight": 0.3, "steps": 4}}


def make_workdir(
    folder: Path, teacher: Path, *, objective=OBJECTIVE, timesteps=TIMESTEPS, **changes
) -> Path:
    """Steps 1 and 2 of a run: the student of each and its average all differ.

    With a rank (`student={"lora": {"rank": 2}}`) they are adapters, with `trained` that part.
    """
    config = default_config()
    config.teacher = str(teacher)
    config.objective = objective
    config.guidance = 3.0
    config.student.timesteps = timesteps
    config.data.length = LENGTH
    config.update(changes)
    pipeline = read_pipeline(teacher)
    part = pipeline.components[pipeline.backbone]
    identity = fingerprint(tensors_from_params(part.params, part.keymap))
    folder.mkdir(parents=True)
    write_json(config, folder / "config.json")
    checkpoints = Checkpoints(folder / "checkpoints")
    first, _ = split_frozen(part.params, part.frozen, (config.student.trained,))
    if role := loras(config).get("student"):
        first = init_adapters(jax.random.key(0), abstract_adapters(part.abstract, role))
    for step in (1, 2):
        state = create_state(
            {"student": jax.tree.map(lambda x, s=step: jnp.asarray(x) + 0.01 * s, first)},
            {"student": optax.sgd(1e-3)},
        )
        ema = jax.tree.map(lambda x, s=step: jnp.asarray(x) * (1 - 0.02 * s), first)
        state = state._replace(step=jnp.int32(step), ema=ema)
        checkpoints.save(step, state, {"config": as_json(config), "teacher": identity})
    checkpoints.close()
    return folder


def numbers(images) -> np.ndarray:
    """PIL pictures as [N, H, W, 3] from 0 to 1."""
    return np.stack([np.asarray(image, np.float32) / 255 for image in images])
