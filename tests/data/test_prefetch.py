"""Prefetch: in order, in one thread that ends with its reader."""

import threading
import time

import pytest

from gadjax.data.source import prefetch
from gadjax.errors import InputError


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_keeps_the_order_and_uses_one_thread():
    names = []

    def fn(index):
        names.append(threading.current_thread().name)
        return index**2

    assert list(prefetch(fn, 3, 20)) == [i**2 for i in range(3, 20)]
    assert set(names) == {"prefetch_0"} and workers() == []
    assert list(prefetch(fn, 5, 5)) == [] and list(prefetch(fn, 5, 4)) == []
    assert list(prefetch(fn, 0, 2, depth=9)) == [0, 1]
    with pytest.raises(ValueError, match="depth of 0"):
        next(prefetch(fn, 0, 3, depth=0))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prefetch_runs_so_far_ahead_and_no_further(depth):
    started = []
    ahead = threading.Semaphore(0)

    def fn(index):
        started.append(index)
        ahead.release()
        return index

    items = prefetch(fn, 0, 10, depth)
    for taken in range(3):
        assert next(items) == taken
        # While the consumer holds `taken`, exactly `depth` later ones are computed.
        for _ in range(depth + 1 if taken == 0 else 1):
            assert ahead.acquire(timeout=5)
        time.sleep(0.02)
        assert started == list(range(taken + depth + 1))
    items.close()
    assert workers() == []


def test_prefetch_raises_in_turn_and_ends():
    def fn(index):
        if index == 3:
            raise InputError("sample 3")
        return index

    items = prefetch(fn, 0, 10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="sample 3"):
        next(items)
    assert workers() == []
    assert list(items) == []


def test_closing_prefetch_ends_the_thread_and_drops_what_waits():
    started = []

    def fn(index):
        started.append(index)
        time.sleep(0.05)
        return index

    items = prefetch(fn, 0, 100, depth=4)
    assert next(items) == 0 and len(workers()) == 1
    items.close()
    assert workers() == [] and len(started) <= 3
    prefetch(fn, 0, 100).close()  # never begun
    for item in prefetch(fn, 0, 100):  # left and collected
        assert item == 0
        break
    assert workers() == []
