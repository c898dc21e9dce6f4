"""A student beside its teacher: what few steps kept, and what they lost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from gadjax.errors import InputError
from gadjax.evaluation.draw import draw_sets
from gadjax.evaluation.metric_catalogue import NEAR, NEAR_SHARE, Metric, catalogue
from gadjax.evaluation.metrics import ModelOutputs, absent_metrics, merge_leading_axes, row_metrics
from gadjax.evaluation.noise_control import (
    MOVE_COST,
    ControlResults,
    choose_targets,
    classify_library,
    make_library,
    optimize_noise,
)
from gadjax.evaluation.noise_control_metrics import absent_control, control_metrics
from gadjax.evaluation.oracles import World
from gadjax.evaluation.sensitivity import map_tangents
from gadjax.evaluation.statistics import Estimate
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import BATCH, initial_noise, sampler_and_times
from gadjax.runtime.settings import pinned_jax_config

LEAST = {"seeds": 2, "tangents": 0, "batch": 1, "library": 0, "moves": 0}


@dataclass(frozen=True)
class EvaluationConfig:
    """seeds: pictures of each prompt. tangents: directions of noise for each prompt, every one at
    a seed of its own; 0 leaves noise sensitivity out. batch: pictures at a time. library: noises
    for the tasks of noise control, where the world has them; 0 leaves these out. moves: of a shape
    to another place by its noise, at most one for each noise of the library."""

    seeds: int = 8
    tangents: int = 1
    batch: int = BATCH
    library: int = 64
    moves: int = 32


@dataclass(frozen=True)
class Row:
    """One way of drawing. images_PSHWC: seed s of prompt p has the same noise in every row."""

    key: str
    label: str
    sampling: SamplingConfig
    evaluations: int
    images_PSHWC: np.ndarray
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """catalogue: every metric of the world, in order. absent: those that could not be taken -> why.
    control: None where the world has no such tasks or none were asked for."""

    rows: list[Row]
    catalogue: dict[str, Metric]
    absent: dict[str, str]
    control: ControlResults | None = None


@pinned_jax_config()
def evaluate(
    teacher: Model,
    student: Model,
    prompts: Sequence[str],
    world: World,
    plan: EvaluationConfig,
    known: dict[str, tuple] | None = None,
) -> Evaluation:
    """Draw P prompts from S noises each in three ways, and compare.

    The rows are the teacher, the teacher in as few steps as the student, and the student. Prompt p
    of seed s starts from initial_noise(s, P)[p]. A bar on a terminal counts network evaluations.
    known: filled with what was drawn of the teacher's rows, which a later call that differs in the
      student alone, of as many steps, takes from there.
    Raises: InputError, before anything is drawn, for a plan, prompts or pipelines that do not go
      together; and for pictures that are not finite.
    """
    few = replace(teacher.sampling, steps=student.sampling.steps, timesteps=None)
    models = {"teacher": teacher, "teacher_few": replace(teacher, sampling=few), "student": student}
    _check(models, prompts, world, plan)

    library, moves, wishes = None, 0, None
    if plan.library and world.oracle and world.captions:
        library = make_library(world, plan.library, teacher.pipeline.latent)
        moves = min(plan.moves, plan.library) if world.layout else 0
    sets = _sets(prompts, teacher.pipeline.latent, plan)
    # The teacher also draws the seeds to which the distance of every row, its own too, is taken;
    # last, so that what they share stands at the same places of the batches.
    more = {"others": sets.pop("others")}
    sets |= library.sets() if library else {}
    sets = {key: sets | more if key == "teacher" and world.extractor else sets for key in models}
    known = {} if known is None else known
    work = 0
    for key, model in models.items():
        if key in known:
            continue
        pictures = sum(len(texts) for texts, _ in sets[key].values()) + MOVE_COST * moves
        work += (pictures + 2 * plan.tangents * len(prompts)) * model.evaluations

    drawn, others, controlled = {}, None, {}
    with tqdm(total=work, unit="evaluation", unit_scale=True, disable=None) as bar:
        for key, model in models.items():
            if key in known:
                drawn[key], others, controlled[key], wishes = known[key]
                continue
            images = draw_sets(model, sets[key], plan.batch, bar)
            drawn[key] = _read(images, _tangents(model, prompts, plan, bar), plan.seeds, world)
            if "others" in images:
                others = _features(world, _by_prompt(images["others"], plan.seeds))
            if library:
                controlled[key] = classify_library(library, images)
            if moves:
                # The teacher, which comes first, decides what a move is for everyone.
                wishes = wishes or choose_targets(library, controlled["teacher"].words_CLA, moves)
                moved = optimize_noise(model, library, wishes, controlled[key], plan.batch, bar)
                controlled[key] = replace(controlled[key], moved=moved)
            if key != "student":
                known[key] = drawn[key], others, controlled.get(key), wishes
    control = ControlResults(library, wishes, controlled) if library else None
    return _evaluation(models, drawn, others, prompts, world, control)


def _evaluation(
    models: dict[str, Model],
    drawn: dict[str, ModelOutputs],
    others: np.ndarray | None,
    prompts: Sequence[str],
    world: World,
    control: ControlResults | None,
) -> Evaluation:
    listed, rows = catalogue(world), []
    for key, model in models.items():
        found = row_metrics(drawn[key], drawn["teacher"], others, prompts, world)
        found |= control_metrics(control, key) if control else {}
        metrics = {name: found[name] for name in listed if name in found}
        label = f"{key.split('_')[0]}, {model.sampling.steps} steps"
        images = drawn[key].images_PSHWC
        rows.append(Row(key, label, model.sampling, model.evaluations, images, metrics))
    taken = {name for row in rows for name in row.metrics}
    absent = absent_metrics(drawn["teacher"], prompts, world)
    absent |= absent_control(control, taken, world)
    return Evaluation(rows, listed, absent, control)


def _check(
    models: dict[str, Model], prompts: Sequence[str], world: World, plan: EvaluationConfig
) -> None:
    for name, least in LEAST.items():
        if getattr(plan, name) < least:
            raise InputError(f"{name}: found {getattr(plan, name)}; expected {least} or more")
    if plan.library == 1:
        raise InputError("library: found 1 noise; expected 2 or more, or 0 for none")
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
    for prompt in prompts if world.oracle else ():
        try:
            world.oracle.parse(prompt)
        except InputError as error:
            raise InputError(f"prompts: {error} (or world none)") from None


def _sets(
    prompts: Sequence[str], latent: tuple[int, int, int], plan: EvaluationConfig
) -> dict[str, tuple[list[str], np.ndarray]]:
    """Every prompt at its seeds and at the `others` after them, and the first prompts `near` their
    own seeds: z -> sqrt(1 - r^2) z + r n. Seed by seed."""
    first, count = list(prompts[:NEAR]), len(prompts)

    def noises(start, count):
        return np.concatenate([initial_noise(start + s, count, latent) for s in range(plan.seeds)])

    # New noise of seeds that are neither drawn from nor directions of tangents.
    new = noises(2 * plan.seeds + plan.tangents, len(first))
    near = (1 - NEAR_SHARE**2) ** 0.5 * noises(0, len(first)) + NEAR_SHARE * new
    every = [*prompts] * plan.seeds
    return {
        "own": (every, noises(0, count)),
        "others": (every, noises(plan.seeds, count)),
        "near": (first * plan.seeds, near),
    }


def _read(
    images: dict[str, np.ndarray], tangents: np.ndarray | None, seeds: int, world: World
) -> ModelOutputs:
    own, near = (_by_prompt(images[name], seeds) for name in ("own", "near"))
    words = world.oracle and world.oracle.classify(merge_leading_axes(own)).reshape(
        *own.shape[:2], -1
    )
    return ModelOutputs(own, _features(world, own), tangents, words, near, _features(world, near))


def _by_prompt(images: np.ndarray, seeds: int) -> np.ndarray:
    """[S P, ...] drawn seed by seed -> [P, S, ...]."""
    return images.reshape(seeds, -1, *images.shape[1:]).swapaxes(0, 1)


def _features(world: World, images_PSHWC: np.ndarray) -> np.ndarray | None:
    if world.extractor is None:
        return None
    return world.extractor(merge_leading_axes(images_PSHWC)).reshape(*images_PSHWC.shape[:2], -1)


def _tangents(
    model: Model, prompts: Sequence[str], plan: EvaluationConfig, bar: tqdm
) -> np.ndarray | None:
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
