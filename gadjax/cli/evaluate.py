"""Compare students with their teacher: report.html, report.json, report.md and images."""

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARKER = "report.json"
FLAGS = {"student_teacher": "teacher", "student_preset": "student_preset", "lora": "lora"}


class OfStudent(argparse.Action):
    """Flag of one student: `--student` begins the next one, other flags are of the last one.

    Flags before the first `--student` are of that one. The list of students is `args.student`:
    options of `gadjax.load`, with its name.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        if namespace.student == []:
            namespace.student = [{}]
        elif self.dest == "student" and "name" in namespace.student[-1]:
            namespace.student.append({})
        student = namespace.student[-1]
        if self.dest == "student":
            student["name"] = values
        elif self.dest == "lora":
            student.setdefault("lora", []).append(values)
        else:
            student[FLAGS[self.dest]] = values


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
        default=32,
        help="tasks of moving a shape by its noise, one per noise of the library",
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
        help="score of a picture for its prompt: clipscore, pickscore or aesthetic, and the folder "
        "of its CLIPModel; may be repeated",
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
    from gadjax.data.prompts import read_prompts
    from gadjax.evaluation.evaluate import EvaluationConfig, evaluate
    from gadjax.evaluation.report import as_dict, as_markdown, write_report
    from gadjax.io.atomic import atomic_folder, check_target

    check_target(args.out, overwrite=args.overwrite, marker=MARKER)
    prompts = read_prompts(resolve(args.prompts))
    name, world = _oracle(args.world, resolve(args.teacher))
    students = {
        label: _load_model("--student", dtype=args.dtype, changes={}, **options)
        for label, options in _labelled(args.student).items()
    }
    distilled_at = _distillation_guidance(students, args)
    guidance = distilled_at if args.teacher_guidance is None else args.teacher_guidance
    changes = {"steps": args.teacher_steps, "guidance": guidance}
    teacher = _load_model("--teacher", args.teacher, args.dtype, changes)
    plan = EvaluationConfig(args.seeds, args.tangents, args.batch, args.library, args.moves)
    one = next(iter(students.values())) if len(students) == 1 else None
    plan, world, finish = _with_networks(args, plan, world, len(prompts))
    evaluation, networks = finish(evaluate(teacher, one or students, prompts, world, plan))
    guidance_text = _describe_guidance(teacher.sampling.guidance, distilled_at)
    if distilled_at not in (None, teacher.sampling.guidance):
        print(f"gadjax: the teacher is evaluated at guidance {guidance_text}", file=sys.stderr)
    settings = {
        "teacher": args.teacher,
        **_describe_students(args.student),
        "teacher's guidance": guidance_text,
        "prompts": f"{args.prompts} ({len(prompts)})",
        "seeds": plan.seeds,
        "tangents": plan.tangents,
        "library": plan.library,
        "moves": plan.moves,
        "world": name,
        "dtype": args.dtype,
        **networks,
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


def _labelled(students: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options of the students by label: "student", or of several their folder's names and LoRAs'.

    Labels that are alike are numbered.
    """
    from gadjax.formats.lora_file import parse_lora_flag

    if len(students) == 1:
        return {"student": students[0]}
    labelled = {}
    for options in students:
        parts = [Path(options["name"].removeprefix("asset:")).name]
        for file, weight in map(parse_lora_flag, options.get("lora", ())):
            parts.append(file.stem if weight == 1 else f"{file.stem}:{weight:g}")
        name = " + ".join(parts)
        label, number = name, 2
        while label in labelled:
            label, number = f"{name} ({number})", number + 1
        labelled[label] = options
    return labelled


def _describe_students(students: list[dict[str, Any]]) -> dict[str, str]:
    """Students with their flags, by the key of their row."""
    texts = {}
    for number, options in enumerate(students, 1):
        words = [options["name"], *(f"--lora {lora}" for lora in options.get("lora", ()))]
        if "student_preset" in options:
            words.append(f"--student-preset {options['student_preset']}")
        texts["student" if number == 1 else f"student_{number}"] = " ".join(words)
    return texts


def _distillation_guidance(students: dict[str, Any], args: argparse.Namespace) -> float | None:
    """Teacher's guidance in the students' training; None if it is unknown.

    Raises: InputError for students of different ones, unless the flag chooses.
    """
    from gadjax.assets import resolve
    from gadjax.errors import InputError
    from gadjax.formats.sampling_config import read_teacher_guidance
    from gadjax.io.storage import is_remote

    known = {}
    for options, student in zip(args.student, students.values(), strict=True):
        name = options["name"]
        if student.trained:
            known[student.trained.teacher_guidance] = name
        elif not is_remote(name):
            known[read_teacher_guidance(resolve(name))] = name
    known.pop(None, None)
    if len(known) > 1 and args.teacher_guidance is None:
        texts = (f"{guidance:g} ({name})" for guidance, name in known.items())
        raise InputError(
            f"--teacher-guidance: found students distilled at {', '.join(texts)}; expected the flag"
        )
    return next(iter(known), None)


def _with_networks(args: argparse.Namespace, config, world, prompts: int):
    """Evaluation with the networks, protocol and imported numbers of the flags.

    Files are read, and refused, before anything is sampled.

    Args:
        args: of `add_network_arguments`.
        config: of the evaluation.
        world: of the evaluation.
        prompts: number of prompts.

    Returns:
        (config, world, finish); finish(evaluation) writes the cache, and returns the evaluation
        with the imported numbers and lines for the report's settings.
    """
    from gadjax.cli.output import stop_on_write_error
    from gadjax.errors import check_choice
    from gadjax.evaluation.external import read_external, with_external
    from gadjax.evaluation.extractors.flags import load_named, write_caches
    from gadjax.evaluation.learned_metrics import describe_learned
    from gadjax.evaluation.protocols import PROTOCOLS

    imported = read_external(args.imported, prompts) if args.imported else []
    features, scores = load_named(args.features, args.scores, args.feature_cache)
    lines = {}
    if args.protocol is not None:
        check_choice("--protocol", args.protocol, PROTOCOLS)
        protocol = PROTOCOLS[args.protocol]
        missing = protocol.missing(features, scores)
        config = protocol.apply(config)
        lines = {"protocol": f"{args.protocol}: {protocol.source}"}
        if missing:
            lines["protocol, not measured"] = "; ".join(missing)
    if features or scores:
        world = replace(world, features=features, scores=scores)

    def finish(evaluation):
        with stop_on_write_error(args.feature_cache):
            write_caches(features, scores)
        return with_external(evaluation, imported), lines | describe_learned(world)

    return config, world, finish


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
