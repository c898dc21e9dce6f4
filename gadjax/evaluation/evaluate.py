"""Evaluation of students against their teacher: sample all and take every metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from gadjax.evaluation.draw import draw_sets, map_pictures, reduction
from gadjax.evaluation.learned import LearnedOutputs, Observer
from gadjax.evaluation.learned_metrics import absent_learned, learned_catalogue, learned_metrics
from gadjax.evaluation.metric_catalogue import catalogue
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
from gadjax.evaluation.noise_sets import evaluation_sets
from gadjax.evaluation.noises import SeedNoises, Sets
from gadjax.evaluation.oracles import World
from gadjax.evaluation.results import Evaluation, EvaluationConfig, Row
from gadjax.evaluation.rows import check_rows, label_rows
from gadjax.evaluation.sensitivity import map_tangents
from gadjax.evaluation.strips import as_strips, strip_prompts
from gadjax.pipelines.model import Model
from gadjax.runtime.settings import pinned_jax_config


@dataclass(frozen=True)
class Plan:
    """Parts of an evaluation that all rows share.

    factors: see `draw_sets`.
    """

    prompts: Sequence[str]
    world: World
    config: EvaluationConfig
    factors: Mapping[str, int]


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
    labelled = label_rows(teacher, students)
    models = {key: model for key, (_, model) in labelled.items()}
    check_rows(models, prompts, world, config)

    library, moves, targets = None, 0, None
    if config.library and world.oracle and world.captions:
        library = make_library(world, config.library, teacher.pipeline.latent)
        moves = min(config.moves, config.library) if world.layout else 0
    sets = dict(evaluation_sets(prompts, teacher.pipeline.latent, config))
    # The teacher also draws the seeds to which the Fréchet distance of every row, its own too, is
    # taken; last, so that the shared pictures have the same positions in their batches.
    more = {"others": sets.pop("others")}
    sets |= library.sets() if library else {}
    refers = world.extractor or world.features
    sets = {key: sets | more if key == "teacher" and refers else sets for key in models}
    plan = Plan(prompts, world, config, _factors(models, sets, world))
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
            outputs[key], images = _draw_row(model, sets[key], plan, bar)
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
    evaluation = _evaluation(labelled, outputs, others, control, plan)
    shown = strip_prompts(len(prompts), config.strips) if config.strips else ()
    return replace(evaluation, strips=shown)


def _draw_row(
    model: Model, sets: Sets, plan: Plan, bar: tqdm
) -> tuple[ModelOutputs, dict[str, np.ndarray]]:
    """Outputs of a model, and the pictures of all its sets that are kept."""
    world, config = plan.world, plan.config
    observer = Observer(world, sets, config.seeds, config.shared_noise)
    images = draw_sets(model, sets, config.batch, bar, observer, plan.factors)
    tangents = _tangents(model, plan.prompts, config, bar)
    return _measure(images, tangents, config.seeds, world, observer.outputs()), images


def _evaluation(
    labelled: dict[str, tuple[str, Model]],
    outputs: dict[str, ModelOutputs],
    others: np.ndarray | None,
    control: ControlResults | None,
    plan: Plan,
) -> Evaluation:
    world, prompts = plan.world, plan.prompts
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


def _factors(models: Mapping[str, Model], sets: Mapping[str, Sets], world: World) -> dict[str, int]:
    """Factor by which the pictures of each set are reduced that stay in memory; 1 where the world
    reads them. Of "others" the named extractors read all that they need as they are drawn."""
    names = {name for row in sets.values() for name in row}
    if not world.extractor:
        names.discard("others")
    pipeline = models["teacher"].pipeline
    height, width = (pipeline.upscale * side for side in pipeline.latent[:2])
    count = sum(len(row[name][0]) for row in sets.values() for name in names & row.keys())
    reads = world.oracle or world.extractor
    return dict.fromkeys(names, 1 if reads else reduction(count, height, width))


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
    z, v = (SeedNoises(first, config.tangents, count, latent) for first in (0, 2 * config.seeds))
    tangents = map_tangents(
        model,
        [*prompts] * config.tangents,
        z,
        v,
        batch=config.batch,
        progress=lambda done: bar.update(2 * done * model.evaluations),
    )
    return tangents.reshape(config.tangents, count, *latent)
