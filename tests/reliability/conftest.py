import signal

import pytest


@pytest.fixture
def hurry():
    """A reader that waits for a pipe fails its test, and not the whole suite."""
    signal.alarm(60)
    yield
    signal.alarm(0)
