"""report.html: an evaluation as one file to look at, which needs no network.

The template is in templates/. Prompts, labels and settings are untrusted text: jinja2 escapes them,
the data are JSON without `<`, and the page's policy runs no script but its own.
"""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from gadjax.errors import escape_nonprintable
from gadjax.evaluation.metric_catalogue import GROUPS, SUMMARY, Metric
from gadjax.evaluation.results import Evaluation, Row
from gadjax.evaluation.sheets import SIDES, is_small, sheet, sheet_size
from gadjax.evaluation.statistics import Estimate
from gadjax.evaluation.strips import POINTS, REACH_DEGREES, WAYS

BUDGET = 3_600_000  # bytes of pictures in the file, so that it stays below 5 MB
LEAST_SHOWN = 8  # prompts that should get a sheet, whatever the number of models
MAX_SEEDS = 16  # noises of a prompt that are shown
BAR = 160  # width of an interval's drawing, in its own units
STEP_NAMES = {
    "path": [f"{n / (POINTS - 1):.0%}" for n in range(POINTS)],
    "direction": [
        f"{a:+.0f}°" if a else "0°" for a in np.linspace(-REACH_DEGREES, REACH_DEGREES, POINTS)
    ],
}


def render_page(evaluation: Evaluation, prompts: Sequence[str], settings: dict[str, Any]) -> str:
    """Text of report.html.

    Args:
      evaluation: rows and metrics.
      prompts: the evaluated prompts.
      settings: name -> value; "command" is shown by itself.
    """
    environment = Environment(
        loader=PackageLoader("gadjax.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": False}
    script, style = (
        environment.loader.get_source(environment, name)[0] for name in ("report.js", "report.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    settings = {_text(name): _text(value) for name, value in settings.items()}
    rows = evaluation.rows
    taken = [n for n in evaluation.catalogue if any(n in row.metrics for row in rows)]
    groups = [
        {
            "heading": heading,
            "units": units,
            "panels": [_panel(evaluation, n) for n in taken if _group(evaluation, n) == group],
        }
        for group, (heading, units) in GROUPS.items()
    ]
    return environment.get_template("report.html").render(
        style=style,
        script=script,
        digest=digest,
        title=page_title(evaluation),
        models=[_model(row) for row in rows],
        summary=[_panel(evaluation, name) for name in SUMMARY if name in taken],
        groups=[group for group in groups if group["panels"]],
        absent=_absent(evaluation),
        command=settings.pop("command", None),
        settings=settings,
        reach=REACH_DEGREES,
        data=page_data(evaluation, prompts),
        bar=BAR,
    )


def page_title(evaluation: Evaluation) -> str:
    """Heading of a report of one student, or of several."""
    if sum(row.key.startswith("student") for row in evaluation.rows) > 1:
        return "Students compared with their teacher"
    return "Student compared with its teacher"


def page_data(evaluation: Evaluation, prompts: Sequence[str]) -> dict[str, Any]:
    """Data of the page's script: labels, prompts with their differences, and sheets of pictures.

    Args:
      evaluation: rows and metrics.
      prompts: the evaluated prompts; those that fit BUDGET get a sheet.
    """
    rows = evaluation.rows
    seeds = min(rows[0].images_PSHWC.shape[1], MAX_SEEDS)

    def draw(p: int) -> str:
        return sheet(np.stack([row.images_PSHWC[p, :seeds] for row in rows]), largest)

    order, shown = picture_order(rows), []
    for largest in SIDES:  # noqa: B007 - of many models the pictures are smaller
        strips = _strips(evaluation, prompts, largest)
        left = BUDGET - _length(strips)
        fits = min(LEAST_SHOWN, len(order)) * len(draw(order[0])) <= left
        if fits and left >= BUDGET / 2:
            break
    while strips and left < BUDGET / 2:
        strips.pop()
        left = BUDGET - _length(strips)
    students = [i for i, row in enumerate(rows) if row.differences_P is not None]
    apart = {i: rows[i].differences_P for i in students}
    for p in order:
        image = draw(p)
        if len(image) > left:
            break
        left -= len(image)
        differences = {str(i): round(float(apart[i][p]), 4) for i in students}
        shown.append(
            {"index": int(p), "text": _text(prompts[p]), "apart": differences, "sheet": image}
        )
    height, width = sheet_size(rows[0].images_PSHWC, largest)
    return {
        "labels": [_text(row.label) for row in rows],
        "students": [i for i in students if not rows[i].key.startswith("teacher")] or students,
        "seeds": [f"seed {s}" for s in range(seeds)],
        "prompts": sorted(shown, key=lambda prompt: prompt["index"]),
        "total": len(prompts),
        "strips": strips,
        "steps": STEP_NAMES,
        "tile": {"height": height, "width": width, "pixels": is_small(rows[0].images_PSHWC)},
    }


def _strips(evaluation: Evaluation, prompts: Sequence[str], largest: int) -> list[dict[str, Any]]:
    """Prompts with their ways between noises, each a sheet of all rows."""
    rows = evaluation.rows
    if any(row.strips_KMNHWC is None for row in rows):
        return []
    return [
        {
            "text": _text(prompts[p]),
            "sheets": {
                name: sheet(np.stack([row.strips_KMNHWC[k, m] for row in rows]), largest)
                for m, name in enumerate(WAYS)
            },
        }
        for k, p in enumerate(evaluation.strips)
    ]


def _length(strips: Sequence[dict[str, Any]]) -> int:
    return sum(len(image) for strip in strips for image in strip["sheets"].values())


def picture_order(rows: Sequence[Row]) -> list[int]:
    """Indices of all prompts in the order in which they get pictures: in turn the one that differs
    most from the teacher, of any student, and the next of an even selection."""
    count = len(rows[0].images_PSHWC)
    apart = [r.differences_P for r in rows if r.key.startswith("student")]
    apart = [x for x in apart if x is not None]
    worst = np.argsort(-np.max(apart, axis=0), kind="stable") if apart else np.arange(count)
    # Bit-reversed order: every beginning of it is spread over the list.
    bits = max(1, (count - 1).bit_length())
    even = [int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits)]
    even = [n for n in even if n < count]
    return list(dict.fromkeys(int(p) for pair in zip(worst, even, strict=True) for p in pair))


def _panel(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """One metric of all rows: its texts, and bars on one scale."""
    metric: Metric = evaluation.catalogue[name]
    estimates = [row.metrics.get(name) for row in evaluation.rows]
    reference = 1.0 if name.endswith("_ratio") else getattr(estimates[0], "value", None)
    numbers = [x for e in estimates if e for x in e if x is not None]
    numbers += [] if reference is None else [reference]
    low, high = min(numbers), max(numbers)
    margin = 0.06 * (high - low) or 0.5

    def place(value: float) -> float:
        return round((value - low + margin) / (high - low + 2 * margin) * BAR, 2)

    def bar(estimate: Estimate) -> dict[str, float]:
        ends = (estimate.value if x is None else x for x in (estimate.low, estimate.high))
        return dict(zip(("value", "low", "high"), map(place, (estimate.value, *ends)), strict=True))

    lines = [
        {"number": i, "label": _text(row.label), "text": _cell(e), "bar": bar(e)}
        for i, (row, e) in enumerate(zip(evaluation.rows, estimates, strict=True))
        if e
    ]
    return {
        "title": metric.title,
        "meaning": metric.meaning,
        "lines": lines,
        "reference": None if reference is None else place(reference),
    }


def _cell(estimate: Estimate) -> tuple[str, str]:
    """Texts of a value and of its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}", ""
    return f"{estimate.value:.3f}", f"{estimate.low:.3f} – {estimate.high:.3f}"


def _group(evaluation: Evaluation, name: str) -> str:
    return evaluation.catalogue[name].group


def _model(row: Row) -> dict[str, Any]:
    settings = ", ".join(f"{name} {value}" for name, value in row.sampling.to_dict().items())
    facts = {"evaluations": row.evaluations, "guidance": f"{row.sampling.guidance:g}"}
    return {"label": _text(row.label), "sampling": _text(settings)} | facts


def _absent(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Reasons, each with the titles of the metrics that it left out."""
    reasons: dict[str, list[str]] = {}
    for name, reason in evaluation.absent.items():
        reasons.setdefault(_text(reason), []).append(evaluation.catalogue[name].title)
    return list(reasons.items())


def _text(value: Any) -> str:
    return escape_nonprintable(" ".join(str(value).split()))
