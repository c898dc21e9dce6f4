"""SANA to 2 steps with sCM and LADD, as SANA-Sprint, at 1024 pixels.

Reproduces: the kind of run of SANA-Sprint (arXiv 2503.09641) with its code's settings: sCM on
          noised pictures with a warm-up of 4,000 updates and a learnt variance; LADD of weight 0.5
          with heads on blocks 2, 8, 14 and 19 of the frozen teacher, a hinge, mismatched captions
          as further fakes and its law of times, the student's inputs half at the last time; rate
          2e-6, clip 0.1, one update of the heads for one of the student's; sampled at TrigFlow's
          times pi / 2 and 1.3, with fresh noise between them.
Differs:  AdamW for CAME; one guidance, which the student does not have as an input, where the code
          embeds 4, 4.5 or 5; sCM's times are uniform in the angle (the code: the arctangent of a
          log-normal); no fine-tuning of the teacher before, which gives the code's network norms of
          queries and keys and a smoother embedding of time. Its batch and number of updates are not
          known to us.
Command:  gadjax train --config configs/sana_sprint.py --workdir DIR
              --config.teacher=PATH/Sana_1600M_1024px_diffusers --config.data.latents=LATENTS
          (LATENTS of gadjax embed --images)
Variants: sprint (default); gad (with GAD)
Hardware: meant for 32 TPU v5e chips or 8 GPUs of 80 GB.
Result:   not yet run.
"""

from gadjax.training.config import variant_config

SPRINT = {
    "consistency": {"images": True, "warmup": 4000, "variance_bins": 32},
    "ladd": {"weight": 0.5, "blocks": (2, 8, 14, 19), "mismatched": True},
}
VARIANTS = {
    "sprint": SPRINT,
    "gad": SPRINT | {"gad": {"weight": 1.0, "end": "clean", "steps": 4, "loss": "square"}},
}


def get_config(variant: str = "sprint"):
    config = variant_config(VARIANTS, variant)
    config.teacher = ""  # --config.teacher=PATH/Sana_1600M_1024px_diffusers
    config.guidance = 4.5
    # The first of the two drawn steps is SANA-Sprint's half at the last time.
    config.student.update(
        steps=2,
        timesteps=(1000, 783),
        rollout="fresh_noise",
        latents="data",
        redraw=(0.0, 1.0),
    )
    config.steps = 10_000
    config.batch = 128
    config.dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.data.length = 300
    config.optim.update(lr=2e-6, b1=0.0, b2=0.999, clip=0.1)
    config.critic.update(updates=1, lr=2e-6)
    return config
