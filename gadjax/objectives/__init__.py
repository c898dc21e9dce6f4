"""Objective terms, one file each; TERMS is the registry of their config names."""

from gadjax.objectives.adversarial import Adversarial
from gadjax.objectives.anchor import Anchor
from gadjax.objectives.base import Context, Needs, TeacherMap, Term
from gadjax.objectives.boot import BOOT
from gadjax.objectives.cd import ConsistencyDistillation
from gadjax.objectives.cdm import CDM
from gadjax.objectives.comparisons.gad_lift import GADLift
from gadjax.objectives.comparisons.gad_script import GADScript
from gadjax.objectives.comparisons.seed_difference import SeedDifference
from gadjax.objectives.compose import TERMS, Sum, as_config, build
from gadjax.objectives.consistency import Consistency
from gadjax.objectives.ct import CT
from gadjax.objectives.decoupled_dmd import DecoupledDMD
from gadjax.objectives.denoising import Denoising
from gadjax.objectives.disback import DisBack
from gadjax.objectives.dmd import DMD
from gadjax.objectives.dmm import DMM
from gadjax.objectives.embedding import Embedding
from gadjax.objectives.f_distill import FDistill
from gadjax.objectives.flash_dmd import FlashDMD
from gadjax.objectives.gad import GAD
from gadjax.objectives.gdd import GDD
from gadjax.objectives.ladd import LADD
from gadjax.objectives.lcm import LCM
from gadjax.objectives.meanflow import MeanFlow
from gadjax.objectives.phased_dmd import PhasedDMD
from gadjax.objectives.ppcl import PPCL
from gadjax.objectives.pso import PSO
from gadjax.objectives.rcm import RCM
from gadjax.objectives.regression import Regression
from gadjax.objectives.sfd import SFD
from gadjax.objectives.sid import SiD
from gadjax.objectives.sim import SIM
from gadjax.objectives.tbcm import TBCM
from gadjax.objectives.tcm import TCM
from gadjax.objectives.tdm import TDM
from gadjax.objectives.tether import Tether
from gadjax.objectives.tscd import TSCD
from gadjax.objectives.twinflow import TwinFlow
from gadjax.objectives.uni_dad import UniDAD
from gadjax.objectives.uni_instruct import UniInstruct
from gadjax.objectives.vsd import VSD

TERMS |= {
    "adversarial": Adversarial,
    "anchor": Anchor,
    "boot": BOOT,
    "cd": ConsistencyDistillation,
    "cdm": CDM,
    "consistency": Consistency,
    "ct": CT,
    "decoupled_dmd": DecoupledDMD,
    "denoising": Denoising,
    "disback": DisBack,
    "dmd": DMD,
    "dmm": DMM,
    "embedding": Embedding,
    "f_distill": FDistill,
    "flash_dmd": FlashDMD,
    "gad": GAD,
    "gad_lift": GADLift,
    "gad_script": GADScript,
    "gdd": GDD,
    "ladd": LADD,
    "lcm": LCM,
    "meanflow": MeanFlow,
    "phased_dmd": PhasedDMD,
    "ppcl": PPCL,
    "pso": PSO,
    "rcm": RCM,
    "regression": Regression,
    "seed_difference": SeedDifference,
    "sfd": SFD,
    "sid": SiD,
    "sim": SIM,
    "tbcm": TBCM,
    "tcm": TCM,
    "tdm": TDM,
    "tether": Tether,
    "tscd": TSCD,
    "twinflow": TwinFlow,
    "uni_dad": UniDAD,
    "uni_instruct": UniInstruct,
    "vsd": VSD,
}

__all__ = [
    "Adversarial",
    "Anchor",
    "BOOT",
    "CDM",
    "CT",
    "Consistency",
    "ConsistencyDistillation",
    "Context",
    "DMD",
    "DMM",
    "DecoupledDMD",
    "Denoising",
    "DisBack",
    "Embedding",
    "FDistill",
    "FlashDMD",
    "GAD",
    "GADLift",
    "GADScript",
    "GDD",
    "LADD",
    "LCM",
    "MeanFlow",
    "Needs",
    "PhasedDMD",
    "PPCL",
    "PSO",
    "RCM",
    "Regression",
    "SFD",
    "SIM",
    "SeedDifference",
    "SiD",
    "Sum",
    "TBCM",
    "TCM",
    "TDM",
    "TERMS",
    "TSCD",
    "TeacherMap",
    "Term",
    "Tether",
    "TwinFlow",
    "UniDAD",
    "UniInstruct",
    "VSD",
    "as_config",
    "build",
]
