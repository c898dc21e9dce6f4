"""`gadjax train` on networks that are formulas: whole runs that compile in seconds."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from closed_form import FLOW_WORLD, SHAPE, D, gaussian_params, mixture_params

from gadjax.formats.sampling_config import SamplingConfig
from gadjax.objectives import TERMS, build
from gadjax.parallel.placement import batch_shards
from gadjax.parallel.sharding import check_batch, make_mesh
from gadjax.training.checks import select_kernels
from gadjax.training.setup import LoopSpec, Run, update_order
from gadjax.training.state import create_state, make_optimizer
from gadjax.types import Cond

CAPTIONS = "a fox", "an owl", "a\x1b[31m crab", "a bee", "a whale", "an ant", "a yak"
CONFIG = """
from gadjax.training.config import default_config

def get_config():
    config = default_config()
    config.teacher, config.data.embeddings = "asset:a formula", "texts"
    config.objective = {"dmd": {}, "gad": {"steps": 1}}
    config.student.timesteps = (1000, 900, 750, 500)
    config.steps, config.batch, config.guidance = 8, 8, 1.7
    config.optim.lr = config.critic.lr = 1e-3
    config.checkpoint.every, config.log.every, config.preview.every = 3, 1, 0
    return config
"""


class Texts:
    """Every prompt's own text; that of prompt `bad` is not a number from sample `since` on."""

    embeddings = SimpleNamespace(prompts=CAPTIONS)

    def __init__(self, bad: int = -1, since: int = 0):
        self.bad, self.since = bad, since
        self.text = 0.5 * np.random.default_rng(0).normal(size=(len(CAPTIONS), 1, D))

    def batch(self, index: int, size: int) -> dict[str, np.ndarray]:
        numbers = np.arange(index, index + size)
        which = (3 * numbers + 1) % len(CAPTIONS)
        text = self.text[which]
        text[(which == self.bad) & (numbers >= self.since)] = np.nan
        mask = np.ones((size, 1), np.int32)
        return {"text": text.astype(np.float32), "mask": mask, "which": which.astype(np.int32)}


def prepare_with(source):
    """What takes the place of `gadjax.training.setup.prepare`."""

    def prepare(config):
        mesh = make_mesh(config.mesh)
        objective = build(config.objective, TERMS, FLOW_WORLD.times[:-1])
        optimizers = {role: make_optimizer(config.optim) for role in ("student", "critic")}
        parts = check_batch(config.batch, config.microbatch or config.batch, mesh)
        step_spec = FLOW_WORLD.step_spec(
            objective,
            guidance=config.guidance,
            optimizers=optimizers,
            microbatches=parts,
            batch_shards=batch_shards(mesh),
        )
        pipeline = SimpleNamespace(
            backbone="formula",
            latent=SHAPE,
            cond=lambda text, mask, pooled: Cond(text, mask),
            denoiser=step_spec.denoiser,
            folder_guidance=SamplingConfig().guidance,
            folder=SimpleNamespace(
                components={"formula": SimpleNamespace(family=SimpleNamespace(rules=()))}
            ),
        )
        null = {"text": np.zeros((1, 1, D), np.float32), "mask": np.ones((1, 1), np.int32)}
        return Run(
            config=config,
            teacher=config.teacher,
            seed=config.seed,
            batch=config.batch,
            order=update_order(config, objective),
            offload=tuple(config.offload),
            kernels=select_kernels(config.attention, mesh, config.dtype),
            pipeline=pipeline,
            step_spec=step_spec,
            loop_spec=LoopSpec.from_config(config),
            mesh=mesh,
            source=source,
            frozen={"null": null, "formula": gaussian_params()},
            initial_params={"student": FLOW_WORLD.student_params(bend=0.2)},
            start=lambda initial_params: create_state(
                initial_params | {"critic": mixture_params(3)}, optimizers
            ),
            fingerprint="formula",
        )

    return prepare


def write_config(folder: Path) -> Path:
    path = folder / "formula.py"
    path.write_text(CONFIG)
    return path
