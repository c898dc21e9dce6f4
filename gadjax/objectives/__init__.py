"""Objectives: one file each. TERMS is what a config's `objective` may name."""

from gadjax.objectives.anchor import Anchor
from gadjax.objectives.base import Context, Needs, TeacherMap, Term
from gadjax.objectives.compose import Sum, build
from gadjax.objectives.denoising import Denoising
from gadjax.objectives.dmd import DMD
from gadjax.objectives.gad import GAD
from gadjax.objectives.gad_lift import GADLift
from gadjax.objectives.gad_script import GADScript
from gadjax.objectives.regression import Regression
from gadjax.objectives.tdm import TDM

TERMS = {
    "anchor": Anchor,
    "denoising": Denoising,
    "dmd": DMD,
    "gad": GAD,
    "gad_lift": GADLift,
    "gad_script": GADScript,
    "regression": Regression,
    "tdm": TDM,
}

__all__ = [
    "GAD",
    "DMD",
    "TDM",
    "TERMS",
    "Anchor",
    "Context",
    "Denoising",
    "GADLift",
    "GADScript",
    "Needs",
    "Regression",
    "Sum",
    "TeacherMap",
    "Term",
    "build",
]
