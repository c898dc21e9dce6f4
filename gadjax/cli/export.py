"""A workdir's weights as a complete diffusers pipeline folder, checked against diffusers.

The check needs torch and diffusers; without them the folder says that it is not verified, and
`gadjax export --verify DIR` makes up for it.
"""

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

from gadjax import __version__, parity
from gadjax.assets import resolve
from gadjax.cli.output import check_apart, check_least, storage, storage_dtype
from gadjax.convert.atomic import atomic_folder, check_target
from gadjax.convert.export import (
    CARD,
    Export,
    card,
    note_verified,
    read_license,
    read_report,
    recipe,
    verified_text,
)
from gadjax.convert.files import fingerprint, open_weights
from gadjax.convert.folder import INDEX, PipelineFolder, write_pipeline
from gadjax.convert.orbax_folder import diffusers_folder, open_folder
from gadjax.convert.recipe import FILE, read_world
from gadjax.errors import InputError, RunStopped
from gadjax.samplers import sampler_from_config, student_scheduler_config
from gadjax.training.workdir import Trained, read_trained

PROMPTS = ("a red circle above a blue square", "a lighthouse at dawn, oil on canvas", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, help="of gadjax train")
    parser.add_argument("--out", type=Path, help="new folder")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the moving average of the weights, or the weights as last updated",
    )
    parser.add_argument("--step", type=int, help="by default the newest")
    parser.add_argument("--teacher", help="its folder, if it has moved since the run")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16")
    parser.add_argument("--report", type=Path, help="report.json of gadjax evaluate, for the card")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check an earlier export, only")


def run(args: argparse.Namespace) -> int:
    if args.verify is not None:
        return _verify_only(args.verify)
    for flag in ("workdir", "out"):
        if getattr(args, flag) is None:
            raise InputError(f"--{flag}: found nothing; expected a folder")
    check_least("--step", args.step, 0)
    dtype, report = storage_dtype(args.dtype), args.report and read_report(args.report)
    check_target(args.out, overwrite=args.overwrite, marker=INDEX)
    trained = read_trained(args.workdir, "ema" if args.ema else "student", args.step)
    source = resolve(args.teacher) if args.teacher else trained.teacher
    check_apart(args.out, args.workdir, source)
    teacher = open_folder(source, components=("transformer",))
    trained.check(teacher.components["transformer"])
    scheduler = _scheduler(trained, teacher)
    export = _describe(args.out.resolve().name, trained, teacher, report)

    with storage(args.out), atomic_folder(args.out, overwrite=args.overwrite, marker=INDEX) as out:
        with diffusers_folder(source, args.out.resolve().parent) as src:
            params = {"transformer": trained.params}
            write_pipeline(src, out, params, scheduler=scheduler, dtype=dtype)
        _check_report(args.report, report, out)
        (out / FILE).write_text(recipe(export, None), encoding="utf-8")
        verified = None if parity.missing() else verify(out)
        (out / FILE).write_text(recipe(export, verified), encoding="utf-8")
        (out / CARD).write_text(card(export, verified), encoding="utf-8")
    print(f"{args.out}: {'average' if args.ema else 'weights'} of step {trained.step}")
    print(verified_text(str(args.out), verified))
    return 0


def _scheduler(trained: Trained, teacher: PipelineFolder) -> dict[str, Any] | None:
    """A replacement for the teacher's, None to keep it.

    Raises: InputError for timesteps that diffusers could not take.
    """
    if not trained.few_step:
        return None
    scheduler = student_scheduler_config(teacher.scheduler)
    sampler_from_config(scheduler).times(timesteps=trained.sampling.timesteps)
    return scheduler


def _describe(name: str, trained: Trained, teacher: PipelineFolder, report) -> Export:
    spec, world = teacher.components["transformer"].spec, trained.config["data"]["world"]
    bundled = world.startswith("gadjax.worlds.")
    return Export(
        name=name,
        sampling=trained.sampling,
        step=trained.step,
        part=trained.part,
        config=trained.config,
        teacher=_name(trained.config["teacher"]),
        fingerprint=trained.fingerprint,
        latent=(spec.sample_size, spec.sample_size, spec.in_channels),
        pipeline=teacher.model_index.get("_class_name", "DiffusionPipeline"),
        arguments=parity.diffusers_arguments(trained.sampling),
        license=read_license(teacher.path),
        world=world.rpartition(".")[2] if bundled else read_world(teacher.path),
        report=report,
    )


def _name(teacher: str) -> str:
    """The last part of a path: where it lay is nobody's business."""
    return Path(teacher.removeprefix("asset:")).name


def _check_report(path: Path | None, report: dict[str, Any] | None, out: Path) -> None:
    """Raises: InputError for a report of other weights than those in `out`."""
    measured = report and report.get("settings", {}).get("student's transformer")
    if measured and measured != (found := fingerprint(open_weights(out / "transformer"))):
        raise InputError(
            f"{path}: found a report of weights with fingerprint {measured}; expected one of "
            f"those exported here, {found}"
        )


def verify(folder: Path) -> dict[str, Any]:
    """Compare what diffusers and gadjax draw with a folder: what its gadjax.json keeps.

    Raises: RunStopped where they differ, or diffusers cannot use the folder.
    """
    difference = parity.compare_pictures(folder, PROMPTS)
    if difference > parity.PICTURE_BOUND:
        raise RunStopped(
            f"verification: found a difference of {difference:.1e} between diffusers' pictures and "
            f"gadjax's; expected at most {parity.PICTURE_BOUND:.1e}"
        )
    return {
        "max_difference": difference,
        "allowed": parity.PICTURE_BOUND,
        "prompts": len(PROMPTS),
        "gadjax": __version__,
        **{name: importlib.metadata.version(name) for name in ("diffusers", "torch")},
    }


def _verify_only(folder: Path) -> int:
    parity.require("--verify")
    if not (folder / FILE).is_file():
        raise InputError(f"{folder}: found no {FILE}; expected a folder written by gadjax export")
    verified = verify(folder)
    with storage(folder):
        note_verified(folder, verified)
    print(verified_text(str(folder), verified))
    return 0
