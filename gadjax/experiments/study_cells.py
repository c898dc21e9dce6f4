"""Cells of the study: teacher, student, objective and terms of each, as configs."""

import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from gadjax.errors import InputError
from gadjax.models.adapters import TARGETS
from gadjax.training.config import CONFIGS, changed_config, default_config, read_config

BASES = {"regression": {"steps": 4}, "dmd": {}, "tdm": {}, "sid": {}}
GAD = {"weight": 0.3, "steps": 4, "loss": "square"}
POLAR = GAD | {"loss": "polar"}
ANCHOR = {"weight": 0.05, "target": "v", "steps": 4}
REGRESSION = {"weight": 1.0, "steps": 4}
ADDED = {
    "none": {},
    "reg": {"regression": REGRESSION},
    "gad": {"gad": GAD},
    "polar": {"gad": POLAR},
    "anchor": {"anchor": ANCHOR},
}
ALONE = "none", "gad", "polar", "anchor", "gad_anchor", "polar_anchor"
COMBINED = (*ALONE, "reg", "reg_polar", "reg_polar_anchor")


def map_steps(steps: int) -> dict[str, dict]:
    """Objective changes for a teacher map of `steps` steps, which GAD and the anchor share."""
    return {"gad": POLAR | {"steps": steps}, "anchor": ANCHOR | {"steps": steps}}


# Ablations of dmd_polar_anchor: name -> the terms that it changes.
CHANGES = {
    "map_1": map_steps(1),
    "map_2": map_steps(2),
    "map_8": map_steps(8),
    "weight_0.1": {"gad": POLAR | {"weight": 0.1}},
    "weight_1": {"gad": POLAR | {"weight": 1.0}},
    "directions_4": {"gad": POLAR | {"directions": 4}},
    "low_frequency": {"gad": POLAR | {"direction": "low_frequency"}},
    "control": {"gad": POLAR | {"direction": "control"}},
    "clean": {"gad": POLAR | {"end": "clean"}},
    "whole": {"gad": POLAR | {"end": "whole", "steps": 8}},
    "first_step": {"gad": POLAR | {"step_weights": (4.0, 0.0, 0.0, 0.0)}},
    "later_steps": {"gad": POLAR | {"step_weights": (0.0, 4 / 3, 4 / 3, 4 / 3)}},
    "one_in_2": {"gad": POLAR | {"one_in": 2}},
    "one_in_4": {"gad": POLAR | {"one_in": 4}},
    "map_2_one_in_4": {
        "gad": POLAR | {"steps": 2, "one_in": 4},
        "anchor": ANCHOR | {"steps": 2},
    },
    "strong": {
        "gad": POLAR | {"weight": 1.0, "one_in": 4},
        "anchor": ANCHOR | {"weight": 0.2},
    },
    "anchor_late": {"anchor": ANCHOR | {"until": 499.5}},
    "anchor_weight_0.2": {"anchor": ANCHOR | {"weight": 0.2}},
}
# Cells of configs/methods.py: METHODS/NAME, and METHODS/NAME + WITH_TERMS with both terms.
METHODS, WITH_TERMS = "methods", "_gad_anchor"
# Second stages: the variant whose student is before them, and the setting that names it.
STAGES = {
    "tcm": ("ct", "init"),
    "pso": ("dmd", "init"),
    "phased_dmd_second": ("phased_dmd_first", "earlier_expert"),
}
# The same objective for as many network evaluations as dmd_polar_anchor takes.
LONGER = {"dmd_long": ("dmd_none", 1.92), "dmd_reg_long": ("dmd_reg", 1.4)}


@dataclass(frozen=True)
class Family:
    """Teacher with the guidance of its distillation and evaluation, and the student's timesteps.

    map_steps: of the teacher in one of the student's steps.
    changes: of the config beside these.
    """

    teacher: str
    guidance: float
    times: tuple[float, ...]
    map_steps: int = 4
    changes: Mapping[str, Any] = field(default_factory=dict)


FLOW, EPS = "asset:shapes_flow_teacher", "asset:shapes_teacher"
FLOW_4, EPS_4 = (999, 749.25, 499.5, 249.75), (899, 674, 449, 224)
# Student and critic as adapters; the student's rate is that of a repair's.
ADAPTERS = {"student": {"lora": {"rank": 16}}, "optim": {"lr": 1e-3}, "critic": {"lr": 2e-3}}
FAMILIES = {
    "flow": Family(FLOW, 4.0, FLOW_4),
    "flow_2_steps": Family(FLOW, 4.0, (999, 499.5)),
    "flow_1_step": Family(FLOW, 4.0, (999,), map_steps=8),
    "eps": Family(EPS, 4.0, EPS_4),
    "flow_guidance_2": Family(FLOW, 2.0, FLOW_4),
    "flow_guidance_7": Family(FLOW, 7.0, FLOW_4),
    "flow_adapters": Family(FLOW, 4.0, FLOW_4, changes=ADAPTERS),
    "flow_adapters_int8": Family(FLOW, 4.0, FLOW_4, changes=ADAPTERS | {"int8": TARGETS}),
}


def objectives() -> dict[str, dict]:
    """Objectives by variant, as a config spells them."""
    variants = {}
    for base, options in BASES.items():
        for added in ALONE if base == "regression" else COMBINED:
            parts = (ADDED[name] for name in added.split("_"))
            variants[f"{base}_{added}"] = {base: options}
            for part in parts:
                variants[f"{base}_{added}"] |= part
    for name, changed in CHANGES.items():
        variants[name] = variants["dmd_polar_anchor"] | changed
    for weight in (0.3, 3.0, 10.0):
        extra = {"regression": REGRESSION | {"weight": weight}}
        variants[f"dmd_reg_{weight:g}"] = {"dmd": {}} | extra
    variants["script"] = {"tdm": {}, "gad_script": {}}
    variants["script_half"] = {"tdm": {}, "gad_script": {"half": True}}
    return variants | {name: variants[of] for name, (of, _) in LONGER.items()}


def method_names() -> list[str]:
    """Names of the variants of configs/methods.py: those of one teacher and grid together."""
    names = runpy.run_path(str(CONFIGS / "methods.py"))["VARIANTS"]

    def place(name: str) -> tuple:
        config = method_config(name)
        return config.teacher != FLOW, -config.student.steps

    return sorted(names, key=place)


def method_config(variant: str) -> ConfigDict:
    """Config of a variant NAME of configs/methods.py, or of NAME_gad_anchor.

    That has the polar GAD and the anchor beside it: to the clean end where noise is added between
    the steps, and with the anchor on x0 for a teacher of eps. Where there is one step, no anchor.
    """
    name = variant.removesuffix(WITH_TERMS)
    config = read_config([f"--config=methods:{name}"])
    if name == variant:
        return config
    one, fresh = config.student.steps == 1, config.student.rollout != "ode"
    steps = {"steps": 8 if one else 4}
    added = {"gad": POLAR | steps | ({"end": "clean"} if fresh else {})}
    if not one:
        added["anchor"] = ANCHOR | steps | ({} if config.teacher == FLOW else {"target": "x0"})
    config.objective = config.objective.to_dict() | added
    return config


def cells() -> list[str]:
    """Cells of the study, the most informative first."""
    grid = [f"{base}_{name}" for base in ("dmd", "tdm", "sid") for name in COMBINED]
    alone = [f"regression_{name}" for name in ALONE]
    dmd = [f"dmd_{name}" for name in COMBINED]
    few = ["regression_none", "regression_polar_anchor", *dmd, "dmd_reg_3", "strong"]
    few += ["tdm_none", "tdm_polar_anchor"]
    one = [
        f"dmd_{name}" for name in ("none", "reg", "reg_3", "reg_10", "gad", "polar", "reg_polar")
    ]
    one += ["regression_none", "regression_polar", "sid_none", "sid_polar"]
    some = ["regression_none", "dmd_none", "dmd_reg", "dmd_polar", "dmd_polar_anchor"]
    seven = [*some, "dmd_reg_3", "dmd_reg_10", "dmd_anchor", "weight_1", "strong", "map_2"]
    variants = {
        "flow": [*alone, *grid, *LONGER, *CHANGES, "dmd_reg_0.3", "dmd_reg_3", "dmd_reg_10"],
        "flow_2_steps": few,
        "flow_1_step": one,
        "eps": [
            "regression_none",
            "regression_polar_anchor",
            *dmd,
            "dmd_reg_3",
            "dmd_reg_10",
            "strong",
        ],
        "flow_guidance_2": some,
        "flow_guidance_7": seven,
        "flow_adapters": [*some, "dmd_reg_3", "dmd_reg_10"],
        "flow_adapters_int8": ["dmd_polar_anchor", "regression_none"],
    }
    variants["flow"] += ["script", "script_half"]
    names = [name for name in method_names() if name != "phased_dmd_first"]  # half of a student
    methods = [f"{METHODS}/{cell}" for name in names for cell in (name, name + WITH_TERMS)]
    # The first two have as many steps as the teacher, the last not the first step.
    for name in ("dmm", "ppcl", "phased_dmd_second"):
        methods.remove(f"{METHODS}/{name}{WITH_TERMS}")
    return [f"{family}/{name}" for family in FAMILIES for name in variants[family]] + methods


def config_of(cell: str):
    """Config of a cell FAMILY/VARIANT. Raises: InputError for one that is not known."""
    known, (name, _, variant) = objectives(), cell.partition("/")
    if name == METHODS:
        return method_config(variant)
    if name not in FAMILIES or variant not in known:
        raise InputError(
            f"cell: found {cell!r}; expected FAMILY/VARIANT, of {', '.join(FAMILIES)} and "
            f"{', '.join(known)}; or {METHODS}/NAME of configs/methods.py"
        )
    family = FAMILIES[name]
    config = default_config()
    config.teacher = family.teacher
    config.guidance = family.guidance
    config.student.update(steps=len(family.times), timesteps=family.times)
    objective = {term: dict(options) for term, options in known[variant].items()}
    for term in {"gad", "regression", "anchor"} & set(objective):
        if objective[term]["steps"] == 4:
            objective[term]["steps"] = family.map_steps
    config.objective = objective
    config.steps = round(800 * LONGER[variant][1]) if variant in LONGER else 800
    config.batch = 16
    config.remat = "none"
    config.attention = "jnp"  # 16 positions: a kernel has nothing to gain
    config.optim.update(lr=2e-4, warmup=20, decay=config.steps, b1=0.0, b2=0.95)
    config.critic.update(updates=2, lr=4e-4)
    config.ema = 0.98
    config.data.update(prompts="asset:shapes_prompts.txt", length=16)
    config.checkpoint.update(every=200, keep=1)
    config.log.every = 20
    config.preview.every = 400
    return changed_config(config, family.changes)
