"""Status of a run, read quickly from its workdir alone, on any machine that has access to it.

The files are untrusted: they may be missing, half written or not of a run. A field that makes no
sense counts as missing; only config.json has to be one of a run.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from gadjax.errors import InputError, escape_nonprintable
from gadjax.io.manifest import COMMIT_MARKER
from gadjax.io.storage import as_path, check_access, is_remote
from gadjax.io.untrusted import is_count, is_number, is_text, read_json
from gadjax.runtime.goodput import GOODPUT, KINDS, shares

TAIL_BYTES = 1 << 16  # read from the end of metrics.jsonl and health.jsonl
# A run gets a warning this many steps after its next row of metrics was due, and this many seconds;
# STARTUP_SECONDS while it loads and compiles.
LATE_STEPS, LATE_SECONDS, STARTUP_SECONDS = 10, 60, 1800
HEALTH = "health.jsonl"  # signals of the previews, a row each
OF_TEACHER = "_teacher"  # ends the names of the teacher's
# Columns of metrics.jsonl that the run adds to the objective's metrics.
PROGRESS_COLUMNS = ("step", "time", "images_per_second", "goodput")


def _is_finite(value: Any) -> bool:
    return is_number(value, 1e30)


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 1e-9


STATUS_FIELDS = {
    "status": is_text,
    "text": is_text,
    "step": is_count,
    "steps": is_count,
    "time": _is_finite,
}
ROW_FIELDS = {"step": is_count, "time": _is_finite, "images_per_second": _is_positive}
RUN_FIELDS = {
    "device": is_text,
    "devices": _is_positive,
    "processes": is_count,
    "flops_per_step": _is_finite,
    "peak_flops": lambda value: value is None or _is_positive(value),
}


def read_status(workdir: str | Path, now: float | None = None) -> dict[str, Any]:
    """Read the fields of `gadjax status --json`; None for a field that is not known (yet).

    now: Unix seconds. Raises: InputError if it is not a workdir, or cannot be read.
    """
    workdir, now = as_path(workdir, "WORKDIR"), time.time() if now is None else now
    check_access(workdir)
    config = _read_json(workdir / "config.json")
    sizes = _fields(config, {"steps": is_count, "batch": _is_positive})
    if len(sizes) < 2:
        fault = "no config.json of a run" if workdir.is_dir() else "no such folder"
        raise InputError(f"{workdir}: found {fault}; expected a workdir of gadjax train")
    saved, row = _fields(_read_json(workdir / "status.json"), STATUS_FIELDS), _row(workdir)
    run = _fields(_read_json(workdir / "run.json"), RUN_FIELDS)
    state, total = saved.get("status", "unknown"), saved.get("steps", sizes["steps"])
    step = max(saved.get("step", 0), row.get("step", 0))
    speed = row.get("images_per_second")
    seconds = sizes["batch"] / speed if speed else None
    last_update = max(row.get("time", 0), saved.get("time", 0)) or None
    clock = _goodput_record(workdir / GOODPUT)
    age = None if last_update is None else now - last_update
    running = state == "running"
    status = {
        "workdir": str(workdir),
        "state": state,
        "text": saved.get("text", state),
        "step": step,
        "steps": total,
        "eta_seconds": (total - step) * seconds if running and seconds else None,
        "images_per_second": speed,
        "images_per_second_per_chip": None,
        "seconds_per_step": seconds,
        "device": None,
        "devices": None,
        "processes": None,
        "utilisation": None,
        "metrics": {name: value for name, value in row.items() if name not in PROGRESS_COLUMNS},
        "seconds_since_news": age,
        "goodput": shares(clock["seconds"]) if clock else None,
        "seconds": clock.get("seconds"),
        "starts": clock.get("starts"),
        "checkpoint": _checkpoint(workdir / "checkpoints", now),
        "preview": _newest(workdir / "previews", "*.png"),
        "profile": _newest(workdir / "profile", "plugins/profile/*"),
        "health": _health(workdir / HEALTH),
        "warning": None,
    }
    if len(run) == len(RUN_FIELDS):
        status |= {name: run[name] for name in ("device", "devices", "processes")}
        if speed:
            status["images_per_second_per_chip"] = speed / run["devices"]
            if run["peak_flops"]:
                peak = run["peak_flops"] * run["devices"]
                status["utilisation"] = run["flops_per_step"] / seconds / peak
    if running and age is not None and age > _late_seconds(saved, row, config, seconds):
        status["warning"] = (
            f"no news for {_duration(age)}: it has probably died; the same command resumes it"
        )
    return status


def parse_health(line: str) -> dict[str, Any] | None:
    """Row of health.jsonl: its step, numbers by name (None where one is not finite), and the names
    of its alarms; None for a line that is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not is_count(row.get("step")):
        return None
    alarms = row.get("alarms")
    numbers = {k: v for k, v in row.items() if k != "step" and (v is None or _is_finite(v))}
    alarms = [name for name in alarms if is_text(name)] if isinstance(alarms, list) else []
    return numbers | {"step": row["step"], "alarms": alarms}


def _late_seconds(
    saved: dict[str, Any], row: dict[str, Any], config: dict[str, Any], seconds: float | None
) -> float:
    """Age in seconds from which the last news of a running run is late.

    Args:
      saved: fields of status.json.
      row: last row of metrics.jsonl.
      config: the run's config.json.
      seconds: of a step; None where it is not known.
    """
    newer_row = row.get("time", 0) >= saved.get("time", 0)
    has_stepped = newer_row or row.get("step", 0) > saved.get("step", 0)
    limit_seconds = LATE_SECONDS if has_stepped else STARTUP_SECONDS
    if seconds:
        log = config.get("log")
        every = _fields(log if isinstance(log, dict) else {}, {"every": is_count})
        limit_seconds += (every.get("every", 1) + LATE_STEPS) * seconds
    return limit_seconds


def table(status: dict[str, Any]) -> str:
    """Format a status as the text block of `gadjax status`."""
    speed, seconds = status["images_per_second"], status["seconds_per_step"]
    share = status["step"] / status["steps"] if status["steps"] else 0
    lines = [("step", f"{status['step']} / {status['steps']} ({share:.0%})")]
    if status["eta_seconds"] is not None:
        lines.append(("left", _duration(status["eta_seconds"])))
    if speed:
        chips = status["images_per_second_per_chip"]
        per_chip = f", {chips:.4g} per chip" if chips is not None else ""
        lines.append(("speed", f"{speed:.4g} images/s{per_chip}, {seconds:.4g} s/step"))
    if status["device"]:
        where = f"{status['devices']} x {status['device']}"
        if status["processes"] > 1:
            where += f" in {status['processes']} processes"
        lines.append(("devices", where))
        if status["utilisation"] is not None:
            lines.append(("utilisation", f"{status['utilisation']:.1%} of the bfloat16 peak"))
        elif speed:
            lines.append(("utilisation", "unknown hardware"))
    lines += _columns("metrics", [f"{k} {_number(v)}" for k, v in status["metrics"].items()])
    health = status["health"] or {"signals": {}, "alarms": []}
    signals = [
        f"{k} {_number(v)}" + ("" if of_teacher is None else f" (teacher {_number(of_teacher)})")
        for k, (v, of_teacher) in health["signals"].items()
    ]
    lines += _columns("health", signals, 2)
    if status["goodput"]:
        parts = "  ".join(f"{kind} {status['goodput'][kind]:.1%}" for kind in KINDS)
        starts = f"  ({status['starts']} starts)" if status["starts"] > 1 else ""
        lines.append(("goodput", parts + starts))
    last = status["checkpoint"]
    text = f"step {last['step']}, {_duration(last['age_seconds'])} ago" if last else "none yet"
    lines.append(("checkpoint", text))
    lines += [(name, status[name]) for name in ("preview", "profile") if status[name]]
    head = f"{status['workdir']}: {status['text']}"
    block = [f"  {name:<12}{text}" for name, text in lines]
    warning = [f"  WARNING: {status['warning']}"] if status["warning"] else []
    if health["alarms"]:
        names = ", ".join(health["alarms"])
        warning.append(f"  ALARM at step {health['step']}: {names} (docs/monitoring.md)")
    return "\n".join(map(escape_nonprintable, [head, *block, *warning]))


def _columns(name: str, values: list[str], count: int = 4) -> list[tuple[str, str]]:
    """Lines of `count` values each, the first of them with the name."""
    begins = range(0, len(values), count)
    return [("" if begin else name, "  ".join(values[begin : begin + count])) for begin in begins]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing or not valid."""
    try:
        return read_json(path)
    except InputError:
        return {}


def _fields(data: dict[str, Any], kinds: dict[str, Callable[[Any], bool]]) -> dict[str, Any]:
    return {key: data[key] for key, valid in kinds.items() if key in data and valid(data[key])}


def _goodput_record(path: Path) -> dict[str, Any]:
    """Starts and seconds by kind of goodput.json; {} without a valid record."""
    record = _read_json(path)
    starts, seconds = record.get("starts"), record.get("seconds")
    if not is_count(starts) or not isinstance(seconds, dict):
        return {}
    seconds = _fields(seconds, dict.fromkeys(KINDS, _is_finite))
    return {"starts": starts, "seconds": seconds} if len(seconds) == len(KINDS) else {}


def _row(workdir: Path) -> dict[str, Any]:
    """Last complete row of metrics.jsonl, with the last known images_per_second."""
    rows = []
    for line in _tail(workdir / "metrics.jsonl"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the tail may cut the first line, a kill the last one
        if isinstance(row, dict):
            more = {
                k: v
                for k, v in row.items()
                if k not in PROGRESS_COLUMNS and (v is None or _is_finite(v))
            }
            rows.append(_fields(row, ROW_FIELDS) | more)
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return rows[-1] | {"images_per_second": speeds[-1] if speeds else None} if rows else {}


def _health(path: Path) -> dict[str, Any] | None:
    """Newest row of health.jsonl: its step, (student, teacher) by signal, and alarms."""
    rows = [row for row in map(parse_health, _tail(path)) if row]
    if not rows:
        return None
    row = rows[-1]
    names = [k for k in row if k not in ("step", "alarms") and not k.endswith(OF_TEACHER)]
    signals = {name: [row[name], row.get(name + OF_TEACHER)] for name in names}
    return {"step": row["step"], "signals": signals, "alarms": row["alarms"]}


def _tail(path: Path) -> list[str]:
    """Last lines of a file; none where it cannot be read."""
    try:
        if not path.is_file():  # reading a pipe would hang
            return []
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - TAIL_BYTES, 0))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _checkpoint(folder: Path, now: float) -> dict[str, Any] | None:
    """Newest committed checkpoint: its step, and its age in seconds."""
    remote = is_remote(folder)
    marks = {
        int(path.parent.name): path
        for path in folder.glob(f"[0-9]*/{COMMIT_MARKER}")
        if path.parent.name.isdecimal()
    }
    for step in sorted(marks, reverse=True):
        with suppress(OSError):  # the run has removed it by now
            stat = marks[step].stat()
            age = max(now - (stat.mtime if remote else stat.st_mtime), 0)
            return {"step": step, "age_seconds": age}
    return None


def _newest(folder: Path, pattern: str) -> str | None:
    """Return the newest matching path: the last by name, which begins with the step or the date."""
    return max(map(str, folder.glob(pattern)), default=None)


def _duration(seconds: float) -> str:
    if abs(seconds) > 1e13:  # days beyond what timedelta counts
        return f"{seconds:.3g} s"
    return str(timedelta(seconds=round(seconds)))
