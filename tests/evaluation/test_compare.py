"""`gadjax compare`: reports side by side, and what is no report."""

import json

import pytest

from gadjax.cli.main import main

SETTINGS = {"seeds": 8, "prompts": "a.txt (64)", "student": "x", "command": "gadjax evaluate"}


def write(folder, students, **settings):
    """Report of one teacher and of students by label, each with one metric."""
    folder.mkdir(parents=True)

    def row(label, value):
        metric = {"value": value, "low": None, "high": None}
        return {"label": label, "evaluations": 4, "metrics": {"adherence": metric}}

    rows = {"teacher": row("teacher, 20 steps", 0.9)}
    rows |= {label: row(label, value) for label, value in students.items()}
    report = {"settings": SETTINGS | settings, "rows": rows}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_a_table_of_two_reports(tmp_path, capsys):
    first = write(tmp_path / "one", {"student, 4 steps": 0.5})
    other = write(tmp_path / "two", {"a": 0.6, "b": 0.7}, seeds=4, student="y", command="other")
    out = tmp_path / "table.md"
    assert main(["compare", str(first), str(other / "report.json"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text == out.read_text()
    lines = text.splitlines()
    # The teacher, alike in both, is one column.
    assert "| | one, two: teacher, 20 steps | one: student, 4 steps | two: a | two: b |" in lines
    assert "| adherence | 0.900 | 0.500 | 0.600 | 0.700 |" in lines
    assert lines[-3:] == ["|  | one | two |", "|---|---|---|", "| seeds | 8 | 4 |"]


def test_reports_of_one_name_and_one_alone(tmp_path, capsys):
    folders = [write(tmp_path / x / "report", {"s": v}) for x, v in (("a", 0.1), ("b", 0.2))]
    assert main(["compare", *map(str, folders)]) == 0
    text = capsys.readouterr().out
    assert "| report: s | report (2): s |" in text and "Settings that differ" not in text
    assert main(["compare", str(folders[0])]) == 0
    assert "| | report: teacher, 20 steps | report: s |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a JSON file"),
        ("{", "expected JSON"),
        ('{"rows": {"a": {"label": "x"}}}', "found no rows with metrics"),
    ],
)
def test_no_report(tmp_path, capsys, content, message):
    good, bad = write(tmp_path / "good", {"s": 0.1}), tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "report.json").write_text(content)
    assert main(["compare", str(good), str(bad), "--out", str(tmp_path / "out.md")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "out.md").exists()
    assert main(["compare"]) == 2
