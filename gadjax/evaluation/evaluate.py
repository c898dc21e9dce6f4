"""Evaluation of students against their teacher: sample all and take every metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from gadjax.errors import InputError
from gadjax.evaluation.draw import draw_sets, map_pictures, reduction
from gadjax.evaluation.learned import LearnedOutputs, Observer
from gadjax.evaluation.learned_metrics import absent_learned, learned_catalogue, learned_metrics
from gadjax.evaluation.metric_catalogue import NEAR, NEAR_SHARE, Metric, catalogue
from gadjax.evaluation.metrics import ModelOutputs, absent_metrics, differences, row_metrics
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
from gadjax.evaluation.strips import as_strips, strip_prompts, strip_set
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.model import Model
from gadjax.pipelines.sampling import BATCH, initial_noise, sampler_and_times
from gadjax.runtime.settings import pinned_jax_config

MINIMUMS = {"seeds": 2, "tangents": 0, "batch": 1, "library": 0, "moves": 0, "strips": 0}


@dataclass(frozen=True)
class EvaluationConfig:
    """Sizes of an evaluation.

    seeds: pictures of each prompt.
    tangents: noise directions for each prompt, each at a seed of its own; 0 omits noise
      sensitivity.
    batch: pictures at a time.
    library: noises for the noise-control tasks, where the world has them; 0 omits these.
    moves: layout targets (a shape moved by its noise), at most one for each noise of the library.
    strips: prompts that are also drawn along a path between two noises and along a direction.
    shared_noise: let all prompts start from the same noise of a seed, the first one's, for the
      seed probe of named extractors.
    """

    seeds: int = 8
    tangents: int = 1
    batch: int = BATCH
    library: int = 64
    moves: int = 32
    strips: int = 4
    shared_noise: bool = False


@dataclass(frozen=True)
class Row:
    """Pictures (uint8) and metrics of one model.

    images_PSHWC: seed s of prompt p has the same noise in every row.
    evaluations: network evaluations for one picture.
    differences_P: difference from the teacher for each prompt (`relative_difference`).
    strips_KMNHWC: pictures of the K prompts in `Evaluation.strips` (`gadjax.evaluation.strips`).
    """

    key: str
    label: str
    sampling: SamplingConfig
    evaluations: int
    images_PSHWC: np.ndarray
    metrics: dict[str, Estimate]
    differences_P: np.ndarray | None = None
    strips_KMNHWC: np.ndarray | None = None


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation: rows, metrics and noise-control pictures.

    rows: the teacher, the teacher in the students' numbers of steps, the students.
    catalogue: every metric of the world, in the order of the report.
    absent: metric that could not be taken -> reason.
    control: None where the world has no noise-control tasks or none were asked for.
    strips: indices of the prompts that have strips.
    """

    rows: list[Row]
    catalogue: dict[str, Metric]
    absent: dict[str, str]
    control: ControlResults | None = None
    strips: Sequence[int] = ()


@pinned_jax_config()
def evaluate(
    teacher: Model,
    students: Model | Mapping[str, Model],
    prompts: Sequence[str],
    world: World,
    config: EvaluationConfig,
    cache: dict[str, tuple] | None = None,
) -> Evaluation:
    """Sample P prompts from S noises each with teacher and students, and compare.

    The rows are the teacher, the teacher in as few steps as the students, and the students. Prompt
    p of seed s starts from initial_noise(s, P)[p]. A bar on a terminal counts network evaluations.

    Args:
      teacher: the reference model, in its own number of steps.
      students: the evaluated model, or several by their labels.
      prompts: P prompts, which the world's oracle can parse.
      world: oracle, feature extractor and layout task; any may be absent.
      config: numbers of seeds, tangents, noises and layout targets.
      cache: filled with the teacher's rows, which a later call takes from it. That call may differ
        in the students alone, which have as many steps.
    Raises: InputError, before anything is sampled, for a config, prompts or pipelines that do not
      go together; and for pictures that are not finite.
    """
    labelled = _rows(teacher, students)
    models = {key: model for key, (_, model) in labelled.items()}
    _check(models, prompts, world, config)

    library, moves, targets = None, 0, None
    if config.library and world.oracle and world.captions:
        library = make_library(world, config.library, teacher.pipeline.latent)
        moves = min(config.moves, config.library) if world.layout else 0
    sets = _sets(prompts, teacher.pipeline.latent, config)
    # The teacher also draws the seeds to which the Fréchet distance of every row, its own too, is
    # taken; last, so that the shared pictures have the same positions in their batches.
    more = {"others": sets.pop("others")}
    sets |= library.sets() if library else {}
    refers = world.extractor or world.features
    sets = {key: sets | more if key == "teacher" and refers else sets for key in models}
    cache = {} if cache is None else cache
    extra = MOVE_COST * moves + 2 * config.tangents * len(prompts)
    work = sum(
        (sum(len(texts) for texts, _ in sets[key].values()) + extra) * model.evaluations
        for key, model in models.items()
        if key not in cache
    )
    outputs, others, controlled = {}, None, {}
    with tqdm(total=work, unit="evaluation", unit_scale=True, disable=None) as bar:
        for key, model in models.items():
            if key in cache:
                outputs[key], others, controlled[key], targets = cache[key]
                continue
            observer = Observer(world, sets[key], config.seeds, config.shared_noise)
            factor = _reduction(models, len(prompts) * config.seeds, world)
            images = draw_sets(model, sets[key], config.batch, bar, observer, factor)
            tangents = _tangents(model, prompts, config, bar)
            outputs[key] = _measure(images, tangents, config.seeds, world, observer.outputs())
            if "others" in images:
                others = _features(world, _by_prompt(images["others"], config.seeds))
            if library:
                controlled[key] = classify_library(library, images)
            if moves:
                # The teacher, which comes first, determines the targets of all models.
                targets = targets or choose_targets(library, controlled["teacher"].words_CLA, moves)
                layout_result = optimize_noise(
                    model, library, targets, controlled[key], config.batch, bar
                )
                controlled[key] = replace(controlled[key], layout_result=layout_result)
            if key.startswith("teacher"):
                cache[key] = outputs[key], others, controlled.get(key), targets
    control = ControlResults(library, targets, controlled) if library else None
    evaluation = _evaluation(labelled, outputs, others, control, prompts, world)
    shown = strip_prompts(len(prompts), config.strips) if config.strips else ()
    return replace(evaluation, strips=shown)


def _evaluation(
    labelled: dict[str, tuple[str, Model]],
    outputs: dict[str, ModelOutputs],
    others: np.ndarray | None,
    control: ControlResults | None,
    prompts: Sequence[str],
    world: World,
) -> Evaluation:
    first, learned = outputs["teacher"], outputs["teacher"].learned
    named = learned_catalogue(world, first.images_PSHWC.shape[1], learned.low_pass_PSD is not None)
    listed, rows = catalogue(world) | named, []
    for key, (label, model) in labelled.items():
        row = outputs[key]
        taken = row_metrics(row, first, others, prompts, world)
        taken |= control_metrics(control, key) if control else {}
        taken |= learned_metrics(row.learned, learned, world)
        metrics = {name: taken[name] for name in listed if name in taken}
        facts = label, model.sampling, model.evaluations, row.images_PSHWC, metrics
        apart = None if row is first else differences(row, first)
        rows.append(Row(key, *facts, apart, row.strips_KMNHWC))
    names = {name for row in rows for name in row.metrics}
    absent = absent_metrics(first, prompts, world) | absent_control(control, names, world)
    absent |= absent_learned(named, names, learned)
    return Evaluation(rows, listed, absent, control)


def _rows(teacher: Model, students: Model | Mapping[str, Model]) -> dict[str, tuple[str, Model]]:
    """Labels and models of the rows by key.

    Keys: "teacher"; "teacher_few" for the first student's number of steps, "teacher_few_N" for
    another N; "student", "student_2" and so on.
    """
    students = {"student": students} if isinstance(students, Model) else students
    rows = {"teacher": ("teacher", teacher)}
    for steps in dict.fromkeys(model.sampling.steps for model in students.values()):
        key = "teacher_few" if len(rows) == 1 else f"teacher_few_{steps}"
        few = replace(teacher.sampling, steps=steps, timesteps=None)
        rows[key] = "teacher", replace(teacher, sampling=few)
    for number, (label, model) in enumerate(students.items(), 1):
        rows["student" if number == 1 else f"student_{number}"] = label, model
    return {
        key: (f"{label}, {model.sampling.steps} steps", model)
        for key, (label, model) in rows.items()
    }


def _check(
    models: dict[str, Model], prompts: Sequence[str], world: World, config: EvaluationConfig
) -> None:
    for name, minimum in MINIMUMS.items():
        if getattr(config, name) < minimum:
            raise InputError(f"{name}: found {getattr(config, name)}; expected {minimum} or more")
    if config.library == 1:
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
    prompts: Sequence[str], latent: tuple[int, int, int], config: EvaluationConfig
) -> dict[str, tuple[list[str], np.ndarray]]:
    """Prompts and noises to sample, seed by seed, by name.

    "own": every prompt at the evaluated seeds. "others": every prompt at as many later seeds.
    "near": the first prompts at perturbed seeds, z -> sqrt(1 - r^2) z + r n. "strips": some prompts
    along ways between and from their noises.

    Args:
      prompts: P prompts.
      latent: shape (H, W, C) of a noise.
      config: numbers of seeds and tangents.
    """
    first, count = list(prompts[:NEAR]), len(prompts)

    def noises(start, count):
        drawn = 1 if config.shared_noise else count
        return np.concatenate(
            [
                np.broadcast_to(initial_noise(start + s, drawn, latent), (count, *latent))
                for s in range(config.seeds)
            ]
        )

    # New noise of seeds that are neither drawn from nor directions of tangents.
    new = noises(2 * config.seeds + config.tangents, len(first))
    near = (1 - NEAR_SHARE**2) ** 0.5 * noises(0, len(first)) + NEAR_SHARE * new
    prompts_by_seed = [*prompts] * config.seeds
    sets = {
        "own": (prompts_by_seed, noises(0, count)),
        "others": (prompts_by_seed, noises(config.seeds, count)),
        "near": (first * config.seeds, near),
    }
    if config.strips:
        shown = strip_prompts(count, config.strips)
        sets["strips"] = strip_set(prompts, shown, latent, 2 * config.seeds)
    return sets


def _measure(
    images: dict[str, np.ndarray],
    tangents: np.ndarray | None,
    seeds: int,
    world: World,
    learned: LearnedOutputs,
) -> ModelOutputs:
    images_PSHWC, near = (_by_prompt(images[name], seeds) for name in ("own", "near"))
    words = world.oracle and map_pictures(world.oracle.classify, images_PSHWC)
    features, near_features = _features(world, images_PSHWC), _features(world, near)
    strips = as_strips(images["strips"]) if "strips" in images else None
    of_near = near, near_features, strips
    return ModelOutputs(images_PSHWC, features, tangents, words, *of_near, learned)


def _reduction(models: dict[str, Model], count: int, world: World) -> int:
    """Factor by which pictures are reduced that stay in memory; 1 where the world reads them."""
    pipeline = models["teacher"].pipeline
    height, width = (pipeline.upscale * side for side in pipeline.latent[:2])
    reads = world.oracle or world.extractor
    return 1 if reads else reduction(count * len(models), height, width)


def _by_prompt(images: np.ndarray, seeds: int) -> np.ndarray:
    """Reorder pictures [S P, ...], sampled seed by seed, to [P, S, ...]."""
    return images.reshape(seeds, -1, *images.shape[1:]).swapaxes(0, 1)


def _features(world: World, images_PSHWC: np.ndarray) -> np.ndarray | None:
    return world.extractor and map_pictures(world.extractor, images_PSHWC)


def _tangents(
    model: Model, prompts: Sequence[str], config: EvaluationConfig, bar: tqdm
) -> np.ndarray | None:
    """Tangents J v [T, P, H, W, C] of each prompt's map from noise to x0.

    Args:
      model: the model whose map is differentiated.
      prompts: P prompts.
      config: T = config.tangents; None is returned for 0.
      bar: progress in network evaluations.
    """
    if not config.tangents:
        return None
    count, latent = len(prompts), model.pipeline.latent
    # Directions are noise too, of seeds from which no picture is drawn.
    first = 2 * config.seeds
    z, v = (
        np.concatenate([initial_noise(start + i, count, latent) for i in range(config.tangents)])
        for start in (0, first)
    )
    tangents = map_tangents(
        model,
        [*prompts] * config.tangents,
        z,
        v,
        batch=config.batch,
        progress=lambda done: bar.update(2 * done * model.evaluations),
    )
    return tangents.reshape(config.tangents, count, *latent)
