import json
from collections import Counter

import numpy as np
import pytest

from gadjax.analytic import Bench, Result, report, rows
from gadjax.analytic import __main__ as main
from gadjax.errors import InputError, RunStopped
from gadjax.objectives import TERMS, Sum

PERFECT = Result(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, np.zeros((1, 2)), np.zeros((1, 2)), {})
OPTIONS = "--updates", "7", "--seeds", "2", "--out"


@pytest.fixture
def fits(monkeypatch):
    """Calls of `Bench.fit`, in place of training."""
    calls = []

    def fit(bench, objective, updates, seed, start=None, networks=None):
        calls.append((bench, objective, updates, seed, start, networks))
        return PERFECT

    monkeypatch.setattr(Bench, "fit", fit)
    monkeypatch.setattr(Bench, "measure", lambda *given: PERFECT)
    return calls


def terms_of(row: rows.Row) -> set[type]:
    """Classes of a row's terms, of its first stage too."""
    objectives = (o for o in (row.objective, row.first) if o is not None)
    sums = (o if isinstance(o, Sum) else Sum(((1.0, o),)) for o in objectives)
    return {type(term) for total in sums for _, term in total.parts}


def test_every_term_has_a_row_or_a_reason():
    seen = set().union(*(terms_of(row) for _, _, row in rows.all_rows().values()))
    assert {name for name, kind in TERMS.items() if kind not in seen} == rows.NOT_HERE.keys()


def test_names_of_rows_are_files_and_no_two_labels_share_one():
    labels = Counter(
        (setting, label) for setting, _, of in rows.SECTIONS for label in rows.rows_of(of)
    )
    assert set(labels.values()) == {1}
    named = rows.all_rows()
    untrained = 2 * len(rows.SETTINGS)
    assert len(named) == len(labels) + untrained
    assert all(setting == name.split("/")[0] for name, (setting, *_) in named.items())
    assert {c for name in named for c in name} <= set("abcdefghijklmnopqrstuvwxyz0123456789_.=/")
    assert rows.row_name("flow_1", "DMD + 0.3 GAD(whole)") == "flow_1/dmd_0.3_gad_whole"


def test_rows_differ_and_those_with_gad_are_the_others_with_it():
    for setting, _, of in rows.SECTIONS:
        for label, row in of.items():
            base = of.get(label.removesuffix(" + 0.3 GAD"))
            if label.endswith(" + 0.3 GAD") and base is not None:
                assert terms_of(row) == terms_of(base) | {TERMS["gad"]}, (setting, label)
                assert (row.first, row.degraded, row.bench) == (
                    base.first,
                    base.degraded,
                    base.bench,
                )


@pytest.mark.slow
def test_the_command_runs_every_row_once_and_writes_its_page(fits, tmp_path, capsys):
    out = tmp_path / "bench"
    (tmp_path / "bench.md").write_text(f"# Mine\n\nWhat it shows.\n\n{report.MARKER}\n\nold\n")
    assert main.main([*OPTIONS, str(out)]) == 0
    page = (tmp_path / "bench.md").read_text()
    assert page.startswith(f"# Mine\n\nWhat it shows.\n\n{report.MARKER}\n\nMean of 2 runs")
    assert "\nold\n" not in page and "Not run yet" not in page
    count = len(rows.all_rows())
    assert f"{count} of {count} rows" in page
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(titles) == len(rows.SECTIONS) == len(set(titles))
    for setting, _, of in rows.SECTIONS:
        assert all(f"\n| {label} | 1.000" in page for label in of), setting
    # Two seeds of each row, of its first stage, and of each network that its path has.
    trained = [row for _, _, row in rows.all_rows().values() if row.objective is not None]
    assert len(fits) == 2 * sum(1 + bool(row.first) + len(row.degraded) for row in trained)
    assert Counter(seed for _, _, _, seed, *_ in fits) == {0: len(fits) // 2, 1: len(fits) // 2}
    assert {updates for _, _, updates, *_ in fits} == {7, 1, 2}  # 1 and 2 of a degraded critic
    before = len(fits)
    assert main.main([*OPTIONS, str(out)]) == 0 and len(fits) == before


def test_rows_are_chosen_kept_and_refused_in_another_recipe(fits, tmp_path, capsys):
    out = tmp_path / "bench"
    names = "flow_4/cdm", "rotated/dmd", "flow_1/ct_then_tcm", "flow_1/disback"
    assert main.main(["--only", *names, *OPTIONS, str(out)]) == 0
    assert sorted(p.relative_to(out).with_suffix("").as_posix() for p in out.rglob("*.json")) == (
        sorted(names)
    )
    by_row = {type(call[1]).__name__: call for call in fits}
    assert by_row["CDM"][0].redraw == (0.25, 0.95) and by_row["CDM"][0].critic_follow == 1e-3
    assert by_row["TCM"][4] == PERFECT.params and by_row["CT"][4] is None
    assert by_row["DisBack"][5].keys() == {"degraded/0", "degraded/1"}
    rotated = [c for c in fits if c[0].dim == 8]
    assert len(rotated) == 2 and all("layer2" in c[4] for c in rotated)
    record = json.loads((out / "flow_4/cdm.json").read_text())
    assert record["runs"] == [PERFECT.metrics] * 2 and record["updates"] == 7
    page = (tmp_path / "bench.md").read_text()
    assert page.startswith(report.TITLE) and "\n| CDM | 1.000" in page
    assert "Not run yet: teacher, start, DMD + GADLift, DMD + 0.3 GAD.\n" in page
    capsys.readouterr()
    assert main.main(["--only", "flow_4/cdm*", "--list", *OPTIONS, str(out)]) == 0
    assert capsys.readouterr().out == "flow_4/cdm (finished)\nflow_4/cdm_0.3_gad\n"
    before = len(fits)
    with pytest.raises(InputError, match=r"cdm.json: found updates 7; expected 9 \(remove"):
        main.main(["--only", "flow_4/cdm", "--updates", "9", "--seeds", "2", "--out", str(out)])
    with pytest.raises(InputError, match="--only: found 'flow_9'; expected a row of --list"):
        main.main(["--only", "flow_9"])
    with pytest.raises(InputError, match="--seeds: found 0; expected 1 or more"):
        main.main(["--seeds", "0"])
    (tmp_path / "bench.md").write_text("# Mine\n")
    with pytest.raises(InputError, match="bench.md: found no line"):
        main.write_page(out, 7, 2)
    assert len(fits) == before


def test_a_row_that_fails_is_shown_and_does_not_end_the_others(fits, tmp_path, monkeypatch, capsys):
    failures = {"SIM": RunStopped("bench: found updates that were not finite"), "VSD": OSError(3)}

    def fit(bench, objective, *given):
        if type(objective).__name__ in failures:
            raise failures[type(objective).__name__]
        return PERFECT

    monkeypatch.setattr(Bench, "fit", fit)
    out = tmp_path / "bench"
    names = [f"flow_1/{name}" for name in ("vsd", "sim", "cdm")]
    assert main.main(["--only", *names, *OPTIONS, str(out)]) == 1
    page = (tmp_path / "bench.md").read_text()
    assert "\n| SIM | - | -" in page and "\n| CDM | 1.000" in page
    assert "SIM: bench: found updates that were not finite." in page
    assert not (out / "flow_1/vsd.json").exists() and "flow_1/vsd: OSError: 3" in (
        capsys.readouterr().out
    )
