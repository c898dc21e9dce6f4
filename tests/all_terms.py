"""An objective with every term, small enough for closed-form worlds."""

from gadjax.objectives import TERMS

DMD = {"dmd": {}}
# Objectives of one term where that is one, otherwise beside another.
OBJECTIVES = {name: {name: {}} for name in TERMS} | {
    "adversarial": DMD | {"adversarial": {"hidden": 8}},
    "anchor": DMD | {"anchor": {"steps": 1}},
    "consistency": {"consistency": {"variance_bins": 4, "images": True, "warmup": 6}},
    "disback": {"disback": {"path": ("a", "b")}},
    "dmm": {"dmm": {"teachers": ("a", "b"), "features": 0.5, "blocks": (1,)}},
    "f_distill": {"f_distill": {"hidden": 8}},
    "flash_dmd": {"flash_dmd": {"width": 2, "r1": 0.1}},
    "gad": DMD | {"gad": {"steps": 1}},
    "gad_lift": DMD | {"gad_lift": {}},
    "gad_script": {"tdm": {}, "gad_script": {}},
    "gdd": {"gdd": {"width": 2}},
    "ladd": {"ladd": {"blocks": (0, 2), "hidden": 8, "r1": 0.1}},
    "ladd mismatched": {"ladd": {"blocks": (0, 2), "hidden": 8, "mismatched": True}},
    "tbcm": {"tbcm": {"points": 2}},
    "tcm": {"tcm": {"transition": 0.5}},
    "tscd": {"tscd": {"segments": (4, 1)}},
    "uni_dad": {"uni_dad": {"target": "a", "hidden": 8}},
    "uni_instruct": {"uni_instruct": {"hidden": 8}},
}
