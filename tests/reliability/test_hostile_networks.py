"""Feature networks and files of outside scripts from strangers are read, or refused in a line."""

import signal

import pytest
from fuzz import fuzz
from hostile_networks import TARGETS

pytestmark = pytest.mark.usefixtures("hurry")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_mutants(target, tmp_path):
    signal.alarm(0)
    tally = fuzz(target, 60, 1, tmp_path)
    assert not tally.findings and sum(tally.kinds.values()) == 60 and tally.kinds["refused"] > 10


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_valid_inputs_are_read(target, tmp_path):
    target.make(tmp_path)
    target.read(tmp_path)
