"""Plans of the papers' backbones at full size, for chips that need not be present.

    python tests/benchmarks/plans.py [ROW ...] [--out docs/results/plans]

plans each row (all of them by default; needs libtpu) that `--out` does not have already, one JSON
of `gadjax plan` for each, and writes the table of all to its README.md. Each row runs in a process
of its own, and so does each update, whose process ends after buffer assignment.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# Before JAX starts, as the command has them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from benchmarks import grey_world  # noqa: E402
from benchmarks.common import Figure  # noqa: E402
from benchmarks.placing import dump_to, placed  # noqa: E402
from published import write_folder  # noqa: E402

from gadjax.objectives import TERMS, build  # noqa: E402
from gadjax.parallel.hardware import GIB  # noqa: E402
from gadjax.plan.plan import plan  # noqa: E402
from gadjax.plan.programs import FAST_COMPILE_OPTIONS, Compiled, Log, Programs  # noqa: E402
from gadjax.training import workspace  # noqa: E402
from gadjax.training.checks import OFFLOAD  # noqa: E402
from gadjax.training.config import read_config  # noqa: E402

OUT = ROOT / "docs/results/plans"
GAD = {"tdm": {}, "gad": {"weight": 1.0, "steps": 4}}
# An anchor of 10 teacher steps, the number of DP-DMD's code.
DPDMD = {"dmd": {"backprop": "all"}, "anchor": {"weight": 0.05, "target": "x0", "steps": 10}}
DIFFERENCES = "GAD by differences"
# Kind of training -> objective, updates of the critic for one of the student.
TRAINS = {
    "GAD": (GAD, 1),
    DIFFERENCES: (GAD, 1),
    "DP-DMD": (DPDMD, 5),
    "both": (DPDMD | {"gad": GAD["gad"]}, 5),
}
# Kind -> objective, critic updates, and changes of the student: methods of later papers.
FRESH = {"rollout": "fresh_noise"}
METHODS = {
    "DMD2, fresh noise": ({"dmd": {}, "adversarial": {"weight": 0.005}}, 5, FRESH),
    "f-distill": ({"f_distill": {}}, 5, FRESH),
}
SPRINT = "SANA-Sprint"  # configs/sana_sprint.py as it is
# configs/backbones.py as it is, and with whole weights.
ADAPTERS, WHOLE = "adapters", "whole weights"
FLOWS = "sana_gad.py", "sd35_dpdmd.py"  # configs with an anchor on v
# Name in a row -> repository, config, changes of its transformer.
BACKBONES = {
    "PixArt-XL, 512 px": ("PixArt-XL-2-512x512", "pixart_gad.py", {}),
    "SD 2, 512 px": ("stable-diffusion-2-base", "sd2_gad.py", {}),
    "SANA 0.6B, 512 px": ("Sana_600M_512px", "sana_gad.py", {}),
    "SANA 1.6B, 1024 px": ("Sana_1600M_1024px", "sana_sprint.py", {}),
    "SD 3.5 medium, 1024 px": ("stable-diffusion-3.5-medium", "sd35_dpdmd.py", {}),
    "SDXL, 1024 px": ("stable-diffusion-xl-base-1.0", "sdxl.py", {}),
    "a PixArt of 2.6 B, 1024 px": (
        "PixArt-XL-2-1024-MS",
        "pixart_gad.py",
        {"num_layers": 30, "num_attention_heads": 32, "cross_attention_dim": 2304},
    ),
    "SD 3.5 large, 1024 px": ("stable-diffusion-3.5-large", "backbones.py:sd35_large", {}),
    "PixArt-Sigma, 1024 px": ("PixArt-Sigma-XL-2-1024-MS", "backbones.py:pixart_sigma", {}),
    "FLUX.1-dev, 1024 px": ("FLUX.1-dev", "backbones.py:flux_dev", {}),
    "FLUX.1-schnell, 1024 px": ("FLUX.1-schnell", "backbones.py:flux_schnell", {}),
    "Z-Image, 1024 px": ("Z-Image", "backbones.py:z_image", {}),
    "FLUX.2-klein, 1024 px": ("FLUX.2-klein-base-4B", "backbones.py:flux2_klein", {}),
    "Lumina 2, 1024 px": ("Lumina-Image-2.0", "backbones.py:lumina2", {}),
}


# Limits the scheduler's overlap to a tenth of a chip's memory. It takes up to 95 % otherwise, so
# that a program is no smaller than it has to be.
TIGHT = {"xla_tpu_scheduler_percent_shared_memory_limit": 10}


class Row(NamedTuple):
    """Row of the table of plans.

    batch: samples of a chip, all at once.
    most: aim for the peak, in GiB of a chip.
    tight: the compiler saves memory (`TIGHT`).
    """

    backbone: str
    trains: str
    topology: str
    batch: int
    fsdp: int
    data: int = 1
    most: float | None = None
    tight: bool = False
    offload: tuple[str, ...] = ()
    largest: bool = False
    remat: str = "block"


XL, LARGE = "PixArt-XL, 512 px", "a PixArt of 2.6 B, 1024 px"
SD35 = "SD 3.5 medium, 1024 px"
SD35_LARGE, FLUX = "SD 3.5 large, 1024 px", "FLUX.1-dev, 1024 px"
ROWS = {
    # The aims of memory.
    "pixart-gad-8": Row(XL, "GAD", "v5e:4x4", 8, 16, most=3.5),
    "pixart-gad-16": Row(XL, "GAD", "v5e:4x4", 16, 16, most=6.0),
    "pixart-gad-48": Row(XL, "GAD", "v5e:4x4", 48, 16, most=14.5),
    "large-gad": Row(LARGE, "GAD", "v5e:4x4", 1, 16, most=8.0),
    "pixart-gad-8-tight": Row(XL, "GAD", "v5e:4x4", 8, 16, most=3.5, tight=True),
    "pixart-gad-16-tight": Row(XL, "GAD", "v5e:4x4", 16, 16, most=6.0, tight=True),
    "pixart-gad-48-tight": Row(XL, "GAD", "v5e:4x4", 48, 16, most=14.5, tight=True),
    # The same with finite differences for tangents, and with what can wait on the host there.
    "pixart-gad-8-differences": Row(XL, DIFFERENCES, "v5e:4x4", 8, 16),
    "pixart-gad-8-tight-differences": Row(XL, DIFFERENCES, "v5e:4x4", 8, 16, tight=True),
    "pixart-gad-1": Row(XL, "GAD", "v5e:4x4", 1, 16),
    "pixart-gad-1-differences": Row(XL, DIFFERENCES, "v5e:4x4", 1, 16),
    "pixart-gad-8-offload": Row(XL, "GAD", "v5e:4x4", 8, 16, offload=OFFLOAD),
    "pixart-gad-8-results": Row(XL, "GAD", "v5e:4x4", 8, 16, remat="results"),
    "large-gad-offload": Row(LARGE, "GAD", "v5e:4x4", 1, 16, offload=OFFLOAD),
    "pixart-gad-largest": Row(XL, "GAD", "v5e:4x4", 16, 16, largest=True),
    # Each backbone with each of the three.
    "pixart-gad": Row(XL, "GAD", "v5e:4x4", 2, 16),
    # libtpu 0.0.52 fails on it ("overlaps with another chunk") unless it saves memory.
    "pixart-dpdmd": Row(XL, "DP-DMD", "v5e:4x4", 2, 16, tight=True),
    "pixart-both": Row(XL, "both", "v5e:4x4", 2, 16),
    "sd2-gad": Row("SD 2, 512 px", "GAD", "v5e:4x4", 2, 16),
    "sd2-dpdmd": Row("SD 2, 512 px", "DP-DMD", "v5e:4x4", 2, 16),
    "sd2-both": Row("SD 2, 512 px", "both", "v5e:4x4", 2, 16),
    "sana-gad": Row("SANA 0.6B, 512 px", "GAD", "v5e:4x4", 2, 16),
    "sana-dpdmd": Row("SANA 0.6B, 512 px", "DP-DMD", "v5e:4x4", 2, 16),
    "sana-both": Row("SANA 0.6B, 512 px", "both", "v5e:4x4", 2, 16),
    "sd35-gad": Row(SD35, "GAD", "v5e:4x8", 1, 32),
    "sd35-dpdmd": Row(SD35, "DP-DMD", "v5e:4x8", 1, 32),
    "sd35-both": Row(SD35, "both", "v5e:4x8", 1, 32),
    "sdxl-gad": Row("SDXL, 1024 px", "GAD", "v5e:8x8", 1, 64),
    "sdxl-dpdmd": Row("SDXL, 1024 px", "DP-DMD", "v5e:8x8", 1, 64),
    "sdxl-both": Row("SDXL, 1024 px", "both", "v5e:8x8", 1, 64),
    # A pod.
    "pixart-both-v6e": Row(XL, "both", "v6e:16x16", 2, 128, 2),
    "pixart-both-pod": Row(XL, "both", "v5p:8x8x8", 2, 128, 4),
    "sd35-both-pod": Row(SD35, "both", "v5p:8x8x8", 2, 128, 4),
    # Eight cards, compiled for where JAX has its CUDA plugin.
    "pixart-both-h100": Row(XL, "both", "h100:8", 16, 8),
    "sd35-both-h200": Row(SD35, "both", "h200:8", 4, 8),
    # Adapters of large backbones, on the smallest slice that trains them.
    # libtpu fails on it as on pixart-dpdmd.
    "sigma-adapters": Row("PixArt-Sigma, 1024 px", ADAPTERS, "v5e:2x2", 1, 4, tight=True),
    "sd35-large-adapters-4": Row(SD35_LARGE, ADAPTERS, "v5e:2x2", 1, 4),
    "sd35-large-adapters": Row(SD35_LARGE, ADAPTERS, "v5e:2x4", 1, 8),
    "flux-dev-adapters-8": Row(FLUX, ADAPTERS, "v5e:2x4", 1, 8),
    "flux-dev-adapters": Row(FLUX, ADAPTERS, "v5e:4x4", 1, 16),
    "flux-schnell-adapters": Row("FLUX.1-schnell, 1024 px", ADAPTERS, "v5e:4x4", 1, 16),
    "z-image-adapters": Row("Z-Image, 1024 px", ADAPTERS, "v5e:2x4", 1, 8),
    "flux2-klein-adapters": Row("FLUX.2-klein, 1024 px", ADAPTERS, "v5e:2x2", 1, 4),
    "lumina2-adapters": Row("Lumina 2, 1024 px", ADAPTERS, "v5e:2x2", 1, 4),
    # The same on one card, and with whole weights.
    "sd35-large-adapters-h200": Row(SD35_LARGE, ADAPTERS, "h200:1", 1, 1),
    "flux-dev-adapters-h200": Row(FLUX, ADAPTERS, "h200:1", 1, 1),
    "sd35-large-whole": Row(SD35_LARGE, WHOLE, "v5e:4x8", 1, 32),
    "flux-dev-whole": Row(FLUX, WHOLE, "v5e:8x8", 1, 64),
    "flux-dev-whole-128": Row(FLUX, WHOLE, "v5e:8x16", 1, 128),
}
# Methods of later papers and adapters of 8 and 12 B, on a slice of each kind and on cards.
SLICES = {"v5e:4x4": 16, "v6e:4x4": 16, "v5p:4x4x4": 64, "h200:8": 8, "h200:1": 1}
for topology, chips in SLICES.items():
    place = topology.replace(":", "-")
    ROWS |= {
        f"dmd2-{place}": Row(XL, "DMD2, fresh noise", topology, 2, chips),
        f"f-distill-{place}": Row(XL, "f-distill", topology, 2, chips),
        f"sprint-{place}": Row("SANA 1.6B, 1024 px", SPRINT, topology, 2, chips),
    }
    for name, backbone in (("sd35-large", SD35_LARGE), ("flux-dev", FLUX)):
        row = Row(backbone, ADAPTERS, topology, 1, chips)
        if row not in ROWS.values():
            ROWS[f"{name}-adapters-{place}"] = row


def make_plan(row: Row, folder: Path) -> dict[str, Any]:
    """Plan of a row. folder: for the repository's configurations."""
    repository, file, changes = BACKBONES[row.backbone]
    teacher = write_folder(repository, folder, transformer=changes)
    config = read_config([f"--config={ROOT}/configs/{file}", f"--config.teacher={teacher}"])
    chips = row.fsdp * row.data
    if row.trains == WHOLE:
        config.student.lora.rank = 0
    elif row.trains in METHODS:
        config.objective, config.critic.updates, changes = METHODS[row.trains]
        config.student.update(changes)
    elif row.trains not in (ADAPTERS, SPRINT):
        config.objective, config.critic.updates = TRAINS[row.trains]
        if "anchor" in config.objective and file in FLOWS:
            config.objective.anchor.target = "v"
    if build(config.objective, TERMS, tuple(config.student.timesteps)).needs.images:
        grey_world.SIZE = int(row.backbone.split()[-2])
        config.data.update(prompts="", world=grey_world.__name__, cache=1)
    config.mesh.update(data=row.data, fsdp=row.fsdp)
    config.batch, config.microbatch, config.offload = row.batch * chips, 0, row.offload
    config.remat = row.remat
    log = partial(print, file=sys.stderr, flush=True)
    with ExitStack() as patches:
        if row.trains == DIFFERENCES:
            patches.enter_context(mock.patch.object(workspace, "tangents", differences))
        if row.tight:
            patches.enter_context(mock.patch.dict(FAST_COMPILE_OPTIONS["tpu"], TIGHT))
        result = plan(config, row.topology, largest=row.largest, log=log)
        return result | {"teacher": repository}


def differences(f: Callable, x: jax.Array, v_J: jax.Array, h: float = 0.01):
    """Finite difference in place of `gadjax.geometry.tangents`, for one direction."""
    value, moved = f(x), f(x + h * v_J[0])
    return value, jax.tree.map(lambda a, b: (b - a)[None] / h, value, moved)


def make_row(name: str, path: Path) -> None:
    """Write the row's plan."""
    with tempfile.TemporaryDirectory() as folder:
        if ROWS[name].topology.startswith("v"):  # for cards code generation is the lesser part
            Programs.compile = lambda *args: compile_in_process(name, Path(folder), *args)
        text = json.dumps(make_plan(ROWS[name], Path(folder)), indent=1)
    path.write_text(text + "\n")


def compile_in_process(row: str, folder: Path, programs: Programs, name: str, batch: int, log: Log):
    """Result of `programs.compile(name, batch, log)`, in a process of its own."""
    log(f"compiling the {name} step, {batch} samples ...")
    path = folder / f"{name}{batch}.json"
    command = [sys.executable, __file__, row, "--to", path, "--update", name, "--batch", str(batch)]
    subprocess.run(command, check=True)
    return Compiled(**json.loads(path.read_text()))


def make_update(name: str, path: Path, update: str, batch: int) -> None:
    """Write one update's Compiled, then end the process before code generation."""
    folder = path.with_suffix("")
    folder.mkdir()
    dump_to(folder / "dumps")

    def compile_it(programs: Programs, one: str, _: int, log: Log) -> None:
        if one == update:
            compiled = placed(folder / "dumps", programs, one, batch, log)
            path.write_text(json.dumps(compiled._asdict()))
            os._exit(0)

    Programs.compile = compile_it
    make_plan(ROWS[name], folder)


def plans(names: list[str], out: Path) -> Iterator[Figure]:
    """Peaks beside their aims; each plan is kept in `out`, and not made again."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = out / f"{name}.json"
        if not path.is_file():
            subprocess.run([sys.executable, __file__, name, "--to", str(path)], check=True)
        row, peak = ROWS[name], json.loads(path.read_text())["memory"]["peak"]
        note = f"{row.backbone}, {row.trains}, {row.topology}, {row.batch} a chip"
        yield Figure(f"peak of a chip, GiB: {name}", peak and peak / GIB, row.most, note=note)


HEADS = (
    "backbone",
    "trains",
    "topology",
    "mesh",
    "samples a chip",
    "peak a chip, GiB",
    "of it held",
    "a chip has",
    "aim",
    "TFLOP an image",
    "images/s a chip",
    "sent for an update, GiB",
    "largest replicated parameter",
    "compiled in, s",
)


def write_table(out: Path) -> None:
    """Write README.md of the plans: a row for each, "not yet run" where there is none."""
    lines = [TEXT.strip(), "", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name, row in ROWS.items():
        path = out / f"{name}.json"
        how = row.trains + ", tight" * row.tight + ", offload" * bool(row.offload)
        how += ", results kept" * (row.remat == "results")
        cells = [row.backbone, how, row.topology, f"{row.data} x {row.fsdp}"]
        result = json.loads(path.read_text()) if path.is_file() else None
        cells += numbers(row, result) if result else [str(row.batch), "not yet run"]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "README.md").write_text("\n".join(lines) + "\n")


def numbers(row: Row, result: dict[str, Any]) -> list[str]:
    memory, sent, parameter = result["memory"], result["traffic"], result["replicated"]
    peak = memory["peak"]
    chips = row.data * row.fsdp
    return [
        f"{row.batch}; at most {result['largest']['batch'] // chips}"
        if row.largest
        else str(row.batch),
        f"{peak / GIB:.2f}" if peak else "more",
        f"{sum(memory['held'].values()) / GIB:.2f}",
        f"{memory['capacity'] / GIB:.2f}" + ("" if memory["fits"] else ": **does not fit**"),
        aim(row.most, memory) if row.most else "",
        f"{result['flops']['image'] / 1e12:.1f}",
        f"{result['images_per_second_per_chip']:.2f}",
        f"{sent['update'] / GIB:.1f}" if sent else "",
        f"{parameter['elements']:,}" if parameter else "none",
        " + ".join(f"{taken:.0f}" for taken in result["seconds"].values()),
    ]


def aim(most: float, memory: dict[str, Any]) -> str:
    """Aim beside the peak, and beside the peak without encoder and EMA (lean)."""

    def verdict(peak):
        return f"{peak:.2f} {'holds' if peak <= most else '**misses**'}"

    peak, held = memory["peak"] / GIB, memory["held"]
    lean = peak - (held["text encoders"] + held["EMA"]) / GIB
    return f"{most:g}: {verdict(peak)}; lean {verdict(lean)}"


TEXT = """
# Plans at full size

Rows of adapters on several chips and those of SANA are compiled with the code of 2026-12-01, which
gathers small kernels (docs/performance.md), but SD 3.5 large's on v5e:4x4 and those on v6e. They,
one card and the methods from DMD2 on but SANA-Sprint are of the same day before it, and whole
weights of configs/backbones.py of the day before. The others are of before attention changed its
layouts and norms and GELU were recomputed in reverse mode, and have not been compiled since (the
sharding of large leaves changed later; none of these rows had one whole on every chip).

Results of `gadjax plan` for the papers' backbones (bfloat16, Pallas attention where the network has
one, prompts encoded in the step, float32 masters with moments and an EMA; each row's .json is
beside this page). GAD is TDM + GAD along a map of 4 steps with one critic update; DP-DMD is DMD
through the whole rollout + the anchor of 10 teacher steps with five; both is DP-DMD + GAD; DMD2 is
DMD + a discriminator, and f-distill, of students with fresh noise and five critic updates, on
pictures encoded before; SANA-Sprint is configs/sana_sprint.py (sCM and LADD, no critic); adapters
is configs/backbones.py (DMD + GAD + anchor, LoRA of rank 64 for student and critic on one bfloat16
base). A chip has all of its samples at once. "of it held" is the memory in use between updates;
"lean" is the peak without text encoder and EMA, which the step of the aims did not have. "tight":
XLA's scheduler is limited to a tenth of the chip's memory for overlap (it takes up to 95 %
otherwise, so that a program is not as small as it can be);
`LIBTPU_INIT_ARGS=--xla_tpu_scheduler_percent_shared_memory_limit=10` limits a run's. "offload":
teacher, moments and EMA are offloaded to the host's memory. "results kept": `remat = "results"`.
The images are a ceiling at 40 % of the peak. Seconds, on two slow cores beside other work, are
until buffer assignment of both programs, after which the memory is known; cards' are of the whole
programs.

A U-Net's blocks are no loop: the program of SD 2's student with GAD has 143,000 lines before XLA
begins, and its buffer assignment took 6 to 9 minutes and 11 GB of the planning machine.

    python tests/benchmarks/plans.py [ROW ...]
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, default=OUT)
    # A row's own process, and that of one of its updates.
    for flag, kind in (("--to", Path), ("--update", str), ("--batch", int)):
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"found {', '.join(unknown)}; expected some of {', '.join(ROWS)}")
    if args.to and args.update:
        make_update(args.rows[0], args.to, args.update, args.batch)
    elif args.to:
        make_row(args.rows[0], args.to)
        sys.exit()
    for figure in plans(args.rows or list(ROWS), args.out):
        print(figure.name, figure.value, figure.aim, figure.note, flush=True)
        write_table(args.out)
