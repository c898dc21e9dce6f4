"""Reports of an evaluation: report.html, report.json, report.md and pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gadjax.evaluation import pictures
from gadjax.evaluation.learned_metrics import SUMMARY_ENDINGS
from gadjax.evaluation.metric_catalogue import GROUPS, SUMMARY, Metric
from gadjax.evaluation.page import page_title, render_page
from gadjax.evaluation.results import Evaluation, Row
from gadjax.evaluation.statistics import Estimate
from gadjax.io.image_grid import save_png
from gadjax.io.markdown import escape_markdown

PICTURES = {  # group of metrics -> file, function that draws it
    "control": ("control.png", pictures.moves),
    "path": ("interpolation.png", pictures.paths),
}


def as_dict(evaluation: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """Report as JSON values. Every metric is {"value", "low", "high"}."""
    return {
        "settings": settings,
        "rows": {
            row.key: {
                "label": row.label,
                "sampling": row.sampling.to_dict(),
                "evaluations": row.evaluations,
                "metrics": {name: m._asdict() for name, m in row.metrics.items()},
            }
            for row in evaluation.rows
        },
        "absent": evaluation.absent,
        "meaning": {name: metric.meaning for name, metric in evaluation.catalogue.items()},
    }


def as_markdown(evaluation: Evaluation, settings: dict[str, Any]) -> str:
    """Report in Markdown: a summary, and a section for each group of metrics."""
    rows, listed = evaluation.rows, evaluation.catalogue
    taken = [name for name in listed if any(name in row.metrics for row in rows)]
    sampling = {
        "network evaluations": [str(row.evaluations) for row in rows],
        "guidance": [f"{row.sampling.guidance:g}" for row in rows],
    }
    lines = [f"# {page_title(evaluation)}", ""]
    summary = [n for n in SUMMARY if n in taken]
    summary += [n for n in taken if n.endswith(SUMMARY_ENDINGS)]
    lines += _table(evaluation, summary, sampling)
    lines += [
        "",
        "In brackets: 95 % intervals, by bootstrap unless stated otherwise. The metrics are",
    ]
    lines += ["explained below, section by section.", "", "![](samples.png)"]
    for group, (heading, units) in GROUPS.items():
        names = [name for name in taken if listed[name].group == group]
        if names:
            lines += ["", f"## {heading}", "", *_table(evaluation, names), ""]
            lines += _meanings([listed[name] for name in names])
            lines += ["", f"Intervals {units}."]
        if group in _picture_groups(evaluation):
            lines += ["", f"![]({PICTURES[group][0]})"]
    if evaluation.absent:
        lines += ["", "## Absent", ""]
        for reason in dict.fromkeys(evaluation.absent.values()):
            titles = [listed[n].title for n, other in evaluation.absent.items() if other == reason]
            lines.append(f"- {escape_markdown(reason)}: {'; '.join(titles)}")
    lines += ["", "## Settings", ""]
    lines += [
        f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in settings.items()
    ]
    lines += [f"- {escape_markdown(row.label)}: {escape_markdown(_settings(row))}" for row in rows]
    return "\n".join([*lines, ""])


def _table(
    evaluation: Evaluation,
    names: Sequence[str],
    sampling: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    rows = evaluation.rows
    labels = (escape_markdown(row.label) for row in rows)
    lines = ["| | " + " | ".join(labels) + " |", "|---|" + "---|" * len(rows)]
    for title, texts in (sampling or {}).items():
        lines.append(f"| {title} | " + " | ".join(texts) + " |")
    for name in names:
        cells = (cell(row.metrics.get(name)) for row in rows)
        lines.append(f"| {evaluation.catalogue[name].title} | " + " | ".join(cells) + " |")
    return lines


def _meanings(metrics: Sequence[Metric]) -> list[str]:
    """One line for all metrics with the same meaning."""
    titles = {m.meaning: [n.title for n in metrics if n.meaning == m.meaning] for m in metrics}
    return [f"- {', '.join(names)}: {meaning}" for meaning, names in titles.items()]


def cell(metric: Estimate | None) -> str:
    """Text of a metric and its interval, for a table."""
    if metric is None:
        return ""
    if metric.low is None or metric.high is None:
        return f"{metric.value:.3f}"
    return f"{metric.value:.3f} ({metric.low:.3f} to {metric.high:.3f})"


def _settings(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.sampling.to_dict().items())


def _picture_groups(evaluation: Evaluation) -> list[str]:
    """Groups of metrics that have a picture."""
    control = evaluation.control
    return [g for g in PICTURES if control and (g != "control" or control.targets)]


def write_report(
    folder: Path, evaluation: Evaluation, prompts: Sequence[str], settings: dict[str, Any]
) -> None:
    """Write report.html, report.json, report.md and the pictures.

    Args:
      folder: an existing folder.
      evaluation: rows and metrics.
      prompts: the evaluated prompts.
      settings: name -> value, for the section of settings.
    """
    text = json.dumps(as_dict(evaluation, settings), indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(evaluation, settings), encoding="utf-8")
    page = render_page(evaluation, prompts, settings)
    (folder / "report.html").write_text(page, encoding="utf-8")
    save_png(pictures.samples(evaluation, prompts), folder / "samples.png")
    labels = {row.key: row.label for row in evaluation.rows}
    for group in _picture_groups(evaluation):
        name, draw = PICTURES[group]
        save_png(draw(evaluation.control, labels), folder / name)
