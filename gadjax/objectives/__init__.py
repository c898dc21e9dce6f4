"""Objectives: one file each. TERMS is what a config's `objective` may name."""

from gadjax.objectives.anchor import Anchor
from gadjax.objectives.base import Context, Needs, TeacherMap, Term
from gadjax.objectives.compose import Sum, build
from gadjax.objectives.denoising import Denoising
from gadjax.objectives.dmd import DMD
from gadjax.objectives.gad import GAD
from gadjax.objectives.regression import Regression

TERMS = {
    "anchor": Anchor,
    "denoising": Denoising,
    "dmd": DMD,
    "gad": GAD,
    "regression": Regression,
}

__all__ = [
    "GAD",
    "DMD",
    "TERMS",
    "Anchor",
    "Context",
    "Denoising",
    "Needs",
    "Regression",
    "Sum",
    "TeacherMap",
    "Term",
    "build",
]
