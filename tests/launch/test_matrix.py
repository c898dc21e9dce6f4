"""launch/matrix.sh in a repository whose Pythons and tests are a few lines of bash."""

import os
import shutil
import subprocess
from pathlib import Path

MATRIX = Path(__file__).parents[2] / "launch" / "matrix.sh"
TESTS = """mkdir -p .venv/bin && cp "$(command -v "$PYTHON")" .venv/bin/python
[ "$PYTHON" != python3.97 ] || { echo "no such package" && exit 1; }
[ "$PYTHON" != python3.98 ] || { echo "1 failed, 7 passed, 2 errors in 3.10s" && exit 1; }
echo "$*: 9 passed, 4 deselected in 2.00s"
"""


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def test_a_table_of_all_pythons(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").mkdir()
    shutil.copy(MATRIX, tmp_path / "launch")
    executable(tmp_path / "launch" / "test.sh", f'cd "$(dirname "$0")/.."\n{TESTS}')
    for minor in (97, 98, 99):  # prints the versions of packages, or its own
        script = (
            f"[[ $2 != *flax* ]] || {{ echo 3.{minor}.1 0.12.0 0.12.12; exit; }}; echo 3.{minor}"
        )
        executable(tmp_path / "bin" / f"python3.{minor}", script)
    executable(tmp_path / "bin" / "python3.96", "exit 1")
    for tool in "bash dirname git grep sort tail mkdir cp".split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "launch"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], cwd=tmp_path, env=os.environ | env, check=True)
    done = subprocess.run(
        ["bash", tmp_path / "launch" / "matrix.sh", "-x"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    rows = [line.split()[:6] for line in done.stdout.splitlines() if ": " not in line]
    assert rows == [
        ["name", "python", "jax", "flax", "passed", "failed"],
        ["3.97", "3.97.1", "0.12.0", "0.12.12", "0", "code=1"],
        ["3.98", "3.98.1", "0.12.0", "0.12.12", "7", "3"],
        ["3.99", "3.99.1", "0.12.0", "0.12.12", "9", "0"],
    ]
    assert (tmp_path / "runs" / "matrix" / "3.99.log").read_text().startswith("-x: 9 passed")
