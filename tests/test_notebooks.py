"""The notebooks run as scripts, and say what they are meant to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_prototype_a_loss():
    run = subprocess.run(
        [sys.executable, ROOT / "notebooks" / "prototype_a_loss.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    base, with_gad = (float(x) for x in re.findall(r"cosine (\S+)", run.stdout))
    assert base + 0.1 < with_gad <= 1
