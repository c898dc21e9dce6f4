"""Commands that are really killed: the old folder is there, or the new one."""

import pytest
from atomic import kill_many, make_jobs, measure


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("convert", "back", "embed"), ("single", "lora", "extract", "merge")], ids="-".join
)
def test_six_kills_leave_the_old_or_the_new(tmp_path, names):
    jobs = [job for job in make_jobs(tmp_path) if job.name in names]
    for job in jobs:
        measure(job, tmp_path)
    tally = kill_many(jobs, tmp_path, count=6)
    assert tally.failed == [] and sum(tally.found.values()) == 6
    assert tally.left == tally.removed
