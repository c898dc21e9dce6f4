"""What an exported folder says about itself: gadjax.json for programs, README.md for people."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, escape_nonprintable
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig
from gadjax.io.markdown import escape_markdown
from gadjax.io.untrusted import read_json

CARD, FORMAT = "README.md", 1
HEADING = "## Verification"
LARGEST = 1 << 20  # bytes of a model card that are read


@dataclass(frozen=True)
class Export:
    """What there is to say of exported weights.

    name: of the folder. times: that a student's steps start from, None for a teacher. step, part
    (ema or student), config: which weights of which run. teacher, fingerprint: the teacher's name
    and that of its transformer's weights. latent: (H, W, C). pipeline, arguments: diffusers' class
    and what it is called with. world: as gadjax.json names it. report: of `gadjax evaluate`.
    """

    name: str
    sampling: SamplingConfig
    times: tuple[float, ...] | None
    step: int
    part: str
    config: Mapping[str, Any]
    teacher: str
    fingerprint: str
    latent: tuple[int, int, int]
    pipeline: str
    arguments: Mapping[str, Any]
    license: str = "unknown"
    world: str | None = None
    report: Mapping[str, Any] | None = None


def metadata_json(export: Export, verified: Mapping[str, Any] | None) -> str:
    """The text of gadjax.json. verified: what the comparison with diffusers gave, None without."""
    teacher = {"name": export.teacher, "fingerprint": export.fingerprint}
    if export.times is not None:
        teacher["guidance"] = export.config["guidance"]
    found = {
        "format": FORMAT,
        **export.sampling.to_dict(),
        "objective": dict(export.config["objective"]),
        "trained": {"steps": export.step, "batch": export.config["batch"], "weights": export.part},
        "teacher": teacher,
        "gadjax": version("gadjax"),
        "verified": verified,
    }
    if export.world:
        found["world"] = export.world
    return json.dumps(found, indent=2) + "\n"


def card(export: Export, verified: Mapping[str, Any] | None) -> str:
    """The text of README.md, with the front matter of Hugging Face's model cards."""
    lines = [*_front(export), *_origin(export), *_use(export)]
    if export.report is not None:
        lines += ["## Measured", "", *report_lines(export.report), ""]
    return "\n".join([*lines, HEADING, "", verified_text("FOLDER", verified), ""])


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
    """YAML reads JSON's strings, but not its pairs of escapes for a character beyond 16 bits."""
    return json.dumps(escape_nonprintable(text), ensure_ascii=False)


def _origin(export: Export) -> list[str]:
    sampling, config = export.sampling, export.config
    guidance = []
    if export.times is None:
        made = "Trained with the text encoder and the autoencoder of"
        drawn = f"the {sampling.steps} steps of its scheduler, with guidance {sampling.guidance:g}"
    else:
        made = "Distilled from"
        times = ", ".join(f"{time:g}" for time in export.times)
        many = "s" if sampling.steps > 1 else ""
        drawn = f"{sampling.steps} step{many}, from the time{many} {times}, without guidance"
        guidance = [f"| guidance of the teacher | {config['guidance']:g} |"]
    return [
        f"# {escape_markdown(export.name)}",
        "",
        f"{made} {escape_markdown(export.teacher)} by gadjax {version('gadjax')}. It draws in {drawn}.",
        "",
        "| | |",
        "|---|---|",
        f"| objective | {escape_markdown(objective_text(config['objective']))} |",
        f"| updates | {export.step}, of {config['batch']} samples each |",
        f"| weights | {'moving average' if export.part == 'ema' else 'as last updated'} |",
        *guidance,
        f"| teacher's transformer | {escape_markdown(export.fingerprint)} |",
        f"| length of a prompt | {sampling.length} tokens |",
        "",
    ]


def _use(export: Export) -> list[str]:
    height, width, channels = export.latent
    name = shlex.quote(escape_nonprintable(export.name))
    called = ", ".join(f"{key}={value!r}" for key, value in export.arguments.items())
    return [
        "## Use",
        "",
        "The scheduler in this folder and these arguments belong to the weights.",
        "",
        "```python",
        "import torch",
        f"from diffusers import {export.pipeline}",
        "",
        f"pipe = {export.pipeline}.from_pretrained({export.name!r})",
        f"latents = torch.randn(1, {channels}, {height}, {width})",
        f"image = pipe(prompt, latents=latents, {called}).images[0]",
        "```",
        "",
        "```bash",
        f"gadjax sample --model {name} --prompts prompts.txt --out pictures",
        "```",
        "",
    ]


def objective_text(objective: Mapping[str, Mapping[str, Any]]) -> str:
    """Every term with its weight and options."""
    terms = []
    for name, options in objective.items():
        weight = options.get("weight", 1.0)
        rest = [f"{key} {value}" for key, value in options.items() if key != "weight"]
        terms.append(f"{weight:g} {name}" + (f" ({', '.join(rest)})" if rest else ""))
    return " + ".join(terms)


def verified_text(folder: str, verified: Mapping[str, Any] | None) -> str:
    """folder: as it is called in this sentence."""
    if verified is None:
        return (
            "Not verified: torch and diffusers were not installed. "
            f"`gadjax export --verify {folder}` compares what both draw and notes it here."
        )
    return (
        f"diffusers {verified['diffusers']} and gadjax {verified['gadjax']} drew the same from the "
        f"same latents for {verified['prompts']} prompts: largest difference "
        f"{verified['max_difference']:.1e}, allowed {verified['allowed']:.1e}, of pictures from "
        "0 to 1."
    )


def record_verification(folder: Path, verified: Mapping[str, Any]) -> None:
    """Say in an exported folder's gadjax.json and card that it was verified."""
    found = read_json(folder / GADJAX_JSON) | {"verified": dict(verified)}
    _replace(folder / GADJAX_JSON, json.dumps(found, indent=2) + "\n")
    path = folder / CARD
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        said = verified_text("FOLDER", verified)
        pattern = rf"({HEADING}\n\n)[^\n]*"
        _replace(path, re.sub(pattern, lambda match: match[1] + said, text))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_license(folder: Path) -> str:
    """What the front matter of a folder's model card says, "unknown" where it says nothing."""
    from huggingface_hub.repocard import metadata_load

    card = folder / CARD
    if not card.is_file() or card.stat().st_size > LARGEST:
        return "unknown"
    try:
        stated = (metadata_load(card) or {}).get("license")
    except Exception:  # no YAML
        return "unknown"
    return stated if isinstance(stated, str) and stated else "unknown"


def read_report(path: Path) -> dict[str, Any]:
    """report.json of `gadjax evaluate`. Raises: InputError for anything else."""
    report = read_json(path)
    try:
        rows = list(report["rows"].values())
        whole = all(isinstance(row["label"], str) and _is_count(row["evaluations"]) for row in rows)
        estimates = [estimate for row in rows for estimate in row["metrics"].values()]
        whole &= all(map(_is_estimate, estimates)) and isinstance(report.get("settings", {}), dict)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path}: found no rows with metrics; expected a report.json")
    return report


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_estimate(metric: Mapping[str, Any]) -> bool:
    """Whether it is what a metric's Estimate is in a report: numbers, and intervals or None."""
    numbers = [metric[key] for key in ("value", "low", "high")]
    numbers = [x for i, x in enumerate(numbers) if x is not None or i == 0]
    return all(isinstance(x, float) and math.isfinite(x) or _is_count(x) for x in numbers)


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report's table in Markdown."""
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
