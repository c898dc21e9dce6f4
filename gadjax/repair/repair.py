"""Repair: training of adapters on a distilled student, and what they bring back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ml_collections import ConfigDict

from gadjax import assets
from gadjax.api import load
from gadjax.data.prompts import read_prompts
from gadjax.errors import InputError
from gadjax.evaluation.oracles import WORLDS
from gadjax.evaluation.results import EvaluationConfig
from gadjax.formats.model_card import CARD
from gadjax.formats.sampling_config import read_world
from gadjax.io.atomic import check_no_overlap
from gadjax.io.storage import write_atomic
from gadjax.pipelines.adapted import adapted_model
from gadjax.repair.comparison import (
    REPORT,
    SCALES,
    compare,
    table,
    write_comparison,
    write_scales,
)
from gadjax.repair.patient import Patient, open_patient
from gadjax.training.config import read_config
from gadjax.training.export_lora import export_lora
from gadjax.training.loop import train
from gadjax.training.workdir import read_trained

BEFORE, AFTER = "student before", "student after"


@dataclass(frozen=True)
class Request:
    """A repair as it is asked for.

    Attributes:
      teacher: pipeline folder.
      student: pipeline folder, workdir, or LoRA of the teacher.
      prompts: file of training prompts.
      out: folder of the repair; an earlier one is continued.
      updates: training steps; None: the config's.
      test_prompts: file of the comparison's prompts; None: the first `count` training prompts.
      count: prompts of the comparison, at most.
      evaluation: sizes of the comparison.
      changes: flags --config.a.b=value.
      student_preset: published student that `student` is, where its folder does not say.
    """

    teacher: str
    student: str
    prompts: str
    out: Path
    updates: int | None
    test_prompts: str | None
    count: int
    evaluation: EvaluationConfig
    changes: Sequence[str]
    student_preset: str | None = None


def repair(request: Request) -> str:
    """Repair a student: train adapters on it, export them, compare before and after.

    Returns: the table of the comparison, in Markdown.
    Raises: InputError for bad input, before any training; RunStopped as `train` and `export_lora`.
    """
    out, teacher = request.out, assets.resolve(request.teacher)
    check_no_overlap(out, teacher, assets.resolve(request.student))
    if out.exists() and any(out.iterdir()) and not (out / "train").exists():
        raise InputError(f"{out}: found files; expected a new folder, or that of a repair")
    prompts = read_prompts(assets.resolve(request.test_prompts or request.prompts))
    patient = open_patient(request.student, teacher, out / "student", request.student_preset)
    config = repair_config(request, patient)
    train(config, out / "train")
    trained = read_trained(out / "train")
    if not (out / "lora").exists():
        export_lora(trained, out / "lora")
    reference = load(str(teacher))
    reference = replace(reference, sampling=replace(reference.sampling, guidance=config.guidance))
    students = {BEFORE: load(str(patient.folder)), AFTER: load(str(out / "train"))}
    students[AFTER] = replace(students[AFTER], sampling=students[BEFORE].sampling)
    world, some = WORLDS[read_world(teacher) or "none"], prompts[: request.count]
    evaluation, rows = compare(reference, students, some, world, request.evaluation)
    facts = {
        "teacher": f"{teacher.name}, guidance {config.guidance:g}",
        "student": Path(request.student).name,
        "updates": config.steps,
        "samples an update": config.batch,
        "rank": config.student.lora.rank,
        "objective": ", ".join(
            f"{options.get('weight', 1.0):g} {name}"
            for name, options in config.objective.items()
            if options.get("weight", 1.0)
        ),
        "prompts and seeds": f"{len(some)} x {request.evaluation.seeds}",
    }
    lora = out / "lora"
    models = {scale: adapted_model(patient.folder, [(lora, scale)]) for scale in SCALES}
    models = {k: replace(m, sampling=patient.sampling) for k, m in models.items()}
    write_scales(out, models, some)
    text = table(evaluation, rows)
    _add_to_card(lora / CARD, text)
    write_comparison(out, evaluation, rows, some, facts)
    return text


def is_done(out: Path) -> bool:
    """True for the folder of a finished repair."""
    return (out / REPORT).is_file()


def repair_config(request: Request, patient: Patient) -> ConfigDict:
    """Training config of a repair: the bundled config `repair`, the student's own steps, and the
    request's changes.

    Raises: InputError as `read_config`.
    """
    config = read_config([f"--config=repair:{patient.rollout}", *request.changes])
    changed = {change.split("=")[0].removeprefix("--config.") for change in request.changes}
    config.teacher, config.data.prompts = request.teacher, request.prompts
    config.data.length = patient.sampling.length
    config.student.update(
        init=str(patient.folder),
        steps=len(patient.times),
        timesteps=patient.times,
        rollout=patient.rollout,
        guidance=patient.embedded,
    )
    if request.updates is not None:
        config.steps = request.updates
    if "optim.decay" not in changed:
        config.optim.decay = config.steps
    if "optim.warmup" not in changed:
        config.optim.warmup = min(config.optim.warmup, config.steps // 10)
    if "guidance" not in changed:
        config.guidance = patient.guidance
    return config


def _add_to_card(path: Path, text: str) -> None:
    """Add the comparison to a LoRA's model card, once."""
    heading = "\n## Before and after\n"
    card = path.read_text(encoding="utf-8").partition(heading)[0]
    write_atomic(path, f"{card.rstrip()}\n{heading}\n{text}")
