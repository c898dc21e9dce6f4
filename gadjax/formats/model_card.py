"""Model card (README.md) and gadjax.json of an exported pipeline folder."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, escape_nonprintable
from gadjax.formats.pipeline_classes import PACKED, SD, SDXL
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig
from gadjax.io.markdown import escape_markdown
from gadjax.io.untrusted import is_count, is_text, read_json

CARD, FORMAT = "README.md", 1
FILE = "file"  # kind of an export
UNETS = SD, SDXL  # pipelines
HEADING = "## Verification"
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Export:
    """Facts of exported weights for the model card and gadjax.json.

    Attributes:
      name: name of the exported folder.
      sampling: the sampling settings that gadjax.json stores.
      times: timesteps that a student's steps start from; None for a teacher.
      guidance: of the teacher in training; None if it was not evaluated.
      step, part, config: training step, weights ("ema" or "student") and config of the run.
      teacher, fingerprint: name of the teacher, fingerprint of its backbone's weights.
      latent: (H, W, C) of the latents.
      pipeline, arguments: diffusers pipeline class and the keyword arguments of its call.
      license: license of the teacher's model card.
      world: name of the toy world the model was trained on, as in gadjax.json.
      report: report.json of `gadjax evaluate`.
      adapter: "diffusers" or "peft" for a LoRA that is loaded so, FILE for a file of the backbone
        alone; "" for a complete pipeline.
      scheduler: class of the scheduler of such a folder; "" for the teacher's own.
      origin: sentences on weights that no run trained, in place of step, part and config.
    """

    name: str
    sampling: SamplingConfig
    times: tuple[float, ...] | None
    teacher: str
    fingerprint: str
    latent: tuple[int, int, int]
    pipeline: str
    arguments: Mapping[str, Any]
    step: int = 0
    part: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    license: str = "unknown"
    guidance: float | None = None
    world: str | None = None
    report: Mapping[str, Any] | None = None
    adapter: str = ""
    scheduler: str = ""
    origin: str = ""

    def with_adapter(self, kind: str, scheduler: Mapping[str, Any] | None) -> "Export":
        """The facts of a LoRA's folder, which is loaded by diffusers or PEFT.

        Args:
          kind: "diffusers", "peft" or FILE.
          scheduler: scheduler config of the folder; None: it has none.
        """
        return replace(self, adapter=kind, scheduler=(scheduler or {}).get("_class_name", ""))


def metadata_json(export: Export, verified: Mapping[str, Any] | None) -> str:
    """Text of gadjax.json. verified: result of `parity.verify`; None if it was not run."""
    teacher = {"name": export.teacher, "fingerprint": export.fingerprint}
    if export.guidance is not None:
        teacher["guidance"] = export.guidance
    trained = {} if export.origin else _training(export)
    metadata = {
        "format": FORMAT,
        **export.sampling.to_dict(),
        **trained,
        "teacher": teacher,
        "gadjax": version("gadjax"),
        "verified": verified,
    }
    if export.world:
        metadata["world"] = export.world
    return json.dumps(metadata, indent=2) + "\n"


def _training(export: Export) -> dict[str, Any]:
    return {
        "objective": dict(export.config["objective"]),
        "trained": {"steps": export.step, "batch": export.config["batch"], "weights": export.part},
    }


def card(export: Export, verified: Mapping[str, Any] | None) -> str:
    """Model card: the text of README.md, with Hugging Face's YAML front matter."""
    lines = [*_front(export), *_origin(export), *_use(export)]
    if export.report is not None:
        lines += ["## Measured", "", *report_lines(export.report), ""]
    text = verified_text("FOLDER", verified, bool(export.adapter))
    return "\n".join([*lines, HEADING, "", text, ""])


def _front(export: Export) -> list[str]:
    tags = ["text-to-image", "gadjax", *(["distillation"] if export.times else [])]
    return [
        "---",
        f"license: {_yaml(export.license)}",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"base_model: {_yaml(export.teacher)}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]


def _yaml(text: str) -> str:
    """Quote a string for YAML, which reads JSON's strings but not its surrogate-pair escapes."""
    return json.dumps(escape_nonprintable(text), ensure_ascii=False)


def _origin(export: Export) -> list[str]:
    if export.origin:
        return [f"# {escape_markdown(export.name)}", "", export.origin, ""]
    sampling, config = export.sampling, export.config
    guidance, base = [], config.get("int8", "")
    part = "" if export.part == "critic" else config["student"].get("trained", "")
    if export.times is None:
        origin = "Trained with the text encoder and the autoencoder of"
        steps = f"the {sampling.steps} steps of its scheduler, with guidance {sampling.guidance:g}"
    else:
        origin = "Distilled from"
        if export.guidance is None:
            origin = "Trained on pictures, with the text encoder and the autoencoder of"
        times = ", ".join(f"{time:g}" for time in export.times)
        plural = "s" if sampling.steps > 1 else ""
        scale = "without guidance"
        if sampling.guidance > 1:
            scale = f"with guidance {sampling.guidance:g} as the network's input"
        steps = f"{sampling.steps} step{plural}, from the time{plural} {times}, {scale}"
        if export.guidance is not None:
            guidance = [f"| guidance of the teacher | {export.guidance:g} |"]
    return [
        f"# {escape_markdown(export.name)}",
        "",
        f"{origin} {escape_markdown(export.teacher)} by gadjax {version('gadjax')}. "
        f"It samples in {steps}.",
        "",
        "| | |",
        "|---|---|",
        f"| objective | {escape_markdown(objective_text(config['objective']))} |",
        f"| updates | {export.step}, of {config['batch']} samples each |",
        f"| weights | {'EMA' if export.part == 'ema' else 'as last updated'} |",
        *guidance,
        *([f"| trained parameters | {escape_markdown(part)} |"] if part else []),
        *_experts(export),
        *([f"| base in training | 8 bits in {escape_markdown(base)} |"] if base else []),
        f"| fingerprint of the teacher's backbone | {escape_markdown(export.fingerprint)} |",
        f"| prompt length | {sampling.length} tokens |",
        "",
    ]


def _experts(export: Export) -> list[str]:
    """Row of a student that is for some of the steps alone."""
    student = {} if export.part == "critic" else export.config["student"]
    if not (steps := student.get("trained_steps")):
        return []
    expert = escape_markdown(Path(student.get("earlier_expert", "")).name)
    text = f"steps {steps[0] + 1} to {steps[1]} of {len(export.times)}"
    if expert:
        text += f"; the steps before are those of {expert}, which is not in this folder"
    return [f"| trained for | {text} |"]


def _use(export: Export) -> list[str]:
    height, width, channels = export.latent
    name, teacher = (shlex.quote(escape_nonprintable(x)) for x in (export.name, export.teacher))
    model = f"{teacher} --lora {name}" if export.adapter else name
    arguments = ", ".join(f"{key}={value!r}" for key, value in export.arguments.items())
    sample = f"gadjax sample --model {model} --prompts prompts.txt --out pictures"
    command = ["```bash", sample, "```", ""]
    return [
        "## Use",
        "",
        "The scheduler in this folder and these arguments belong to the weights.",
        "",
        "```python",
        *_load_lines(export),
        f"latents = torch.randn(1, {channels}, {height}, {width})",
        *(["latents = pipe._pack_latents(latents, *latents.shape)"] * (export.pipeline in PACKED)),
        f"image = pipe(prompt, latents=latents, {arguments}).images[0]",
        "```",
        "",
        *([] if export.adapter == FILE else command),
    ]


def _load_lines(export: Export) -> list[str]:
    """Lines of Python that load the pipeline."""
    if not export.adapter:
        return [
            "import torch",
            f"from diffusers import {export.pipeline}",
            "",
            f"pipe = {export.pipeline}.from_pretrained({export.name!r})",
        ]
    classes = ", ".join(sorted(filter(None, (export.pipeline, export.scheduler))))
    lines = ["import torch", f"from diffusers import {classes}"]
    lines += ["from peft import PeftModel"] if export.adapter == "peft" else []
    lines += ["from safetensors.torch import load_file"] if export.adapter == FILE else []
    lines += ["", f"pipe = {export.pipeline}.from_pretrained({export.teacher!r})"]
    if export.scheduler:
        lines.append(
            f"pipe.scheduler = {export.scheduler}.from_pretrained({export.name!r}, "
            'subfolder="scheduler")'
        )
    if export.adapter == "peft":
        return [
            *lines,
            f"adapted = PeftModel.from_pretrained(pipe.transformer, {export.name!r})",
            "pipe.transformer = adapted.merge_and_unload()",
        ]
    if export.adapter == FILE:
        path = f"{export.name}/{export.name}.safetensors"
        backbone = "unet" if export.pipeline in UNETS else "transformer"
        return [*lines, f"pipe.{backbone}.load_state_dict(load_file({path!r}))"]
    return [*lines, f"pipe.load_lora_weights({export.name!r})"]


def objective_text(objective: Mapping[str, Mapping[str, Any]]) -> str:
    """Objective as a sum of terms with weights and options: "1 dmd + 0.3 gad (steps 4)"."""
    terms = []
    for name, options in objective.items():
        weight = options.get("weight", 1.0)
        rest = [f"{key} {value}" for key, value in options.items() if key != "weight"]
        terms.append(f"{weight:g} {name}" + (f" ({', '.join(rest)})" if rest else ""))
    return " + ".join(terms)


def verified_text(folder: str, verified: Mapping[str, Any] | None, lora: bool = False) -> str:
    """Sentence on the comparison with diffusers.

    Args:
      folder: name of the folder in that sentence.
      verified: result of the comparison; None if it was not run.
      lora: whether the folder has a LoRA alone.
    """
    if verified is None and lora:
        return "Not verified: torch, diffusers and peft were not installed."
    if verified is None:
        return (
            "Not verified: torch and diffusers were not installed. "
            f"`gadjax export --verify {folder}` compares the images of both and records it here."
        )
    return (
        f"diffusers {verified['diffusers']} and gadjax {verified['gadjax']} drew the same from the "
        f"same latents for {verified['prompts']} prompts: largest difference "
        f"{verified['max_difference']:.1e}, allowed {verified['allowed']:.1e}, for images in "
        "[0, 1]."
    )


def record_verification(folder: Path, verified: Mapping[str, Any]) -> None:
    """Record the result of `parity.verify` in an exported folder's gadjax.json and model card."""
    metadata = read_json(folder / GADJAX_JSON) | {"verified": dict(verified)}
    _replace(folder / GADJAX_JSON, json.dumps(metadata, indent=2) + "\n")
    path = folder / CARD
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        sentence = verified_text("FOLDER", verified)
        pattern = rf"({HEADING}\n\n)[^\n]*"
        _replace(path, re.sub(pattern, lambda match: match[1] + sentence, text))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_license(folder: Path) -> str:
    """License in the front matter of a folder's model card; "unknown" if it has none."""
    from huggingface_hub.repocard import metadata_load

    card = folder / CARD
    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return "unknown"
    try:
        stated = (metadata_load(card) or {}).get("license")
    except Exception:  # no YAML
        return "unknown"
    return stated if isinstance(stated, str) and stated else "unknown"


def read_report(path: Path) -> dict[str, Any]:
    """Read report.json of `gadjax evaluate`. Raises: InputError for anything else."""
    report = read_json(path)
    try:
        rows = list(report["rows"].values())
        valid = all(is_text(row["label"]) and is_count(row["evaluations"]) for row in rows)
        estimates = [estimate for row in rows for estimate in row["metrics"].values()]
        valid &= all(map(_is_estimate, estimates)) and isinstance(report.get("settings", {}), dict)
    except (KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise InputError(f"{path}: found no rows with metrics; expected a report.json")
    return report


def _is_estimate(metric: Mapping[str, Any]) -> bool:
    """True for a metric's Estimate in a report: a finite value, and interval ends or None."""
    numbers = [metric[key] for key in ("value", "low", "high")]
    numbers = [x for i, x in enumerate(numbers) if x is not None or i == 0]
    return all(isinstance(x, float) and math.isfinite(x) or is_count(x) for x in numbers)


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Markdown table of a report: models in columns, metrics in rows."""
    rows = list(report["rows"].values())
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    lines = [
        "| | " + " | ".join(escape_markdown(row["label"]) for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    lines.append(
        "| network evaluations | " + " | ".join(str(r["evaluations"]) for r in rows) + " |"
    )
    for name in names:
        cells = (_cell(row["metrics"].get(name)) for row in rows)
        lines.append(f"| {escape_markdown(name.replace('_', ' '))} | " + " | ".join(cells) + " |")
    return lines


def _cell(metric: Mapping[str, float | None] | None) -> str:
    if metric is None:
        return ""
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    return f"{value:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")
