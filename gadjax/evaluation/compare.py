"""Reports of `gadjax evaluate` side by side: numbers, and the settings in which they differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gadjax.formats.model_card import read_report, report_lines
from gadjax.io.markdown import escape_markdown

REPORT = "report.json"
PER_REPORT = ("command", "student")  # settings, by their beginnings, in which reports always differ
NOTE = """\
In brackets: 95 % intervals of each report by itself. Two reports are not paired; `gadjax evaluate`
with several `--student` draws all of them from the same noises."""


def read_reports(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Reports by name: that of their folder; those that are alike are numbered.

    paths: report.json, or the folder of one. Raises: InputError for anything else.
    """
    reports = {}
    for path in paths:
        file = path / REPORT if path.is_dir() else path
        name = stem = file.absolute().parent.name or str(file)
        number = 2
        while name in reports:
            name, number = f"{stem} ({number})", number + 1
        reports[name] = read_report(file)
    return reports


def comparison(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of several reports: a column for each row of each report, and other settings.

    A row that several reports have alike, as the same teacher's, is one column.
    """
    columns: list[tuple[list[str], dict[str, Any]]] = []
    for name, report in reports.items():
        for row in report["rows"].values():
            facts = {key: row[key] for key in ("label", "evaluations", "metrics")}
            names = next((names for names, other in columns if other == facts), None)
            if names is None:
                columns.append(([name], facts))
            else:
                names.append(name)
    rows = {
        number: row | {"label": f"{', '.join(dict.fromkeys(names))}: {row['label']}"}
        for number, (names, row) in enumerate(columns)
    }
    lines = ["# Reports compared", "", *report_lines({"rows": rows}), "", *NOTE.splitlines()]
    differing = _differing({name: report.get("settings", {}) for name, report in reports.items()})
    if differing:
        lines += ["", "## Settings that differ", "", _line(["", *reports])]
        lines += ["|" + "---|" * (len(reports) + 1)]
        lines += [_line([key, *values]) for key, values in differing.items()]
    return "\n".join([*lines, ""])


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Values of the settings that are not the same in all reports, by setting."""
    keys = dict.fromkeys(key for report in settings.values() for key in report)
    values = {
        key: [report.get(key, "") for report in settings.values()]
        for key in keys
        if not key.startswith(PER_REPORT)
    }
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"
