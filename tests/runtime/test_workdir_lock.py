import json
import subprocess
import sys

import pytest

from gadjax.errors import InputError
from gadjax.runtime.workdir_lock import LOCK, STATUS, WorkdirLock


def status(folder) -> dict:
    return json.loads((folder / STATUS).read_text())


def test_a_workdir_has_one_run_at_a_time(tmp_path):
    with WorkdirLock(tmp_path / "run", 10):
        with pytest.raises(InputError, match="another run .*process [0-9]+ on .*one at a time"):
            WorkdirLock(tmp_path / "run", 10)
    with WorkdirLock(tmp_path / "run", 10):
        pass


def test_a_killed_process_releases_the_lock(tmp_path):
    code = (
        "import os, signal; from pathlib import Path\n"
        "from gadjax.runtime.workdir_lock import WorkdirLock\n"
        f"claim = WorkdirLock(Path({str(tmp_path)!r}), 3); claim.write_status('running', 2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (tmp_path / LOCK).exists() and status(tmp_path)["text"] == "running"
    with WorkdirLock(tmp_path, 3):
        pass


def test_other_processes_of_a_run_neither_lock_nor_write(tmp_path):
    with WorkdirLock(tmp_path / "run", 10, is_owner=False) as lock:
        lock.write_status("running", 1)
    assert not (tmp_path / "run").exists()


def test_status_of_a_run(tmp_path):
    with WorkdirLock(tmp_path, 10) as lock:
        lock.write_status("running", 4)
        record = status(tmp_path)
        assert (record["status"], record["text"]) == ("running", "running")
        assert (record["step"], record["steps"], record["reason"]) == (4, 10, "")
        lock.write_status("preempted", 5)
    assert status(tmp_path)["text"] == "preempted at step 5"


def test_what_stops_a_run_is_its_reason(tmp_path):
    with pytest.raises(ValueError), WorkdirLock(tmp_path, 10) as lock:
        lock.write_status("running", 4)
        raise ValueError("two\nlines")
    record = status(tmp_path)
    assert (record["text"], record["step"]) == ("stopped: two lines", 4)


def test_an_unwritable_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run: found a folder that cannot be written"):
        WorkdirLock(tmp_path / "file" / "run", 10)
