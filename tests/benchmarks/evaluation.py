"""Cost of `gadjax evaluate` beside the drawing of the same pictures."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import jax
from benchmarks.common import Figure, clock
from tqdm import tqdm

from gadjax.api import Model, load, with_sampling
from gadjax.assets import resolve
from gadjax.data.prompts import read_prompts
from gadjax.evaluation import evaluate as module
from gadjax.evaluation.draw import draw_sets
from gadjax.evaluation.noise_control import make_library
from gadjax.evaluation.noise_sets import evaluation_sets
from gadjax.evaluation.noises import Sets
from gadjax.evaluation.oracles import WORLDS
from gadjax.evaluation.results import EvaluationConfig
from gadjax.evaluation.rows import label_rows
from gadjax.pipelines.sampling import _programs

STEPS = 4  # of a student
SAMPLERS = "draw_sets", "map_tangents", "optimize_noise"  # of evaluate: what runs the networks


def evaluation(count: int, prompts: int, seeds: int, library: int, moves: int) -> Iterator[Figure]:
    """An evaluation of `count` students of the bundled world beside the drawing of its pictures,
    each in a process that has compiled nothing: by default, with layout control, and by pictures
    alone.

    Drawing is that of every picture of which the report has a metric or which it shows, each once,
    but those on the way of layout control, whose noises are its result.
    """
    teacher = load("asset:shapes_teacher")
    students = {str(n): student(teacher, n) for n in range(count)}
    texts = read_prompts(resolve("asset:shapes_test_prompts.txt"))[:prompts]
    note = f"{count} students in {STEPS} steps, {prompts} prompts x {seeds} seeds"
    for name, config in (
        ("default", EvaluationConfig(seeds, library=library)),
        ("with layout control", EvaluationConfig(seeds, library=library, moves=moves)),
        ("pictures alone", EvaluationConfig(seeds, 0, library=0)),
    ):
        forget_programs()
        begin = clock()()
        draw_all(teacher, students, texts, config)
        drawing = clock()() - begin
        yield Figure(f"seconds of drawing, {name}", drawing, note=note)
        own, drawn = network_evaluations(teacher, students, texts, config)
        yield Figure(
            f"evaluations of drawing / of prompts x seeds of each row, {name}", drawn / own
        )
        forget_programs()
        parts: dict[str, float] = {}
        begin = clock()()
        with ExitStack() as stack:
            for sampler in SAMPLERS:
                stack.enter_context(timed(sampler, parts))
            module.evaluate(teacher, students, texts, WORLDS["shapes"], config)
        total = clock()() - begin
        for sampler, seconds in parts.items():
            yield Figure(f"seconds of {sampler}, {name}", seconds)
        yield Figure(f"seconds of evaluation, {name}", total)
        yield Figure(f"evaluation / its samplers, {name}", total / sum(parts.values()), most=1.5)
        aim = None if name == "with layout control" else 1.5
        yield Figure(f"evaluation / drawing, {name}", total / drawing, most=aim)


def forget_programs() -> None:
    """Forget what this process has compiled."""
    jax.clear_caches()
    _programs.clear()


def student(teacher: Model, number: int) -> Model:
    """The teacher with other weights, in few steps without guidance."""
    few = with_sampling(teacher, STEPS, 1.0)
    backbone = teacher.pipeline.backbone
    changed = jax.tree.map(lambda x: x * (1 + 0.01 * number), teacher.params[backbone])
    return replace(few, params=teacher.params | {backbone: changed})


def draw_all(teacher: Model, students: dict, texts: list[str], config: EvaluationConfig) -> None:
    """Draw the pictures of an evaluation, and drop them."""
    for model, sets in rows(teacher, students, texts, config):
        draw_sets(model, sets, config.batch, tqdm(disable=True), lambda start, images: None, {})


def network_evaluations(
    teacher: Model, students: dict, texts: list[str], config: EvaluationConfig
) -> tuple[int, int]:
    """Network evaluations for the pictures of all rows, and for all sets that are drawn."""
    own = drawn = 0
    for model, sets in rows(teacher, students, texts, config):
        own += model.evaluations * len(sets["own"][0])
        drawn += model.evaluations * sum(len(prompts) for prompts, _ in sets.values())
    return own, drawn


def rows(
    teacher: Model, students: dict, texts: list[str], config: EvaluationConfig
) -> Iterator[tuple[Model, Sets]]:
    """Models of an evaluation, and what each draws."""
    latent = teacher.pipeline.latent
    sets = dict(evaluation_sets(texts, latent, config))
    if config.library:
        sets |= make_library(WORLDS["shapes"], config.library, latent).sets()
    for key, (_, model) in label_rows(teacher, students).items():
        yield model, {k: v for k, v in sets.items() if k != "others" or key == "teacher"}


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Context in which the time of a function of `gadjax.evaluation.evaluate` is added up."""
    original: Callable = getattr(module, name)

    def run(*args, **kwargs):
        begin = clock()()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + clock()() - begin

    with patch.object(module, name, run):
        yield
