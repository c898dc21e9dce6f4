"""One method a variant: students of the bundled teachers at guidance 4, mostly of 4 steps.

Reproduces: no published numbers; each variant is a method's objective in the setting of the study
          (docs/results/study): 800 updates of 16 samples, two critic updates for each.
          docs/methods.md has the papers, what each needs, and its cost.
Command:  gadjax train --config configs/methods.py:VARIANT --workdir DIR
Variants: dmd (default, for comparison); dmd_fresh (DMD2: noise is added between the steps); vsd
          (SwiftBrush); sim; sid_zero and sid_anti (few-step SiD with zero-CFG and anti-CFG);
          sid_dit (SiD-DiT's law and weight); sid_gan (the same and a discriminator); decoupled_dmd;
          pg_sb (SNOOPI: guidance 2 to 5); uni_instruct; f_distill; embedding (dmd with it); disback
          and uni_dad (here the teacher is the path and the second teacher:
          --config.objective.disback.path, --config.objective.uni_dad.target); cdm (grids drawn
          anew, a critic that follows the student); phased_dmd; phased_dmd_first and
          phased_dmd_second (an expert of two steps each, the second meant for
          --config.student.earlier_expert=WORKDIR of the first); cd (consistency distillation); tbcm
          (consistency on the teacher's own trajectory); ct (consistency training on pictures, which
          ignores the guidance); tcm (one step; meant for a student of ct,
          --config.student.init=WORKDIR); lcm; rcm (with dmd, and grids drawn anew); sprint
          (SANA-Sprint: sCM and LADD, two steps); tscd (Hyper-SD's segments, to 4 of them); boot
          (one step); meanflow; pso (meant for a distilled student, --config.student.init=WORKDIR;
          ignores the guidance); flash_dmd; gdd (one step; ignores the guidance); sfd (a student
          that draws blue things for red ones); twinflow (with meanflow); multi_student (dmd on the
          prompts of red things alone); dmm (merges the teacher with itself:
          --config.objective.dmm.teachers); ppcl (a smaller teacher of 4 of the 6 layers)
          dmd_fresh and those from cd to sprint are of the eps teacher and, but for tcm, sampled
          with fresh noise; WITH_PICTURES draw captions with pictures of the bundled world.
Hardware: 2 CPU cores, up to 8 minutes a variant (the slowest, gdd, by its first 81 updates).
Result:   docs/results/study/README.md (methods), docs/results/README.md (Other methods).
"""

from gadjax.training.config import variant_config

SID_DIT = {"times": "logit_normal", "low": 0.0, "high": 1.0, "weighting": "1 - sigma"}
VARIANTS = {
    "dmd": {"dmd": {}},
    "dmd_fresh": {"dmd": {}},
    "vsd": {"vsd": {}},
    "sim": {"sim": {}},
    "sid_zero": {"sid": {"guidance": "zero"}},
    "sid_anti": {"sid": {"guidance": "anti"}},
    "sid_dit": {"sid": SID_DIT},
    "sid_gan": {"sid": {"weight": 0.5} | SID_DIT, "adversarial": {"weight": 0.5, "clamp": 10.0}},
    "decoupled_dmd": {"decoupled_dmd": {}},
    "pg_sb": {"dmd": {"guidance_range": (2.0, 5.0)}},
    "uni_instruct": {"uni_instruct": {"divergence": "rkl"}},  # "kl" breaks: docs/results
    "f_distill": {"f_distill": {}},
    "embedding": {"dmd": {}, "embedding": {"weight": 0.1}},
    "disback": {"disback": {"path": ("teacher",)}},
    "uni_dad": {"uni_dad": {"target": "teacher"}},
    "cdm": {"cdm": {}},
    "phased_dmd": {"phased_dmd": {}},
    "phased_dmd_first": {"phased_dmd": {}},
    "phased_dmd_second": {"phased_dmd": {}},
    "cd": {"cd": {"huber": 1e-3}},
    "tbcm": {"tbcm": {"points": 4}},
    "ct": {"ct": {}},
    "tcm": {"tcm": {}},
    "lcm": {"lcm": {}},
    "rcm": {"rcm": {}, "dmd": {"weight": 2.0}},
    "sprint": {
        "consistency": {"images": True, "variance_bins": 16, "warmup": 100},
        "ladd": {"weight": 0.5, "blocks": (0, 2, 4, 5), "mismatched": True},
    },
    "tscd": {"tscd": {"segments": (8, 4)}},
    "pso": {"pso": {}},
    "boot": {"boot": {}},
    "meanflow": {"meanflow": {}},
    "flash_dmd": {"flash_dmd": {}},
    "gdd": {"gdd": {}},
    "sfd": {"sfd": {}},
    "twinflow": {"twinflow": {}, "meanflow": {}},
    "multi_student": {"dmd": {}},
    "dmm": {"dmm": {"teachers": ("teacher", "start")}},
    "ppcl": {"ppcl": {}, "denoising": {}},
}
WITH_PICTURES = (
    "sid_gan",
    "uni_instruct",
    "uni_dad",
    "f_distill",
    "embedding",
    "cd",
    "ct",
    "tcm",
    "lcm",
    "rcm",
    "sprint",
    "tscd",
    "pso",
    "meanflow",
    "flash_dmd",
    "gdd",
    "twinflow",
    "ppcl",
)
# Sampled with fresh noise, which the flow teacher's pipeline has no scheduler for.
FRESH_NOISE = "dmd_fresh", "cd", "tbcm", "ct", "lcm", "rcm", "sprint"


def get_config(variant: str = "dmd"):
    config = variant_config(VARIANTS, variant)
    config.teacher = "asset:shapes_flow_teacher"
    config.guidance = 4.0
    config.student.steps = 4
    config.student.timesteps = (999, 749.25, 499.5, 249.75)
    config.steps = 800
    config.batch = 16
    config.remat = "none"
    config.attention = "jnp"  # 16 positions: a kernel has nothing to gain
    config.optim.update(lr=2e-4, warmup=20, decay=800, b1=0.0, b2=0.95)
    config.critic.update(updates=2, lr=4e-4)
    config.ema = 0.98
    if variant in WITH_PICTURES:
        config.data.update(world="gadjax.worlds.shapes", cache=4096, length=16)
    else:
        config.data.update(prompts="asset:shapes_prompts.txt", length=16)
    if variant in FRESH_NOISE:
        config.teacher = "asset:shapes_teacher"
        config.student.update(timesteps=(899, 674, 449, 224), rollout="fresh_noise")
    if variant == "cdm":
        config.student.redraw = (0.25, 0.95)
        config.critic.follow = 1e-3
    if variant == "rcm":  # its rate: docs/methods.md
        config.student.redraw = (0.0, 1.0)
        config.optim.lr = 5e-5
    if variant == "sprint":  # the first of two drawn steps is SANA-Sprint's half at the last time
        config.student.update(steps=2, timesteps=(899, 449), latents="data", redraw=(0.0, 1.0))
    if variant.startswith("phased_dmd_"):
        config.student.trained_steps = (0, 2) if variant.endswith("first") else (2, 4)
    if variant in ("boot", "gdd"):
        config.student.update(steps=1, timesteps=(999,))
    if variant == "tcm":
        config.teacher = "asset:shapes_teacher"
        config.student.update(steps=1, timesteps=(899,))
    if variant == "flash_dmd":
        config.critic.follow = 1e-3
    if variant == "sfd":
        config.data.update(forget="red", replacement="blue")
    if variant == "dmm":
        config.data.styles = ("", ", in ink")
    if variant == "multi_student":
        config.data.match = "red"
    if variant == "ppcl":
        config.student.layers = (0, 1, 3, 5)
        config.data.dropout = 0.1
    config.checkpoint.update(every=200, keep=1)
    config.log.every = 20
    config.preview.every = 400
    return config
