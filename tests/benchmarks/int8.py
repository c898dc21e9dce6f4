"""What 8-bit kernels do to a teacher: its outputs, tangents and pictures.

    python tests/benchmarks/int8.py [--teacher asset:shapes_flow_teacher] [--seeds 3] [--count 32]

Prints, for kernels of attention and feed-forward and for all, the share of the float32 network's
bytes that is left, and root mean square errors relative to the float32 network: of the guided
output and of its tangent in a random direction of the noise, at three times; and of pictures, in
their values of 0 to 1. Seconds: `python tests/benchmarks/run.py cpu --only adapters`.
"""

import argparse
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from gadjax.api import load
from gadjax.diffusion.geometry import tangent
from gadjax.models.adapters import TARGETS
from gadjax.models.quantized import quantized
from gadjax.pipelines.sampling import draw, initial_noise, map_prompts

PATTERNS = {"attention and feed-forward": TARGETS, "all": "kernel"}
SHARES = 0.9, 0.6, 0.3  # of the schedule's last time


def size(params) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))


def rms(a, b=0.0) -> float:
    return float(np.sqrt(np.mean(np.square(a - b))))


def responses(model, prompts, seed):
    """Guided outputs and tangents [N, 2 * times, H, W, C] at noises of a seed."""
    pipeline, name = model.pipeline, model.pipeline.backbone
    denoiser = pipeline.denoiser
    scale = denoiser.guidance_scale(model.sampling.guidance)
    x, u = (initial_noise(seed + n, len(prompts), pipeline.latent) for n in (0, 1000))

    def both(params, x, u, cond, null):
        parts = []
        for share in SHARES:
            t = jnp.full(len(x), share * denoiser.schedule.last)
            predict = denoiser.guided_fn(params[name], cond, null, scale)
            parts += tangent(lambda x, t=t, p=predict: p(x, t).x0, x, u)
        return jnp.stack(parts, 1)

    return map_prompts(both, model, prompts, (x, u))


def measure(model, prompts, seed, pattern) -> dict[str, float]:
    name = model.pipeline.backbone
    low = replace(model, params=model.params | {name: quantized(model.params[name], pattern)})
    noise = initial_noise(seed, len(prompts), model.pipeline.latent)
    exact, rough = (responses(m, prompts, seed) for m in (model, low))
    pictures = [draw(m, prompts, noise) / 2 + 0.5 for m in (model, low)]
    return {
        "output": rms(exact[:, ::2], rough[:, ::2]) / rms(exact[:, ::2]),
        "tangent": rms(exact[:, 1::2], rough[:, 1::2]) / rms(exact[:, 1::2]),
        "pictures": rms(*pictures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="asset:shapes_flow_teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=32, help="prompts")
    args = parser.parse_args()
    from gadjax.assets import resolve
    from gadjax.data.prompts import read_prompts

    model = load(args.teacher)
    prompts = read_prompts(resolve("asset:shapes_test_prompts.txt"))[: args.count]
    backbone = model.params[model.pipeline.backbone]
    for label, pattern in PATTERNS.items():
        share = size(quantized(backbone, pattern)) / size(backbone)
        rows = [measure(model, prompts, seed, pattern) for seed in range(args.seeds)]
        text = ", ".join(
            f"{key} {np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
            for key in rows[0]
            for values in [[row[key] for row in rows]]
        )
        print(f"{label}: {share:.2f} of the bytes; {text}", flush=True)


if __name__ == "__main__":
    main()
