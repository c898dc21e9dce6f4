"""The engine finds what it should: each reader below is bad in one way."""

import json
import os
import random
import time
from collections import Counter

import pytest
from fuzz import fuzz, fuzz_all
from mutate import mutate, read_tree, write_tree
from one_input import Target, read_once

from gadjax.errors import InputError

VALID = {"a.json": json.dumps({"a": 1, "b": [2, {"c": "d"}]}).encode(), "part/data": b"12345678"}


def make(folder):
    write_tree(VALID, folder)


def careful(folder):
    if read_tree(folder) != VALID:
        raise InputError("changed")


def raises(folder):
    json.loads((folder / "a.json").read_text())


class Talkative(InputError):
    def __str__(self) -> str:
        return "one\nline too many"


def many_lines(folder):
    if read_tree(folder) != VALID:
        raise Talkative


def writes(folder):
    if read_tree(folder) != VALID:
        (folder / "new").write_text("")


def writes_here(folder):
    if read_tree(folder) != VALID:
        os.mkdir("ran")


def hungry(folder):
    if read_tree(folder) != VALID:
        bytearray(1 << 33)


def slow(folder):
    while read_tree(folder) != VALID:
        pass


def waits(folder):
    if read_tree(folder) != VALID:
        time.sleep(1000)


def dies(folder):
    if read_tree(folder) != VALID:
        os._exit(9)


def test_mutants_differ_and_are_the_same_for_a_seed(tmp_path):
    trees = [mutate(VALID, random.Random(i)) for i in range(200)]
    assert trees == [mutate(VALID, random.Random(i)) for i in range(200)]
    assert len({repr(tree) for tree in trees}) > 120
    for i, tree in enumerate(trees[:50]):
        write_tree(tree, tmp_path / str(i))


@pytest.mark.parametrize(
    "read, kind",
    [
        (careful, "refused"),
        (raises, "raised"),
        (many_lines, "lines"),
        (writes, "wrote"),
        (writes_here, "wrote"),
    ],
)
def test_outcomes(read, kind, tmp_path):
    target = Target("one", make, read)
    assert read_once(target, VALID, tmp_path).kind == "ok"
    assert read_once(target, {"a.json": b"{"}, tmp_path).kind == kind
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_that_takes_too_long_is_ended(tmp_path):
    assert fuzz(Target("slow", make, slow), 1, 0, tmp_path).kinds == {"slow": 1}


@pytest.mark.slow
def test_little_memory_and_a_death_are_detected(tmp_path):
    tally = fuzz(Target("hungry", make, hungry), 12, 0, tmp_path)
    assert tally.kinds["raised"] > 5 and "MemoryError" in "".join(tally.findings)
    tally = fuzz(Target("dies", make, dies), 2, 0, tmp_path)
    assert tally.kinds["died"] >= 1 and sum(tally.kinds.values()) == 2
    assert len(list(tmp_path.iterdir())) > 5


def test_a_reader_that_waits_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz.SECONDS", 0.1)
    tally = fuzz(Target("waits", make, waits), 2, 0, tmp_path)
    assert tally.kinds["died"] >= 1 and sum(tally.kinds.values()) == 2


def test_figures(tmp_path, capsys):
    chosen = [Target("careful", make, careful), Target("raises", make, raises)]
    figures = fuzz_all(chosen, 21, 0, tmp_path)
    assert figures["inputs"] == 21 and figures["careful/inputs"] == 11
    assert figures["careful/findings"] == 0 < figures["raises/findings"] == figures["findings"]
    kinds = Counter({kind: figures[kind] for kind in ("ok", "refused", "findings")})
    assert sum(kinds.values()) == 21
    assert "raises" in capsys.readouterr().out
