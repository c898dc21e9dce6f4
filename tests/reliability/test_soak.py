"""A shorter soak than the one whose figures are in docs/results."""

import pytest
from soak import soak

pytestmark = pytest.mark.slow  # minutes: a run, and commands beside it


def test_a_run_grows_in_nothing(tmp_path):
    found = soak(tmp_path, steps=3000, pause=0.2)
    print(found)
    assert found["ran_sample"] and found["ran_export"], found
    for name in ("files", "threads"):
        assert found[f"{name}_last_tenth"] <= found[f"{name}_second_tenth"], found
    # A megabyte a step is what keeping the states alive would take, or a third of it their metrics.
    assert found["rss_mib_last_tenth"] - found["rss_mib_second_tenth"] < 50, found
