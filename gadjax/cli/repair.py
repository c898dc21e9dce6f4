"""Repair a distilled student: train a LoRA on it that brings back what its noise meant."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="pipeline folder, or asset:NAME")
    parser.add_argument(
        "--student", required=True, help="pipeline folder, workdir, or LoRA of the teacher"
    )
    parser.add_argument(
        "--student-preset",
        metavar="NAME",
        help="published student that it is, as of gadjax sample, where its folder does not say",
    )
    parser.add_argument("--prompts", required=True, help=".txt, .jsonl or .csv, or asset:NAME")
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder, or an earlier repair's"
    )
    parser.add_argument("--updates", type=int, help="training steps, instead of the config's")
    parser.add_argument(
        "--test-prompts", help="prompts of the comparison; by default the first of --prompts"
    )
    parser.add_argument("--count", type=int, default=64, help="prompts of the comparison")
    parser.add_argument("--seeds", type=int, default=8, help="images per prompt")
    parser.add_argument("--tangents", type=int, default=1, help="noise directions per prompt")
    parser.add_argument(
        "--library", type=int, default=32, help="noises of the noise-control tasks, 0 for none"
    )


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gadjax.cli.output import check_at_least
    from gadjax.evaluation.results import EvaluationConfig
    from gadjax.repair.repair import Request, is_done, repair

    for flag in ("updates", "count"):
        check_at_least(f"--{flag}", getattr(args, flag), 1)
    if is_done(args.out):
        print(f"{args.out}: already done (remove it to start over)")
        return 0
    plan = EvaluationConfig(args.seeds, args.tangents, library=args.library)
    request = Request(
        args.teacher,
        args.student,
        args.prompts,
        args.out,
        args.updates,
        args.test_prompts,
        args.count,
        plan,
        rest,
        args.student_preset,
    )
    print(repair(request), end="")
    print(f"LoRA: {args.out / 'lora'}; pictures: {args.out / 'before_after.png'}")
    return 0
