"""The notebooks run as scripts, and say what they are meant to show."""

import re
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "prototype_a_loss.py"


def test_prototype_a_loss():
    run = subprocess.run([sys.executable, NOTEBOOK], capture_output=True, text=True, check=True)
    base, with_gad = (float(x) for x in re.findall(r"cosine (\S+)", run.stdout))
    assert base + 0.1 < with_gad <= 1
