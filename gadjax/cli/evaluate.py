"""Compare students with their teacher: report.html, report.json, report.md and images."""

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gadjax.cli.students import (
    OfStudent,
    describe_students,
    distillation_guidance,
    label_students,
)

MARKER = "report.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from gadjax.cli.output import add_lora_argument

    parser.add_argument("--teacher", required=True, help="pipeline folder, or asset:NAME")
    parser.add_argument(
        "--student",
        action=OfStudent,
        default=[],
        required=True,
        help="pipeline folder, workdir, or asset:NAME; may be repeated, each followed by its own "
        "--student-teacher, --student-preset and --lora",
    )
    parser.add_argument(
        "--student-teacher",
        action=OfStudent,
        default=[],
        help="of a student that is a workdir, if it has moved since its run",
    )
    parser.add_argument(
        "--student-preset",
        action=OfStudent,
        default=[],
        help="sampling settings of a published student, if the folder has none (gadjax sample)",
    )
    add_lora_argument(parser, "student", OfStudent)
    parser.add_argument("--prompts", required=True, help=".txt, .jsonl or .csv, or asset:NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--seeds", type=int, default=8, help="images per prompt")
    parser.add_argument("--tangents", type=int, default=1, help="noise directions per prompt")
    parser.add_argument(
        "--library", type=int, default=64, help="noises of the noise-control tasks, 0 for none"
    )
    parser.add_argument(
        "--moves",
        type=int,
        default=0,
        help="tasks of moving a shape by its noise, at most one per noise of the library: layout "
        "control, which takes longer than all else together",
    )
    parser.add_argument("--teacher-steps", type=int, help="instead of those of its gadjax.json")
    parser.add_argument(
        "--teacher-guidance",
        type=float,
        help="by default the guidance that the student was distilled at, if it is known",
    )
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--dtype", default="float32", help="of the networks: float32 or bfloat16")
    parser.add_argument(
        "--world",
        help="oracle of the metrics: shapes, or none; by default that of the teacher's gadjax.json",
    )
    add_network_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    parser.add_argument("--json", action="store_true", help="print report.json, not report.md")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for extractors, scorers, protocols and the numbers of outside scripts."""
    parser.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="feature network for distances and diversity: the folder of a CLIP, SigLIP, DINOv2 or "
        "DINOv3, or a safetensors file of FID's Inception; ,vector=... and ,recipe=... behind it "
        "choose a vector and a preprocessing; may be repeated",
    )
    parser.add_argument(
        "--scores",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="score of a picture for its prompt: clipscore, pickscore, siglip or aesthetic, and "
        "the folder of its CLIPModel or SiglipModel; may be repeated",
    )
    parser.add_argument(
        "--feature-cache", type=Path, help="folder in which features are kept by picture and model"
    )
    parser.add_argument(
        "--protocol",
        help="settings of a published table, dpdmd or gad, in place of --seeds, --tangents, "
        "--library and --moves",
    )
    parser.add_argument(
        "--import",
        dest="imported",
        type=Path,
        help="JSON file with numbers of outside scripts, for the report",
    )


def run(args: argparse.Namespace) -> int:
    from gadjax.assets import resolve
    from gadjax.cli.output import stop_on_write_error
    from gadjax.data.prompts import read_prompts
    from gadjax.evaluation.evaluate import evaluate
    from gadjax.evaluation.networks import read_networks
    from gadjax.evaluation.report import as_dict, as_markdown, write_report
    from gadjax.evaluation.results import EvaluationConfig
    from gadjax.io.atomic import atomic_folder, check_target

    check_target(args.out, overwrite=args.overwrite, marker=MARKER)
    prompts = read_prompts(resolve(args.prompts))
    name, world = _oracle(args.world, resolve(args.teacher))
    students = {
        label: _load_model("--student", dtype=args.dtype, changes={}, **options)
        for label, options in label_students(args.student).items()
    }
    distilled_at = distillation_guidance(args.student, students, args.teacher_guidance)
    guidance = distilled_at if args.teacher_guidance is None else args.teacher_guidance
    changes = {"steps": args.teacher_steps, "guidance": guidance}
    teacher = _load_model("--teacher", args.teacher, args.dtype, changes)
    networks = read_networks(
        *(args.features, args.scores, args.feature_cache, args.protocol, args.imported),
        prompts=len(prompts),
    )
    plan = EvaluationConfig(args.seeds, args.tangents, args.batch, args.library, args.moves)
    plan, world = networks.configure(plan, world)
    one = next(iter(students.values())) if len(students) == 1 else None
    evaluation = evaluate(teacher, one or students, prompts, world, plan)
    with stop_on_write_error(args.feature_cache):
        evaluation = networks.finish(evaluation)
    guidance_text = _describe_guidance(teacher.sampling.guidance, distilled_at)
    if distilled_at not in (None, teacher.sampling.guidance):
        print(f"gadjax: the teacher is evaluated at guidance {guidance_text}", file=sys.stderr)
    settings = {
        "teacher": args.teacher,
        **describe_students(args.student),
        "teacher's guidance": guidance_text,
        "prompts": f"{args.prompts} ({len(prompts)})",
        "seeds": plan.seeds,
        "tangents": plan.tangents,
        "library": plan.library,
        "moves": plan.moves,
        "world": name,
        "dtype": args.dtype,
        **networks.describe(),
        **reduced_size(evaluation, teacher),
        **_provenance(teacher, students),
        "command": args.command_line,
    }
    with atomic_folder(args.out, overwrite=args.overwrite, marker=MARKER) as folder:
        write_report(folder, evaluation, prompts, settings)
    if args.json:
        print(json.dumps(as_dict(evaluation, settings)))
    else:
        print(as_markdown(evaluation, settings), end="")
    return 0


def reduced_size(evaluation, teacher) -> dict[str, str]:
    """Line for the report's settings where the pictures that it kept are reduced; else none."""
    height, width = (teacher.pipeline.upscale * side for side in teacher.pipeline.latent[:2])
    kept = evaluation.rows[0].images_PSHWC.shape[2:4]
    if kept == (height, width):
        return {}
    text = f"of means of {height // kept[0]} x {width // kept[1]} pixels, to fit in memory"
    return {"pixel metrics and pictures": text}


def _describe_guidance(guidance: float, distilled_at: float | None) -> str:
    if distilled_at is None:
        return f"{guidance:g} (the student does not say at which it was distilled)"
    if guidance != distilled_at:
        return f"{guidance:g}, but the student was distilled at {distilled_at:g}"
    return f"{guidance:g}, at which the student was distilled"


def _oracle(name: str | None, teacher: Path):
    from gadjax.errors import check_choice
    from gadjax.evaluation.oracles import WORLDS
    from gadjax.formats.sampling_config import GADJAX_JSON, read_world

    where = "--world"
    if name is None:
        name, where = read_world(teacher) or "none", f"{teacher / GADJAX_JSON}, world"
    check_choice(where, name, WORLDS)
    return name, WORLDS[name]


def _load_model(flag: str, name: str, dtype: str, changes: dict[str, Any], **options: Any):
    """Load a model for the evaluation.

    Args:
        flag: --teacher or --student, for messages.
        name: as in `gadjax.load`.
        dtype: compute dtype.
        changes: to the sampling settings of the folder; None leaves one as it is.
        options: further ones of `gadjax.load`.
    """
    from gadjax.api import load

    model = load(name, dtype=dtype, **options)
    changes = {key: value for key, value in changes.items() if value is not None}
    if "steps" in changes:
        changes["timesteps"] = None
    sampling = replace(model.sampling, **changes)
    return replace(model, name=f"{flag} {name}", sampling=sampling)


def _provenance(teacher, students: dict[str, Any]) -> dict[str, Any]:
    """Provenance of the report: fingerprints of the weights, versions, device."""
    import jax

    models = {"teacher": teacher}
    for number, student in enumerate(students.values(), 1):
        models["student" if number == 1 else f"student_{number}"] = student
    fingerprints = {f"{name}'s {m.pipeline.backbone}": m.fingerprint for name, m in models.items()}
    device = jax.devices()[0].device_kind
    return {**fingerprints, "gadjax": version("gadjax"), "jax": jax.__version__, "device": device}
