"""One cell of the study: its students of all seeds trained in one program, and evaluated."""

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
from gadjax.evaluation.evaluate import EvaluationConfig, evaluate
from gadjax.evaluation.oracles import WORLDS
from gadjax.ops.flops import flops
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.compile import with_untrained
from gadjax.training.setup import Run
from gadjax.training.steps import critic_step, student_step
from gadjax.training.workdir import sampling_from_config

PROMPTS = "asset:shapes_test_prompts.txt"
CURVES = "student/loss", "critic/loss", "loss/gad", "gad/cosine", "gad/norm_ratio", "dmd/gap"
EVERY = 20  # steps between two points of a curve
SHOWN = 24  # pictures


def train_seeds(run: Run, seeds: Sequence[int]) -> tuple[list[Any], dict[str, list]]:
    """The updates of `gadjax train`, for all seeds side by side in one compiled program.

    Returns:
      The students' averages, one parameter tree for each seed, and curves: metric -> its value
      at every EVERY-th step, mean over seeds.
    """
    config, backbone = run.config, run.pipeline.backbone
    step_spec = with_untrained(run.step_spec, run.frozen)
    each = config.critic.updates if len(step_spec.optimizers) > 1 else 0

    def train(key, raws, frozen, initial_params):
        def one_step(state, now):
            logged = {}
            for place in range(each + 1):
                raw = jax.tree.map(lambda x, place=place: x[place], now["raw"])
                batch = make_batch(run.pipeline, frozen, raw, key, now["number"] + place)
                step = student_step if place == each else critic_step
                state, metrics = step(step_spec, state, frozen.get(backbone), batch)
                logged |= {k: metrics[k] for k in CURVES if k in metrics}
            return state, logged

        numbers = (each + 1) * jnp.arange(config.steps, dtype=jnp.uint32)
        return jax.lax.scan(one_step, run.start(initial_params), {"number": numbers, "raw": raws})

    def averages(keys, raws, frozen, initial_params):
        state, logged = jax.vmap(train, in_axes=(0, 0, None, None))(
            keys, raws, frozen, initial_params
        )
        return state.ema, jax.tree.map(lambda x: x.mean(0)[EVERY - 1 :: EVERY], logged)

    raws = [prompts_of(run, seed, each + 1) for seed in seeds]
    raws = jax.tree.map(lambda *of: np.stack(of), *raws)
    keys = jnp.stack([make_key(seed) for seed in seeds])
    ema, curves = jax.jit(averages)(keys, raws, run.frozen, run.initial_params)
    ema = jax.device_get(ema)
    students = [jax.tree.map(lambda x, i=i: x[i], ema) for i in range(len(seeds))]
    return students, {k: np.round(v, 5).tolist() for k, v in jax.device_get(curves).items()}


def prompts_of(run: Run, seed: int, updates: int) -> dict[str, np.ndarray]:
    """What the updates of a run of this seed read: [steps, updates, batch, ...] by name."""
    config = run.config
    source, shape = replace(run.source, seed=seed), (config.steps, updates, config.batch)
    samples = source.batch(0, int(np.prod(shape)))
    return {name: x.reshape(*shape, *x.shape[1:]) for name, x in samples.items()}


class Evaluator:
    """Evaluates students as `gadjax evaluate` does; what a teacher draws is kept."""

    plan = EvaluationConfig(tangents=4, library=128, moves=0)

    def __init__(self):
        self.known: dict[tuple, dict] = {}
        self.rows: dict[tuple, dict] = {}
        self.prompts = read_prompts(resolve(PROMPTS))

    def __call__(self, config: ConfigDict, student: Any) -> dict[str, Any]:
        """Label and metrics of the student, and its pictures of the first prompts' first noise."""
        teacher = with_sampling(load(config.teacher), guidance=config.guidance)
        params = teacher.params | {teacher.pipeline.backbone: student}
        model = Model("student", teacher.pipeline, params, sampling_from_config(config))
        known = self.known.setdefault(key_of(config), {})
        found = evaluate(teacher, model, self.prompts, WORLDS["shapes"], self.plan, known)
        rows = {
            row.key: {
                "label": row.label,
                "metrics": {name: metric.value for name, metric in row.metrics.items()},
                "images": row.images_PSHWC[:SHOWN, 0],
            }
            for row in found.rows
        }
        self.rows[key_of(config)] = rows
        return rows["student"]

    def teachers(self, config: ConfigDict) -> dict[str, Any]:
        """The same of the teacher in its own steps and in the student's, once a student is done."""
        rows = self.rows[key_of(config)]
        return {key: row for key, row in rows.items() if key != "student"}


def key_of(config: ConfigDict) -> tuple:
    return config.teacher, config.guidance, config.student.steps


def evaluations(run: Run) -> float:
    """What a step costs, the critic's updates included, in evaluations of the network for each
    sample: the products and convolutions of the traced program over those of one evaluation."""
    step_spec, frozen = run.step_spec, run.frozen
    raw = run.source.batch(0, run.config.batch)
    batch = jax.eval_shape(lambda f, r: make_batch(run.pipeline, f, r, make_key(0), 0), frozen, raw)
    state, teacher = (
        jax.eval_shape(run.start, run.initial_params),
        frozen.get(run.pipeline.backbone),
    )
    once = flops(
        lambda p, b: step_spec.denoiser.raw(p, b.noise, 0.0, b.cond), run.initial_params, batch
    )
    total = flops(lambda s, t, b: student_step(step_spec, s, t, b), state, teacher, batch)
    if len(step_spec.optimizers) > 1:
        own = flops(lambda s, t, b: critic_step(step_spec, s, t, b), state, teacher, batch)
        total += run.config.critic.updates * own
    return total / once
