"""Initial folder of the bundled flow teacher: the eps teacher under a flow scheduler.

    python -m gadjax.experiments.flow_folder --out DIR

The weights are still those of an eps network and generate nonsense until they are trained:
gadjax train --config configs/shapes_teacher.py:flow --config.teacher=DIR.
"""

import argparse
import json
import shutil
from pathlib import Path

from gadjax.assets import resolve
from gadjax.io.atomic import atomic_folder

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with atomic_folder(out) as folder:
        shutil.copytree(resolve("asset:shapes_teacher"), folder, dirs_exist_ok=True)
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | FLOW, indent=2) + "\n")


if __name__ == "__main__":
    main()
