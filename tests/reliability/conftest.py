import signal

import pytest


@pytest.fixture
def hurry():
    """A reader that waits for a pipe fails its test, and not the whole suite."""

    def late(*_):
        raise TimeoutError("found a reader that waits; expected a refusal")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
