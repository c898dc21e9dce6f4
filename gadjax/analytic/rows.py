"""Rows of the comparison on closed-form teachers: what is trained there, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gadjax.analytic.bench import Bench
from gadjax.analytic.teachers import Gaussian, Mixture
from gadjax.objectives import (
    BOOT,
    CDM,
    CT,
    DMD,
    GAD,
    GDD,
    LADD,
    LCM,
    PSO,
    RCM,
    SFD,
    SIM,
    TBCM,
    TCM,
    TDM,
    TSCD,
    VSD,
    Adversarial,
    Anchor,
    Consistency,
    ConsistencyDistillation,
    Context,
    DecoupledDMD,
    DisBack,
    Embedding,
    FDistill,
    FlashDMD,
    GADLift,
    GADScript,
    MeanFlow,
    PhasedDMD,
    Regression,
    SeedDifference,
    SiD,
    Term,
    TwinFlow,
    UniDAD,
    UniInstruct,
)
from gadjax.types import Params

FINE = 16  # steps of the teacher's maps in the objectives; the metrics use the exact map
TANGENTS = GAD(steps=FINE, loss="square")
CLEAN = GAD("clean", steps=FINE, loss="square")  # students with fresh noise have no next latent
REGRESSION = Regression(steps=FINE)


class Still(DMD):
    """DMD's critic on a student that does not move: how DisBack degrades its teacher."""

    def __call__(self, context: Context):
        return jnp.zeros(len(context.batch.noise)), {}


@dataclass(frozen=True)
class Row:
    """Row of a table: what is trained, and from where.

    Attributes:
      objective: a term or a sum; None: nothing, but what the student is measured as.
      first: objective of a first stage, at whose result the student starts.
      degraded: shares of a run after which the critic of a student that does not move is kept, as
        the networks "degraded/0", "degraded/1", ....
      bench: fields of the bench that differ.
    """

    objective: Term | None
    first: Term | None = None
    degraded: tuple[float, ...] = ()
    bench: Mapping[str, Any] = field(default_factory=dict)


class Setting(NamedTuple):
    """A teacher and a student.

    Attributes:
      title: of its tables.
      bench: makes both.
      start: the student's initial parameters; None: random ones.
    """

    title: str
    bench: Callable[[], Bench]
    start: Callable[[Bench], Params] | None = None


class Section(NamedTuple):
    """A table: its setting, what sets its rows apart from the setting's others, and the rows."""

    setting: str
    title: str
    rows: Mapping[str, Row]


def behind_rotation(bench: Bench) -> Params:
    """The teacher's map behind a rotation of the noise: its distribution without its
    correspondence of noise and sample."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(bench.dim, bench.dim)))[0]
    return bench.linear(bench.reference.jacobian[0] @ rotation, bench.teacher.mean)


RING = "A ring of 8 modes in 2 dimensions"
HALVES = tuple(
    replace(Mixture.ring(), means=means, variances=np.full(4, 0.25**2), weights=np.full(4, 0.25))
    for means in np.split(Mixture.ring().means, 2)
)
SETTINGS = {
    "flow_1": Setting(f"{RING}: flow, 1 step", lambda: Bench(Mixture.ring(), "flow", 1)),
    "flow_4": Setting(f"{RING}: flow, 4 steps", lambda: Bench(Mixture.ring(), "flow", 4)),
    "ddpm_1": Setting(f"{RING}: ddpm, 1 step", lambda: Bench(Mixture.ring(), "ddpm", 1)),
    "ddpm_4": Setting(f"{RING}: ddpm, 4 steps", lambda: Bench(Mixture.ring(), "ddpm", 4)),
    "prompts": Setting(
        "Two prompts, for the halves of the ring; prompt 0 is to become prompt 1: flow, 1 step",
        lambda: Bench(HALVES[1], prompts=HALVES),
    ),
    "dim_16": Setting(
        "8 random modes in 16 dimensions: flow, 1 step",
        lambda: Bench(Mixture.random(8, 16), width=128),
    ),
    "dim_64": Setting(
        "8 random modes in 64 dimensions: flow, 1 step",
        lambda: Bench(Mixture.random(8, 64), width=128),
    ),
    "rotated": Setting(
        "A Gaussian in 8 dimensions, from the teacher's map behind a rotation: flow, 1 step",
        lambda: Bench(Gaussian.random(8)),
        behind_rotation,
    ),
}


def rows_of(objectives: Mapping[str, Term | Row]) -> dict[str, Row]:
    """Rows by label."""
    return {k: v if isinstance(v, Row) else Row(v) for k, v in objectives.items()}


def with_and_without_gad(objectives: Mapping[str, Term | Row], tangents: GAD = TANGENTS):
    """Rows by label, each followed by the same with GAD."""
    rows = {}
    for label, row in rows_of(objectives).items():
        with_gad = replace(row, objective=1.0 * row.objective + 0.3 * tangents)
        rows |= {label: row, f"{label} + 0.3 GAD": with_gad}
    return rows


TEACHER_AND_START = rows_of({"teacher": Row(None), "start": Row(None)})
FIRST = rows_of(
    {
        "Regression": REGRESSION,
        "Regression + 0.1 GAD": REGRESSION + 0.1 * TANGENTS,
        "DMD": DMD(),
        "DMD + GADLift": DMD() + GADLift(),
        "DMD + 0.3 GAD": DMD() + 0.3 * TANGENTS,
        "TDM": TDM(),
        "TDM + 0.3 GAD": TDM() + 0.3 * TANGENTS,
    }
)
MORE_STEPS = rows_of(
    {
        "DMD + 0.3 GAD(whole)": DMD() + 0.3 * GAD("whole", steps=2 * FINE, loss="square"),
        "DMD + 0.05 Anchor": DMD() + 0.05 * Anchor(steps=FINE),
        "DMD + 0.05 Anchor + 0.3 GAD": DMD() + 0.05 * Anchor(steps=FINE) + 0.3 * TANGENTS,
        "TDM + GADScript": TDM() + GADScript(),
        "DMD + 0.3 SeedDifference": DMD() + 0.3 * SeedDifference(steps=FINE),
    }
)
METHODS = {
    "SiD": SiD(),
    "SiD(logit_normal, 1 - sigma)": SiD(
        low=0.0, high=1.0, times="logit_normal", weighting="1 - sigma"
    ),
    "0.5 SiD + 0.5 Adversarial": 0.5 * SiD() + 0.5 * Adversarial(clamp=10.0),
    "VSD": VSD(),
    "SIM": SIM(),
    "DecoupledDMD": DecoupledDMD(),
    "UniInstruct": UniInstruct(),
    "FDistill": FDistill(),
    "CDM": Row(CDM(), bench={"redraw": (0.25, 0.95), "critic_follow": 1e-3}),
    "PhasedDMD": PhasedDMD(),
    "DisBack": Row(DisBack(path=("degraded/1", "degraded/0")), degraded=(0.1, 0.3)),
    "UniDAD": UniDAD("teacher"),
    "DMD + 0.3 Embedding": DMD() + 0.3 * Embedding(),
    "GDD": GDD(),
}
# Trained at all times, and sampled in one step or with fresh noise.
CONSISTENCY = {
    "Consistency": Consistency(),
    "Consistency + 0.5 LADD": Consistency(images=True, variance_bins=16) + 0.5 * LADD((0,)),
    "ConsistencyDistillation": ConsistencyDistillation(),
    "TBCM": TBCM(points=4),
    "CT": CT(mean=0.2, std=1.6),
    "LCM": LCM(),
    "RCM": RCM(),
    "RCM + 2 DMD": RCM() + 2.0 * DMD(),
}
ONE_STEP = {
    "TSCD": TSCD(),
    "BOOT": BOOT(),
    "MeanFlow": MeanFlow(),
    "MeanFlow(power=1)": MeanFlow(power=1.0),
    "MeanFlow + TwinFlow": MeanFlow() + TwinFlow(),
}
# The law of prompt 1 is that of `sfd`'s prompt 0 as well: both are measured against it.
FORGOTTEN, KEPT = {"prompt": 0}, {"prompt": 1}
TWO_PROMPTS = {
    "SiD, prompt 0": Row(SiD(), bench=FORGOTTEN),
    "SFD, prompt 0": Row(SFD(), bench=FORGOTTEN),
    "SFD, prompt 1": Row(SFD(), bench=KEPT),
    "DMD, prompt 1": Row(DMD(), bench=KEPT),
    "DMD, a student of prompt 1 alone": Row(DMD(), bench={"prompts": ()}),  # of several students
}
STAGES = {
    "CT, then TCM": Row(TCM(mean=0.2, std=1.6), first=CONSISTENCY["CT"]),
    "DMD, then PSO": Row(PSO(), first=DMD()),
}
# Of the ODE in as many steps as the student has.
SEGMENTED = {
    "TSCD": TSCD(segments=(8, 4)),
    "MeanFlow": MeanFlow(),
    "MeanFlow(power=1)": MeanFlow(power=1.0),
    "MeanFlow + TwinFlow": MeanFlow() + TwinFlow(),
    "FlashDMD": Row(FlashDMD(), bench={"critic_follow": 1e-3}),
    "DMD, then PSO": Row(PSO(), first=DMD()),
}
FRESH = {"rollout": "fresh_noise"}
FRESH_NOISE = {"DMD (fresh noise)": Row(DMD(), bench=FRESH)} | {
    f"{label} (fresh noise)": Row(
        objective, bench=FRESH | ({"redraw": (0.0, 1.0)} if "RCM" in label else {})
    )
    for label, objective in CONSISTENCY.items()
}
FEW = {label: FIRST[label] for label in ("Regression", "DMD", "DMD + 0.3 GAD")}
SECTIONS = (
    Section("flow_1", "", FIRST),
    Section("flow_1", "other methods", with_and_without_gad(METHODS)),
    Section("flow_1", "consistency", with_and_without_gad(CONSISTENCY | ONE_STEP)),
    Section("flow_1", "second stages", with_and_without_gad(STAGES)),
    Section("flow_4", "", FIRST | MORE_STEPS),
    Section("flow_4", "other methods", with_and_without_gad(METHODS)),
    Section("flow_4", "steps of the ODE and second stages", with_and_without_gad(SEGMENTED)),
    Section("flow_4", "fresh noise between steps", with_and_without_gad(FRESH_NOISE, CLEAN)),
    Section("prompts", "", with_and_without_gad(TWO_PROMPTS)),
    Section("ddpm_1", "", FIRST),
    Section("ddpm_4", "", FIRST | MORE_STEPS),
    Section("dim_16", "", FEW),
    Section("dim_64", "", FEW),
    Section("rotated", "", {k: FIRST[k] for k in ("DMD", "DMD + GADLift", "DMD + 0.3 GAD")}),
)
# Terms of the registry without a row, and why.
NOT_HERE = {
    "denoising": "trains a network of many steps, which is where students here start",
    "dmm": "merges teachers by the style in a prompt, into a network of many steps",
    "ppcl": "matches the layers of a transformer, which students here do not have",
    "tether": "holds a distilled student that other terms repair",
}


@cache
def all_rows() -> dict[str, tuple[str, str, Row]]:
    """Setting, label and row by name, SETTING/LABEL in lower case without spaces, in order."""
    named = {}
    for setting, _, rows in SECTIONS:
        for label, row in (TEACHER_AND_START | rows).items():
            named.setdefault(row_name(setting, label), (setting, label, row))
    return named


def row_name(setting: str, label: str) -> str:
    """Name of a row, which is also that of its file."""
    kept = "".join(c if c.isalnum() or c in ".=" else "_" for c in label.lower())
    return f"{setting}/{'_'.join(part for part in kept.split('_') if part)}"
