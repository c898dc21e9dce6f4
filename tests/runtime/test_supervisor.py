"""Supervisor of small processes that die, hang or ignore signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gadjax.runtime.supervisor import Limits, supervise

# Shared by the processes of these tests: heartbeats as of a run, and its two signals.
SHARED = """
import faulthandler, json, os, signal, sys, time
faulthandler.register(signal.SIGUSR2, all_threads=True)
def beat(step):
    file = os.environ["GADJAX_HEARTBEAT"]
    open(file + ".new", "w").write(json.dumps({"step": step, "time": time.time()}))
    os.replace(file + ".new", file)
def leave(*_):
    print("saved", flush=True)
    sys.exit(0)
def ready():
    open(sys.argv[1], "w").write(str(os.getpid()))
"""
STAYS = "signal.signal(signal.SIGTERM, leave); ready(); time.sleep(60)"
REFUSES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)"
# Ends as the format argument once the others are up, as processes start in any order.
AFTER = """
while not all(os.path.exists(file) for file in sys.argv[2:]): time.sleep(0.02)
beat(41); time.sleep(0.2); {}
"""
KILLS_ITSELF = AFTER.format("os.kill(os.getpid(), 9)")
JAX_ABORT_MESSAGE = (
    "F1121 client.h:80] Terminating process because the JAX distributed service detected fatal "
    "errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending "
    "heartbeats):\\n1\\nThe tasks have crashed."
)
ABORTS = f"print({JAX_ABORT_MESSAGE!r}.replace(chr(92) + 'n', chr(10)), flush=True); os.abort()"


@pytest.fixture
def commands(tmp_path):
    """Commands of Python bodies; arguments: the process's ready file, then those of the others."""

    def make(*bodies: str) -> list[list[str]]:
        files = [str(tmp_path / f"up-{i}") for i in range(len(bodies))]
        return [
            [sys.executable, "-S", "-c", SHARED + body, file, *(set(files) - {file})]
            for body, file in zip(bodies, files, strict=True)
        ]

    return make


@pytest.fixture
def logs(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def workdir(tmp_path) -> Path:
    """Workdir with the status "running"."""
    (tmp_path / "run").mkdir()
    status = {"status": "running", "step": 40, "steps": 90, "reason": "", "more": [1]}
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))
    return tmp_path / "run"


def status(workdir: Path) -> dict:
    return json.loads((workdir / "status.json").read_text())


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A child of a killed parent stays in the table until something reaps it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.02)


def test_success_and_the_environment_of_the_processes(commands, logs, capfdbinary):
    body = "print(*(os.environ['JAX_' + n] for n in sys.argv[3].split())); time.sleep(0.3)"
    names = "COORDINATOR_ADDRESS NUM_PROCESSES PROCESS_ID"
    both = [[*command, names] for command in commands(body, body)]
    assert supervise(both, logs=logs) == 0
    first, second = ((logs / f"process-{i}.log").read_text().split() for i in (0, 1))
    assert first[0] == second[0] and first[0].startswith("127.0.0.1:")
    assert first[1:] == ["2", "0"] and second[1:] == ["2", "1"]
    assert supervise(commands("print('again')"), logs=logs) == 0
    assert (logs / "process-0.log").read_text().split() == [*first, "again"]


def test_one_process_keeps_its_environment_and_its_terminal(commands, monkeypatch, logs, capfd):
    monkeypatch.setenv("SLURM_PROCID", "3")
    body = "assert not [name for name in os.environ if name.startswith('JAX_NUM')]; print('hello')"
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    assert supervise(commands(body)) == 0
    assert capfd.readouterr().out == "hello\n"
    assert supervise(commands(body), logs=logs) == 0
    assert (logs / "process-3.log").read_text() == "hello\n"


def test_a_killed_process_is_named_and_the_others_end(commands, logs, workdir, capfd):
    begun = time.monotonic()
    assert supervise(commands(STAYS, KILLS_ITSELF), Limits(), logs, workdir) == 3
    assert time.monotonic() - begun < 5
    err = capfd.readouterr().err
    assert "process 1 (pid " in err and "was killed by SIGKILL at " in err
    assert ", in step 41, 0." in err and "; ending the others" in err
    assert "saved" in (logs / "process-0.log").read_text()
    now = status(workdir)
    assert now["status"] == "stopped" and now["step"] == 40 and now["more"] == [1]
    assert "process 1" in now["reason"] and now["text"] == f"stopped: {now['reason']}"
    assert [file.name for file in workdir.iterdir()] == ["status.json"]


def test_an_unknown_code_shows_the_end_of_the_log(commands, logs, capfd):
    body = AFTER.format("[print('line', i) for i in range(40)]; 1 / 0")
    assert supervise(commands(STAYS, body), logs=logs) == 3
    err = capfd.readouterr().err
    assert "process 1" in err and "ended with code 1 at " in err
    assert "ZeroDivisionError" in err and "line 39" in err and "line 20\n" not in err


@pytest.mark.parametrize(("codes", "expected"), [((3, 0), 3), ((2, 3), 2), ((3, 2), 2)])
def test_exit_codes_of_orderly_exits(commands, logs, codes, expected):
    bodies = ("ready()" + AFTER.format(f"sys.exit({code})") for code in codes)
    assert supervise(commands(*bodies), logs=logs) == expected


def test_after_an_orderly_end_the_others_may_end_by_themselves(commands, logs):
    slow = AFTER.format("time.sleep(0.7); print('written'); sys.exit(3)")
    bodies = "ready()" + slow, "ready()" + AFTER.format("sys.exit(3)")
    assert supervise(commands(*bodies), logs=logs) == 3
    assert (logs / "process-0.log").read_text() == "written\n"


def test_an_orderly_exit_of_one_process_is_not_reported_again(commands, workdir, capfd):
    body = "print('gadjax: x: found 1; expected 2', file=sys.stderr); sys.exit(2)"
    assert supervise(commands(body), workdir=workdir) == 2
    assert capfd.readouterr().err == "gadjax: x: found 1; expected 2\n"
    assert status(workdir)["status"] == "running"


def test_an_abort_with_another_death_is_its_consequence(commands, logs, capfd):
    # Both have ended before the next poll of the supervisor.
    killed = AFTER.format("os.kill(os.getpid(), 9)")
    bodies = "ready()" + AFTER.format(ABORTS), "ready()" + killed
    assert supervise(commands(*bodies), logs=logs) == 3
    err = capfd.readouterr().err
    assert err.count("was killed by") == 1 and "process 1" in err and "SIGKILL" in err


def test_a_lost_peer_is_reported_with_the_message_of_jax(commands, logs, workdir, capfd):
    assert supervise(commands(ABORTS), logs=logs, workdir=workdir) == 3
    err = capfd.readouterr().err
    assert "SIGABRT" in err and "a peer was lost: The following tasks are unhealthy" in err
    assert "heartbeats): 1\n" in err
    assert status(workdir)["status"] == "running"  # for its launcher to start it again
    assert supervise(commands("os.abort()"), logs=logs, workdir=workdir) == 3
    assert status(workdir)["status"] == "stopped"


def test_a_hung_step_prints_its_stacks(commands, logs, workdir, capfd):
    refuses = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    runs = "[(beat(i), time.sleep(0.1)) for i in range(7, 900)]"
    steps = "beat(4); time.sleep(0.4); beat(5); waits_for_its_peer()"
    hangs = f"{refuses}def waits_for_its_peer(): time.sleep(60)\n{steps}"
    begun = time.monotonic()
    limits = Limits(hang=1, grace=0.5)
    assert supervise(commands(runs, hangs), limits, logs, workdir) == 3
    assert time.monotonic() - begun < 7
    err = capfd.readouterr().err
    assert err.count("gadjax launch:") == 1 and "process 1 (pid " in err
    assert "hangs in step 5, " in err and str(logs) in err
    assert "waits_for_its_peer" in (logs / "process-1.log").read_text()
    assert "most recent call first" in (logs / "process-0.log").read_text()
    assert "in step 5" in status(workdir)["reason"] and status(workdir)["status"] == "stopped"


@pytest.mark.slow
def test_a_start_has_a_longer_limit(commands, capfd):
    first = "time.sleep(0.6); beat(0); time.sleep(0.6)"  # loads, then compiles
    assert supervise(commands(first), Limits(hang=0.3, start=30)) == 0
    assert supervise(commands("beat(1); time.sleep(0.9)"), Limits(hang=0)) == 0
    assert supervise(commands("time.sleep(60)"), Limits(hang=0.3, start=0.2)) == 3
    assert "hangs before its first step" in capfd.readouterr().err


def test_a_process_that_ignores_sigterm_is_killed(commands, logs, tmp_path):
    begun = time.monotonic()
    assert supervise(commands(REFUSES, KILLS_ITSELF), Limits(grace=0.5), logs) == 3
    assert 0.5 < time.monotonic() - begun < 5
    assert gone(int((tmp_path / "up-0").read_text()))


@pytest.fixture
def supervised(tmp_path):
    """A supervisor in a process of its own, over commands that are up: it, and their pids."""
    started = []

    def start(both: list[list[str]], logs: Path, workdir: Path) -> tuple:
        code = (
            "import json, sys; from pathlib import Path\n"
            "from gadjax.runtime.supervisor import supervise\n"
            "commands, logs, workdir = json.loads(sys.argv[1])\n"
            "sys.exit(supervise(commands, logs=Path(logs), workdir=Path(workdir)))"
        )
        arguments = json.dumps([both, str(logs), str(workdir)])
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, arguments],
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )
        files = [tmp_path / f"up-{i}" for i in range(len(both))]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        return started[0], [int(file.read_text()) for file in files]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_forwarded_and_a_saved_run_succeeds(commands, logs, workdir, supervised, kind):
    process, pids = supervised(commands(STAYS, STAYS), logs, workdir)
    os.killpg(process.pid, kind)  # as a terminal sends it: the children are not in this group
    assert process.wait(10) == 0
    for i in (0, 1):
        assert (logs / f"process-{i}.log").read_text() == "saved\n"
    assert status(workdir)["status"] == "running"  # theirs to change
    assert all(map(gone, pids))


def test_a_third_signal_kills(commands, logs, workdir, supervised):
    process, pids = supervised(commands(REFUSES), logs, workdir)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 3
    assert all(map(gone, pids)) and status(workdir)["status"] == "running"


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="PR_SET_PDEATHSIG is Linux's alone",
)
def test_no_process_outlives_a_killed_supervisor(commands, logs, workdir, supervised):
    process, pids = supervised(commands(STAYS, STAYS), logs, workdir)
    process.kill()
    wait_for(lambda: all(map(gone, pids)))
    assert (logs / "process-1.log").read_text() == "saved\n"
