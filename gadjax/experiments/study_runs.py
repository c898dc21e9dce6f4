"""Runs of one cell of the study: students of all seeds, trained in one program and evaluated."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gadjax.api import Model, load, with_sampling
from gadjax.assets import resolve
from gadjax.data.prompts import read_prompts
from gadjax.evaluation.evaluate import evaluate
from gadjax.evaluation.oracles import WORLDS
from gadjax.evaluation.results import EvaluationConfig
from gadjax.models.params import merge_params
from gadjax.ops.flops import flops
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.setup import Run
from gadjax.training.steps import UPDATES, critic_step, student_step
from gadjax.training.workdir import sampling_from_config

PROMPTS = "asset:shapes_test_prompts.txt"
CURVES = "student/loss", "critic/loss", "loss/gad", "gad/cosine", "gad/norm_ratio", "dmd/gap"
CURVE_INTERVAL = 20  # steps between two points of a curve
MAX_SHOWN = 24  # pictures


def train_seeds(run: Run, seeds: Sequence[int]) -> tuple[list[Any], dict[str, list]]:
    """Train students of several seeds in one compiled program, by the updates of `gadjax train`.

    Returns:
      The students' EMAs, one parameter tree for each seed, and curves: metric -> its value at
      every CURVE_INTERVAL-th step, mean over seeds.
    """
    config = run.config
    step_spec = run.step_spec
    updates = len(run.order)

    def train(key, raws, frozen, initial_params):
        def one_step(state, now):
            logged = {}
            for i, name in enumerate(run.order):
                raw = jax.tree.map(lambda x, i=i: x[i], now["raw"])
                batch = make_batch(run.pipeline, frozen, raw, key, now["number"] + i)
                state, metrics = UPDATES[name](step_spec, state, run.networks(frozen), batch)
                logged |= {k: metrics[k] for k in CURVES if k in metrics}
            return state, logged

        numbers = updates * jnp.arange(config.steps, dtype=jnp.uint32)
        return jax.lax.scan(one_step, run.start(initial_params), {"number": numbers, "raw": raws})

    def averages(keys, raws, frozen, initial_params):
        def one(seed):
            return train(*seed, frozen, initial_params)

        # On a CPU one seed after the other takes a tenth less time than all of them at once.
        together = None if jax.default_backend() == "cpu" else len(seeds)
        state, logged = jax.lax.map(one, (keys, raws), batch_size=together)
        return state.ema, jax.tree.map(
            lambda x: x.mean(0)[CURVE_INTERVAL - 1 :: CURVE_INTERVAL], logged
        )

    raws = [update_inputs(run, seed, updates) for seed in seeds]
    raws = jax.tree.map(lambda *of: np.stack(of), *raws)
    keys = jnp.stack([make_key(seed) for seed in seeds])
    ema, curves = jax.jit(averages)(keys, raws, run.frozen, run.initial_params)
    ema = jax.device_get(ema)
    students = [jax.tree.map(lambda x, i=i: x[i], ema) for i in range(len(seeds))]
    return students, {k: np.round(v, 5).tolist() for k, v in jax.device_get(curves).items()}


def update_inputs(run: Run, seed: int, updates: int) -> dict[str, np.ndarray]:
    """Inputs of all updates of a run, [steps, updates, batch, ...] by name.

    Args:
      run: the prepared run.
      seed: of the data source.
      updates: of critic and student in a step.
    """
    config = run.config
    source, shape = replace(run.source, seed=seed), (config.steps, updates, config.batch)
    samples = source.batch(0, int(np.prod(shape)))
    return {name: x.reshape(*shape, *x.shape[1:]) for name, x in samples.items()}


class Evaluator:
    """Evaluator of students, as `gadjax evaluate`; caches the teachers' pictures."""

    evaluation_config = EvaluationConfig(tangents=4, library=128)

    def __init__(self):
        self.cache: dict[tuple, dict] = {}
        self.rows: dict[tuple, dict] = {}
        self.prompts = read_prompts(resolve(PROMPTS))

    def __call__(self, config: ConfigDict, student: Any) -> dict[str, Any]:
        """Label and metrics of a student, and its pictures of the first prompts' first noise.

        student: all parameters of its network.
        """
        teacher = with_sampling(load(config.teacher), guidance=config.guidance)
        name = teacher.pipeline.backbone
        params = teacher.params | {name: student}
        model = Model("student", teacher.pipeline, params, sampling_from_config(config))
        cache = self.cache.setdefault(key_of(config), {})
        evaluation = evaluate(
            teacher, model, self.prompts, WORLDS["shapes"], self.evaluation_config, cache
        )
        rows = {
            row.key: {
                "label": row.label,
                "metrics": {name: metric.value for name, metric in row.metrics.items()},
                "images": row.images_PSHWC[:MAX_SHOWN, 0],
            }
            for row in evaluation.rows
        }
        self.rows[key_of(config)] = rows
        return rows["student"]

    def teachers(self, config: ConfigDict) -> dict[str, Any]:
        """Rows of the teacher in its own steps and in the student's, after an evaluation."""
        rows = self.rows[key_of(config)]
        return {key: row for key, row in rows.items() if key != "student"}


def key_of(config: ConfigDict) -> tuple:
    """Cache key of a config: its teacher, guidance and number of the student's sampling steps."""
    return config.teacher, config.guidance, sampling_from_config(config).steps


def evaluations(run: Run) -> float:
    """Cost of a step, the critic's updates included, in network evaluations for each sample.

    FLOPs (products and convolutions) of the traced program over those of one evaluation.
    """
    step_spec, frozen = run.step_spec, run.frozen
    raw = run.source.batch(0, run.config.batch)
    batch = jax.eval_shape(lambda f, r: make_batch(run.pipeline, f, r, make_key(0), 0), frozen, raw)
    state = jax.eval_shape(run.start, run.initial_params)
    networks = run.networks(frozen)
    network = merge_params(run.initial_params.get("student", {}), run.base("student", frozen))
    once = flops(lambda p, b: step_spec.denoiser.raw(p, b.noise, 0.0, b.cond), network, batch)
    total = flops(lambda s, t, b: student_step(step_spec, s, t, b), state, networks, batch)
    if len(step_spec.optimizers) > 1:
        critic = flops(lambda s, t, b: critic_step(step_spec, s, t, b), state, networks, batch)
        total += run.config.critic.updates * critic
    return total / once
