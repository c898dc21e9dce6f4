"""What a script of this folder found, as a file that the documentation is made of."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/reliability"


def write_figures(name: str, out: Path, began: float, figures: dict[str, Any]) -> Path:
    """OUT/NAME.json. began: by time.time()."""
    record = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()} CPU cores",
        "seconds": round(time.time() - began, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(record | figures, indent=2) + "\n")
    return path
