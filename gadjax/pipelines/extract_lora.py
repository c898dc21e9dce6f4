"""LoRA out of two pipeline folders, with the error of its pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import PipelineFolder
from gadjax.formats.lora_extract import Difference, extract_difference
from gadjax.formats.lora_file import Factors, add_factors
from gadjax.formats.lora_names import layers_of
from gadjax.formats.model_card import Export, read_license
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import SamplingConfig, read_sampling
from gadjax.formats.scheduler_config import STOCHASTIC, student_scheduler_config
from gadjax.formats.schedulers import sampler_from_config
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.pipelines.diffusers_calls import call_arguments
from gadjax.pipelines.lora_folder import LoraExport
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import make_pipeline
from gadjax.pipelines.sampling import draw, few_step_settings, initial_noise

WORST = 10  # layers of the printed table
SEEDS = 4  # pictures of the prompt


class Extract(NamedTuple):
    """An extracted LoRA.

    Attributes:
      before, after: the two pipelines.
      difference: factors, and their errors.
      sampling: sampling settings of the second pipeline.
    """

    before: PipelineFolder
    after: PipelineFolder
    difference: Difference
    sampling: SamplingConfig


def extract(before: Path, after: Path, rank: int | None, energy: float | None) -> Extract:
    """Extract the LoRA that makes one pipeline's backbone of another's.

    Args:
      before: pipeline folder that the LoRA is for.
      after: pipeline folder with a backbone of the same configuration.
      rank, energy: as `extract_difference` takes them.

    Raises: InputError for backbones that are not of one configuration, or do not differ.
    """
    first, second = (open_folder(path, components=()) for path in (before, after))
    a, b = (folder.components[folder.backbone] for folder in (first, second))
    if a.spec != b.spec or a.family is not b.family:
        raise InputError(
            f"{after}: found a {b.family.class_names[0]} of another configuration than in {before};"
            " expected the same"
        )
    first = open_folder(before, components=(first.backbone,))
    second = open_folder(after)
    a, b = (folder.components[folder.backbone] for folder in (first, second))
    difference = extract_difference(a, b, rank, energy)
    sampling = read_sampling(after, make_pipeline(second).sampling)
    return Extract(first, second, difference, sampling)


def lora_export(extracted: Extract, name: str) -> LoraExport:
    """The LoRA with its scheduler, settings and card.

    A distilled student's has the student's timesteps.

    Args:
      extracted: the LoRA.
      name: of the folder to be written.
    """
    before, sampling = extracted.before, extracted.sampling
    kind = before.model_index["_class_name"]
    part, scheduler, used = before.components[before.backbone], None, sampling
    few = few_step_settings(make_pipeline(extracted.after), sampling)
    if few is not None:
        times, rollout = few
        used = replace(sampling, rollout=rollout)
    # A scheduler whose steps add noise stays: none of a student's takes its place.
    if few is not None and before.scheduler["_class_name"] not in STOCHASTIC:
        scheduler = student_scheduler_config(before.scheduler, times, kind, rollout)
        used = replace(used, timesteps=times, steps=len(times))
        takes = sampler_from_config(scheduler, kind).takes_timesteps
        sampling = used if takes else replace(used, timesteps=None)
    description = Export(
        name=name,
        sampling=sampling,
        times=few and few[0],
        teacher=before.path.name,
        fingerprint=fingerprint(tensors_from_params(part.params, part.keymap)),
        latent=(part.spec.sample_size, part.spec.sample_size, part.spec.latent_channels),
        pipeline=kind,
        arguments=call_arguments(before, kind, sampling),
        license=read_license(extracted.after.path),
        origin=_origin(extracted),
    )
    return LoraExport(before, extracted.difference.pairs, scheduler, used, description)


def _origin(extracted: Extract) -> str:
    difference = extracted.difference
    return (
        f"Rank {difference.rank} of the difference of two networks, by singular value "
        f"decomposition. It leaves out {difference.error:.1%} of the difference's norm "
        "(`errors.json` has the layers)."
    )


def errors_json(difference: Difference) -> str:
    """Text of errors.json: relative errors of the layers, and what has no factors."""
    layers = {e.module: {"size": e.size, "error": e.error} for e in difference.layers}
    summary = {"rank": difference.rank, "error": difference.error}
    return json.dumps(summary | {"layers": layers, "left out": difference.left_out}, indent=2)


def table(difference: Difference) -> str:
    """Lines on the errors: of all layers together, and of the worst ones."""
    layers, left_out = difference.layers, difference.left_out
    total = sum(e.size**2 for e in layers) + sum(x**2 for x in left_out.values())
    lines = [
        f"rank {difference.rank}, {len(layers)} layers: leaves out {difference.error:.2%} of the "
        "difference's norm"
    ]
    if left_out:
        share = sum(x**2 for x in left_out.values()) / total
        lines.append(f"{len(left_out)} norms and biases differ too: {share:.2%} of its square")
    if noisy := sum(e.noise >= e.size for e in layers):
        lines.append(f"{noisy} layers differ by no more than the rounding of their weights")
    lines.append("error of its norm, share of all in size, layer")
    for e in sorted(layers, key=lambda e: -e.error * e.size)[:WORST]:
        lines.append(f"  {e.error:7.2%}  {e.size**2 / total:7.2%}  {e.module}")
    return "\n".join(lines)


def picture_errors(extracted: Extract, prompt: str, seed: int = 0) -> dict[str, Any]:
    """Root mean square difference of pictures in [0, 1], with the second pipeline's settings.

    Returns: "lora": first network with the LoRA against the second; "before": without it.
    """
    pipeline = make_pipeline(extracted.after)
    name, part = pipeline.backbone, extracted.before.components[pipeline.backbone]
    params = {key: x.params for key, x in extracted.after.components.items()}
    factors = {m: Factors(a, b, 1.0) for m, (a, b) in extracted.difference.pairs.items()}
    merged = add_factors(part.params, layers_of(part), factors, 1.0)
    noise = initial_noise(seed, SEEDS, pipeline.latent)

    def pictures(backbone) -> np.ndarray:
        model = Model(name, pipeline, params | {name: backbone}, extracted.sampling)
        return draw(model, [prompt] * SEEDS, noise) / 2 + 0.5

    target, *others = map(pictures, (params[name], merged, part.params))
    return dict(zip(("lora", "before"), (_rms(x, target) for x in others), strict=True))


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a - b))))
