"""A student beside its teacher: what few steps kept, and what they lost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from gadjax.convert.recipe import Sampling
from gadjax.errors import InputError
from gadjax.evaluation.metrics import Drawn, absent_metrics, row_metrics
from gadjax.evaluation.sensitivity import map_tangents
from gadjax.evaluation.statistics import Estimate
from gadjax.evaluation.worlds import World
from gadjax.pipeline import Pipeline
from gadjax.sampling import BATCH, draw, initial_noise, sampler_and_times
from gadjax.types import Params


@dataclass(frozen=True)
class Model:
    """A pipeline and how it is sampled. name: for messages."""

    name: str
    pipeline: Pipeline
    params: dict[str, Params]
    sampling: Sampling

    @property
    def evaluations(self) -> int:
        """Of the network, for one picture."""
        return self.sampling.steps * (1 if self.sampling.guidance == 1 else 2)


@dataclass(frozen=True)
class Plan:
    """seeds: pictures of each prompt. tangents: directions of noise for each prompt, every one at
    a seed of its own; 0 leaves noise sensitivity out. batch: pictures at a time."""

    seeds: int = 8
    tangents: int = 1
    batch: int = BATCH


@dataclass(frozen=True)
class Row:
    """One way of drawing. images_PSHWC: seed s of prompt p has the same noise in every row."""

    key: str
    label: str
    sampling: Sampling
    evaluations: int
    images_PSHWC: np.ndarray
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """absent: metrics that could not be taken -> why."""

    rows: list[Row]
    absent: dict[str, str]


def evaluate(
    teacher: Model, student: Model, prompts: Sequence[str], world: World, plan: Plan
) -> Evaluation:
    """Draw P prompts from S noises each in three ways, and compare.

    The rows are the teacher, the teacher in as few steps as the student, and the student. Prompt p
    of seed s starts from initial_noise(s, P)[p]. A bar on a terminal counts network evaluations.
    Raises: InputError, before anything is drawn, for a plan, prompts or pipelines that do not go
      together; and for pictures that are not finite.
    """
    few = replace(teacher.sampling, steps=student.sampling.steps, timesteps=None)
    models = {"teacher": teacher, "teacher_few": replace(teacher, sampling=few), "student": student}
    _check(models, prompts, world, plan)

    # The teacher also draws the seeds to which the distance of every row, its own too, is taken.
    seeds = {key: plan.seeds for key in models}
    seeds["teacher"] += plan.seeds if world.extractor else 0
    work = [
        len(prompts) * (seeds[key] + 2 * plan.tangents) * model.evaluations
        for key, model in models.items()
    ]
    drawn, others = {}, None
    with tqdm(total=sum(work), unit="evaluation", unit_scale=True, disable=None) as bar:
        for key, model in models.items():
            images = _images(model, prompts, seeds[key], plan, bar)
            own = images[:, : plan.seeds]
            drawn[key] = Drawn(own, _features(world, own), _tangents(model, prompts, plan, bar))
            if seeds[key] > plan.seeds:
                others = _features(world, images[:, plan.seeds :])
    rows = []
    for key, model in models.items():
        metrics = row_metrics(drawn[key], drawn["teacher"], others, prompts, world)
        label = f"{key.split('_')[0]}, {model.sampling.steps} steps"
        images = drawn[key].images_PSHWC
        rows.append(Row(key, label, model.sampling, model.evaluations, images, metrics))
    return Evaluation(rows, absent_metrics(drawn["teacher"], world))


def _check(models: dict[str, Model], prompts: Sequence[str], world: World, plan: Plan) -> None:
    for name, least in (("seeds", 2), ("tangents", 0), ("batch", 1)):
        if getattr(plan, name) < least:
            raise InputError(f"{name}: found {getattr(plan, name)}; expected {least} or more")
    latent = models["teacher"].pipeline.latent
    for model in models.values():
        try:
            sampler_and_times(model.pipeline, model.sampling)
        except InputError as error:
            raise InputError(f"{model.name}: {error}") from None
        if model.pipeline.latent != latent:
            raise InputError(
                f"{model.name}: found latents {model.pipeline.latent}; expected {latent}, "
                "the teacher's"
            )
    side = latent[0] * models["teacher"].pipeline.upscale
    if world.size not in (None, side):
        raise InputError(
            f"world: found one of {world.size} x {world.size} pictures; expected {side} x {side}, "
            "as the teacher draws (or world none)"
        )
    for prompt in prompts if world.read else ():
        try:
            world.read(prompt)
        except InputError as error:
            raise InputError(f"prompts: {error} (or world none)") from None


def _images(model: Model, prompts: Sequence[str], seeds: int, plan: Plan, bar: tqdm) -> np.ndarray:
    count, pipeline = len(prompts), model.pipeline
    noise = np.concatenate([initial_noise(s, count, pipeline.latent) for s in range(seeds)])
    images = draw(
        pipeline,
        model.params,
        model.sampling,
        [*prompts] * seeds,
        noise,
        batch=plan.batch,
        progress=lambda done: bar.update(done * model.evaluations),
    )
    if not np.isfinite(images).all():
        raise InputError(f"{model.name}: found pictures that are not finite; expected finite ones")
    return images.reshape(seeds, count, *images.shape[1:]).swapaxes(0, 1)


def _features(world: World, images_PSHWC: np.ndarray) -> np.ndarray | None:
    if world.extractor is None:
        return None
    prompts, seeds = images_PSHWC.shape[:2]
    features = world.extractor(images_PSHWC.reshape(-1, *images_PSHWC.shape[2:]))
    return features.reshape(prompts, seeds, -1)


def _tangents(model: Model, prompts: Sequence[str], plan: Plan, bar: tqdm) -> np.ndarray | None:
    """J v of each prompt's map from noise to x0: [T, P, H, W, C]."""
    if not plan.tangents:
        return None
    count, latent = len(prompts), model.pipeline.latent
    # Directions are noise too, of seeds from which no picture is drawn.
    first = 2 * plan.seeds
    z, v = (
        np.concatenate([initial_noise(start + i, count, latent) for i in range(plan.tangents)])
        for start in (0, first)
    )
    found = map_tangents(
        model.pipeline,
        model.params,
        model.sampling,
        [*prompts] * plan.tangents,
        z,
        v,
        batch=plan.batch,
        progress=lambda done: bar.update(2 * done * model.evaluations),
    )
    return found.reshape(plan.tangents, count, *latent)
