"""The study: every base objective with and without GAD and the anchor, one cell at a time.

    python -m gadjax.recipes.study [CELL ...] [--work runs/study] [--out docs/results/study]

A cell is FAMILY:VARIANT:SEED, such as eps:dmd_both:0; without any, all of them are done in order.
A cell with a row in --out is finished; one that was interrupted resumes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from gadjax.assets import resolve
from gadjax.errors import InputError
from gadjax.training.config import as_json, default_config, read_config

BASES = {"dmd": {}, "sid": {}, "tdm": {}, "regression": {"steps": 4}}
GAD = {"weight": 0.3, "steps": 4}
ANCHOR = {"weight": 0.05, "target": "v", "steps": 4}
ADDED = {"none": {}, "gad": {"gad": GAD}, "anchor": {"anchor": ANCHOR}}
ADDED["both"] = ADDED["gad"] | ADDED["anchor"]
# What one thing does, beside dmd_both: its name -> what it changes in the objective.
CHANGES = {
    "weight_0.1": {"gad": GAD | {"weight": 0.1}},
    "weight_1": {"gad": GAD | {"weight": 1.0}},
    "directions_4": {"gad": GAD | {"directions": 4}},
    "low_frequency": {"gad": GAD | {"direction": "low_frequency"}},
    "control": {"gad": GAD | {"direction": "control"}},
    "clean": {"gad": GAD | {"end": "clean"}},
    "polar": {"gad": GAD | {"loss": "polar"}},
    "whole": {"gad": GAD | {"end": "whole", "steps": 8}},
    "whole_polar": {"gad": GAD | {"end": "whole", "steps": 8, "loss": "polar"}},
    "first_step": {"gad": GAD | {"step_weights": (4.0, 0.0, 0.0, 0.0)}},
    "later_steps": {"gad": GAD | {"step_weights": (0.0, 4 / 3, 4 / 3, 4 / 3)}},
    "anchor_early": {"anchor": ANCHOR | {"until": 787.0}},
    "anchor_late": {"anchor": ANCHOR | {"until": 449.0}},
    "anchor_weight_0.2": {"anchor": ANCHOR | {"weight": 0.2}},
}


def objectives() -> dict[str, dict]:
    """Variant -> objective, as a config spells it."""
    found = {
        f"{base}_{name}": {base: options} | added
        for base, options in BASES.items()
        for name, added in ADDED.items()
    }
    found["dmd_polar"] = {"dmd": {}, "gad": GAD | {"loss": "polar"}}
    found["script"] = {"tdm": {}, "gad_script": {}}
    found["script_half"] = {"tdm": {}, "gad_script": {"half": True}}
    for name, changed in CHANGES.items():
        found[name] = {"dmd": {}} | ADDED["both"] | changed
    return found


def cell_config(variant: str):
    """What all cells share; configs/study adds the teacher and the student's times."""
    known = objectives()
    if variant not in known:
        raise InputError(
            f"--config: found the variant {variant!r}; expected one of {', '.join(known)}"
        )
    config = default_config()
    config.guidance = 2.0
    config.objective = known[variant]
    config.steps = 600
    config.batch = 16
    config.remat = "none"
    config.optim.update(lr=2e-4, warmup=20, decay=600, b1=0.0, b2=0.95)
    config.critic.update(updates=2, lr=4e-4)
    config.ema = 0.98
    config.data.update(prompts="asset:shapes_prompts.txt", length=16)
    config.checkpoint.update(every=200, keep=1)
    config.log.every = 20
    config.preview.every = 300
    return config


# Family: a file of configs/study -> its teacher.
TEACHERS = {
    "eps": "asset:shapes_teacher",
    "flow": "asset:shapes_flow_teacher",
    "one_step": "asset:shapes_teacher",
}
SEEDS = 0, 1, 2
PROMPTS = "asset:shapes_test_prompts.txt"
# Metric -> heading of the tables.
SHOWN = {
    "adherence": "adherence",
    "frechet": "Fréchet",
    "vendi_ratio": "Vendi / teacher's",
    "alignment_pixels": "seed alignment",
    "tangent_cosine": "tangent cosine",
    "tangent_norm_ratio": "tangent norm",
    "retrieval": "retrieval",
    "control": "layout control",
    "path_agreement": "path agreement",
}


def cells() -> list[str]:
    """All of the study, the ones that tell most first."""
    grid = [f"{base}_{name}" for base in BASES for name in ADDED]
    variants = {
        "eps": [*grid, "script", "script_half", *CHANGES],
        "flow": grid,
        "one_step": [f"{base}_{name}" for base in BASES for name in ("none", "gad")]
        + ["dmd_polar"],
    }
    return [
        f"{family}:{variant}:{seed}"
        for seed in SEEDS
        for family in TEACHERS
        for variant in variants[family]
        if seed == 0 or variant in grid
    ]


def config_of(cell: str):
    """The config of a cell. Raises: InputError for one that is not of the study."""
    if cell not in cells():
        raise InputError(
            f"cell: found {cell!r}; expected FAMILY:VARIANT:SEED, such as {cells()[0]}"
        )
    family, variant, seed = cell.split(":")
    return read_config([f"--config=configs/study/{family}.py:{variant}", f"--config.seed={seed}"])


def run_cell(cell: str, work: Path, evaluate: "Evaluator", picture: Path) -> dict:
    """Train and evaluate what is not done yet; the row."""
    family, variant, seed = cell.split(":")
    workdir = work / cell.replace(":", "-")
    config = f"--config=configs/study/{family}.py:{variant}"
    train = ["train", config, f"--config.seed={seed}", f"--workdir={workdir}"]
    subprocess.run([sys.executable, "-m", "gadjax", *train], check=True)
    found = evaluate(family, workdir, picture)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return {
        "cell": cell,
        "config": as_json(config_of(cell)),
        "rows": found["rows"],
        "settings": found["settings"],
        "evaluations": evaluations(family, variant),
        "seconds": float(np.median([16 / m["images_per_second"] for m in logged])),
        "training": {k: [(m["step"], m[k]) for m in logged if k in m] for k in CURVES},
    }


CURVES = "loss/gad", "gad/cosine", "gad/norm_ratio", "loss/anchor", "dmd/gap", "sid/gap", "tdm/gap"


class Evaluator:
    """Evaluates students as `gadjax evaluate` does; what a teacher draws is kept."""

    def __init__(self):
        self.known: dict[str, dict] = {}

    def __call__(self, family: str, student: Path, picture: Path) -> dict:
        """The report; and the first prompts at their first noise, a line per row, as a picture."""
        from gadjax.api import load
        from gadjax.data.prompts import read_prompts
        from gadjax.evaluation.evaluate import Plan, evaluate
        from gadjax.evaluation.report import as_dict
        from gadjax.evaluation.worlds import WORLDS
        from gadjax.training.preview import grid, save_png

        teacher, prompts = load(TEACHERS[family]), read_prompts(resolve(PROMPTS))
        known = self.known.setdefault(family, {})
        for other, rows in self.known.items():
            if TEACHERS[other] == TEACHERS[family] and "teacher" in rows:
                known.setdefault("teacher", rows["teacher"])
        plan = Plan(tangents=4, library=128, moves=128)
        found = evaluate(teacher, load(student), prompts, WORLDS["shapes"], plan, known)
        save_png(grid([(r.label, r.images_PSHWC[:24, 0]) for r in found.rows], scale=1), picture)
        return as_dict(found, {"teacher": TEACHERS[family], "prompts": PROMPTS})


def write_table(out: Path) -> None:
    """README.md of the results: one table for each family, a row for each variant."""
    lines = ["# The study", "", _TEXT.strip(), ""]
    heads = ["", "seeds", *SHOWN.values(), "evaluations / update", "seconds / update"]
    for family in TEACHERS:
        rows = {cell: _read(out, cell) for cell in cells() if cell.startswith(f"{family}:")}
        finished = {cell: row for cell, row in rows.items() if row}
        lines += [
            f"## Teacher: {family}",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
        ]
        for key in ("teacher", "teacher_few"):
            of = [row["rows"][key] for row in finished.values()][:1]
            if of:
                texts = [of[0]["label"], "", *_cells([of[0]["metrics"]]), "", ""]
                lines.append(f"| {' | '.join(texts)} |")
        for variant in dict.fromkeys(cell.split(":")[1] for cell in rows):
            of = [row for cell, row in finished.items() if cell.split(":")[1] == variant]
            texts = [variant.removesuffix("_none").replace("_", " ")]
            if of:
                cost, base = (_read(out, f"{family}:{v}:0") for v in (variant, _base(variant)))
                texts += [str(len(of)), *_cells([row["rows"]["student"]["metrics"] for row in of])]
                texts += [_times(cost, base, name) for name in ("evaluations", "seconds")]
            else:
                texts += ["", "not run", *[""] * (len(heads) - 3)]
            lines.append(f"| {' | '.join(texts)} |")
        lines.append("")
    (out / "README.md").write_text("\n".join(lines))


def _base(variant: str) -> str:
    """What a variant adds to."""
    base = variant.split("_")[0]
    return f"{base if base in BASES else 'tdm' if base == 'script' else 'dmd'}_none"


def _times(cost: dict | None, base: dict | None, name: str) -> str:
    if cost is None:
        return ""
    return f"{cost[name]:.3g}" + (f" (x {cost[name] / base[name]:.2f})" if base else "")


def _read(out: Path, cell: str) -> dict | None:
    path = out / f"{cell.replace(':', '-')}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _cells(of: list[dict]) -> list[str]:
    """Means over seeds; of a single one the 95 % interval where there is one."""
    texts = []
    for name in SHOWN:
        found = [metrics[name] for metrics in of if name in metrics]
        if not found:
            texts.append("")
            continue
        text = f"{np.mean([m['value'] for m in found]):.3f}"
        if len(found) == 1 and found[0]["low"] is not None:
            text += f" ({found[0]['low']:.2f}–{found[0]['high']:.2f})"
        elif len(found) > 1:
            text += f" ± {np.std([m['value'] for m in found], ddof=1):.3f}"
        texts.append(text)
    return texts


_TEXT = """
What GAD and the anchor do to four base objectives on the bundled world: 600 updates of 16 samples
from the teacher's weights, 4 steps (one in the last table), all else as in
`gadjax/recipes/study.py`. 64 prompts x 8 noises with 4 tangents each, and a library of 128 noises
and 128 moves for control, the same ones for every row. Of one seed a cell shows the value and its
95 % interval over prompts, noises or pictures; of several the mean and the standard deviation over
runs. Numbers, config and curves of every cell are in the .json beside this page. The machine had
two slow cores that share one's worth of time, with other work on the second: seconds compare
roughly, evaluations exactly. Rows marked "not run" wait for somebody with more:
`python -m gadjax.recipes.study`.
"""


def evaluations(family: str, variant: str) -> float:
    """What an update costs, the critic's own included, in evaluations of the network for each
    sample: the products and convolutions of the traced program over those of one evaluation."""
    from gadjax.plan.flops import flops
    from gadjax.training.setup import make_batch, prepare
    from gadjax.training.steps import critic_step, student_step

    run = prepare(config_of(f"{family}:{variant}:0"))
    recipe, frozen = run.recipe, run.frozen
    raw = run.source.batch(0, run.config.batch)
    batch = jax.eval_shape(lambda f, r: make_batch(run.pipeline, f, r, 0, 0), frozen, raw)
    state, teacher = jax.eval_shape(run.start, run.first), frozen.get(run.pipeline.body)
    once = flops(lambda p, b: recipe.denoiser.raw(p, b.noise, 0.0, b.cond), run.first, batch)
    total = flops(lambda s, t, b: student_step(recipe, s, t, b), state, teacher, batch)
    if len(recipe.optimizers) > 1:
        own = flops(lambda s, t, b: critic_step(recipe, s, t, b), state, teacher, batch)
        total += run.config.critic.updates * own
    return total / once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help="FAMILY:VARIANT:SEED; all of them by default")
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/study"))
    args = parser.parse_args()
    for cell in args.cells:
        config_of(cell)
    args.out.mkdir(parents=True, exist_ok=True)
    evaluate = Evaluator()
    for cell in args.cells or cells():
        if _read(args.out, cell) is None:
            path = args.out / f"{cell.replace(':', '-')}.json"
            row = run_cell(cell, args.work, evaluate, path.with_suffix(".png"))
            path.write_text(json.dumps(row) + "\n")
            print(f"{cell}: done", flush=True)
        write_table(args.out)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
