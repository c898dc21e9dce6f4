"""Objective terms, one file each; TERMS is the registry of their config names."""

from gadjax.objectives.adversarial import Adversarial
from gadjax.objectives.anchor import Anchor
from gadjax.objectives.base import Context, Needs, TeacherMap, Term
from gadjax.objectives.comparisons.gad_lift import GADLift
from gadjax.objectives.comparisons.gad_script import GADScript
from gadjax.objectives.compose import TERMS, Sum, as_config, build
from gadjax.objectives.consistency import Consistency
from gadjax.objectives.decoupled_dmd import DecoupledDMD
from gadjax.objectives.denoising import Denoising
from gadjax.objectives.dmd import DMD
from gadjax.objectives.gad import GAD
from gadjax.objectives.regression import Regression
from gadjax.objectives.sid import SiD
from gadjax.objectives.sim import SIM
from gadjax.objectives.tdm import TDM
from gadjax.objectives.vsd import VSD

TERMS |= {
    "adversarial": Adversarial,
    "anchor": Anchor,
    "consistency": Consistency,
    "decoupled_dmd": DecoupledDMD,
    "denoising": Denoising,
    "dmd": DMD,
    "gad": GAD,
    "gad_lift": GADLift,
    "gad_script": GADScript,
    "regression": Regression,
    "sid": SiD,
    "sim": SIM,
    "tdm": TDM,
    "vsd": VSD,
}

__all__ = [
    "GAD",
    "DMD",
    "SIM",
    "TDM",
    "TERMS",
    "VSD",
    "Adversarial",
    "Anchor",
    "Consistency",
    "Context",
    "DecoupledDMD",
    "Denoising",
    "GADLift",
    "GADScript",
    "Needs",
    "Regression",
    "SiD",
    "Sum",
    "TeacherMap",
    "Term",
    "as_config",
    "build",
]
