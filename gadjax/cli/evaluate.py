"""Compare a student with its teacher: report.json, report.md and pictures."""

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARKER = "report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="pipeline folder, or asset:NAME")
    parser.add_argument("--student", required=True, help="pipeline folder, workdir, or asset:NAME")
    parser.add_argument(
        "--student-teacher", help="of a student that is a workdir, if it has moved since its run"
    )
    parser.add_argument("--prompts", required=True, help=".txt, .jsonl or .csv, or asset:NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--seeds", type=int, default=8, help="pictures of each prompt")
    parser.add_argument("--tangents", type=int, default=1, help="noise directions of each prompt")
    parser.add_argument(
        "--library", type=int, default=64, help="noises for the tasks of noise control, 0 for none"
    )
    parser.add_argument(
        "--moves", type=int, default=32, help="of a shape by its noise, one a noise of the library"
    )
    parser.add_argument("--teacher-steps", type=int, help="instead of those of its gadjax.json")
    parser.add_argument(
        "--teacher-guidance",
        type=float,
        help="by default what the student was distilled at, where that is known",
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time")
    parser.add_argument("--dtype", default="float32", help="of the networks: float32 or bfloat16")
    parser.add_argument(
        "--world", help="who judges: shapes, or none; by default what the teacher's folder says"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    parser.add_argument("--json", action="store_true", help="print report.json, not report.md")


def run(args: argparse.Namespace) -> int:
    from gadjax.assets import resolve
    from gadjax.data.prompts import read_prompts
    from gadjax.evaluation.evaluate import EvaluationConfig, evaluate
    from gadjax.evaluation.report import as_dict, as_markdown, write_report
    from gadjax.io.atomic import atomic_folder, check_target

    check_target(args.out, overwrite=args.overwrite, marker=MARKER)
    prompts = read_prompts(resolve(args.prompts))
    name, world = _world(args.world, resolve(args.teacher))
    student = _model("--student", args.student, args.dtype, {}, args.student_teacher)
    distilled_at = _distilled_at(student, args.student)
    guidance = distilled_at if args.teacher_guidance is None else args.teacher_guidance
    changes = {"steps": args.teacher_steps, "guidance": guidance}
    teacher = _model("--teacher", args.teacher, args.dtype, changes)
    plan = EvaluationConfig(args.seeds, args.tangents, args.batch, args.library, args.moves)
    evaluation = evaluate(teacher, student, prompts, world, plan)
    judged_at = _judged_at(teacher.sampling.guidance, distilled_at)
    if distilled_at not in (None, teacher.sampling.guidance):
        print(f"gadjax: the teacher is judged at guidance {judged_at}", file=sys.stderr)
    settings = {
        "teacher": args.teacher,
        "student": args.student,
        "teacher's guidance": judged_at,
        "prompts": f"{args.prompts} ({len(prompts)})",
        "seeds": plan.seeds,
        "tangents": plan.tangents,
        "library": plan.library,
        "moves": plan.moves,
        "world": name,
        "dtype": args.dtype,
        **_made_by(teacher, student),
    }
    with atomic_folder(args.out, overwrite=args.overwrite, marker=MARKER) as folder:
        write_report(folder, evaluation, prompts, settings)
    if args.json:
        print(json.dumps(as_dict(evaluation, settings)))
    else:
        print(as_markdown(evaluation, settings), end="")
    return 0


def _distilled_at(student, name: str) -> float | None:
    """The teacher's guidance in the student's training; None where nothing says it."""
    from gadjax.assets import resolve
    from gadjax.formats.sampling_config import read_teacher_guidance
    from gadjax.io.storage import is_remote

    if student.trained:
        return student.trained.config["guidance"] if student.trained.is_few_step else None
    return None if is_remote(name) else read_teacher_guidance(resolve(name))


def _judged_at(guidance: float, distilled_at: float | None) -> str:
    if distilled_at is None:
        return f"{guidance:g} (the student does not say at which it was distilled)"
    if guidance != distilled_at:
        return f"{guidance:g}, but the student was distilled at {distilled_at:g}"
    return f"{guidance:g}, at which the student was distilled"


def _world(name: str | None, teacher: Path):
    from gadjax.errors import InputError
    from gadjax.evaluation.oracles import WORLDS
    from gadjax.formats.sampling_config import GADJAX_JSON, read_world

    where = "--world"
    if name is None:
        name, where = read_world(teacher) or "none", f"{teacher / GADJAX_JSON}, world"
    if name not in WORLDS:
        raise InputError(f"{where}: found {name!r}; expected one of {', '.join(WORLDS)}")
    return name, WORLDS[name]


def _model(flag: str, name: str, dtype: str, changes: dict[str, Any], moved: str | None = None):
    """changes: of how the folder says it is sampled, None for none. moved: a workdir's teacher."""
    from gadjax.api import load

    model = load(name, dtype=dtype, teacher=moved)
    changes = {key: value for key, value in changes.items() if value is not None}
    if "steps" in changes:
        changes["timesteps"] = None
    sampling = replace(model.sampling, **changes)
    return replace(model, name=f"{flag} {name}", sampling=sampling)


def _made_by(teacher, student) -> dict[str, Any]:
    """What a number can be traced back to: weights, program, machine."""
    import jax

    models = {"teacher": teacher, "student": student}
    found = {f"{name}'s {m.pipeline.backbone}": m.fingerprint for name, m in models.items()}
    device = jax.devices()[0].device_kind
    return {**found, "gadjax": version("gadjax"), "jax": jax.__version__, "device": device}
