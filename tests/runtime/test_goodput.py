"""Goodput: seconds by kind add up, over restarts and crashes as well."""

import json

import pytest

from gadjax.runtime.goodput import GoodputClock


class Time:
    """Clock that the test advances."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def steps(clock, time, numbers):
    """A start: ten seconds up to its first step, then four per step (one of them for data)."""
    time.pass_(10)
    for number in numbers:
        with clock("data"):
            time.pass_(1)
        clock.record_step(number)
        time.pass_(3)


def record(workdir):
    return json.loads((workdir / "goodput.json").read_text())


def test_seconds_by_kind_add_up(tmp_path):
    time = Time()
    clock = GoodputClock(time)
    clock.resume(tmp_path, 0)
    steps(clock, time, [1, 2, 3])
    with clock("checkpoint"):
        time.pass_(5)
        with clock("preview"):
            time.pass_(2)
        time.pass_(1)
    assert clock.share() == 9 / 30
    clock.write()
    expected = {"compile": 11, "step": 9, "data": 2, "checkpoint": 6, "preview": 2, "lost": 0}
    assert record(tmp_path) == {"step": 3, "steps": 3, "starts": 1, "seconds": expected}


def test_an_exception_ends_its_kind(tmp_path):
    time = Time()
    clock = GoodputClock(time)
    clock.record_step(1)
    with pytest.raises(OSError), clock("checkpoint"):
        time.pass_(2)
        raise OSError
    time.pass_(3)
    assert clock.share() == 3 / 5


@pytest.mark.parametrize(("restored", "lost"), [(5, 0), (3, 6), (0, 15)])
def test_repeated_steps_count_as_lost(tmp_path, restored, lost):
    time = Time()
    first = GoodputClock(time)
    first.resume(tmp_path, 0)
    steps(first, time, [1, 2, 3, 4, 5])
    first.write()
    time.pass_(1000)  # killed, and nobody there
    second = GoodputClock(time)
    second.resume(tmp_path, restored)
    second.write()
    seconds = record(tmp_path)["seconds"]
    assert seconds["lost"] == lost and seconds["step"] == 15 - lost
    assert sum(seconds.values()) == 10 + 5 * 4
    assert record(tmp_path)["starts"] == 2
    steps(second, time, range(restored + 1, 8))
    second.write()
    assert sum(record(tmp_path)["seconds"].values()) == 30 + 10 + 4 * (7 - restored)
    # Nothing is lost twice.
    third = GoodputClock(time)
    third.resume(tmp_path, 7)
    third.write()
    assert record(tmp_path)["seconds"]["lost"] == lost


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": {"step": 1}}'])
def test_an_unreadable_record_is_replaced(tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    clock = GoodputClock(Time())
    clock.resume(tmp_path, 3)
    clock.write()
    assert record(tmp_path)["starts"] == 1 and record(tmp_path)["step"] == 3


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GoodputClock(Time()).write()
    assert not list(tmp_path.iterdir())
