"""Where a run stands, read from its workdir alone: in a moment, from any machine that sees it.

Its files may be missing, half written, or not a run's at all. What makes no sense in them is not
known, as if it were not there; only config.json has to be a run's.
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
from gadjax.io.untrusted import read_json
from gadjax.runtime.goodput import GOODPUT, KINDS, shares

TAIL = 1 << 16  # bytes of metrics.jsonl that are read, from its end
# A run is late after so many steps beyond its next line of metrics, and these seconds: the second
# where it loads and compiles.
LATE, PAUSE, START = 10, 60, 1800
OWN = ("step", "time", "images_per_second", "goodput")  # of a row; the rest is the objective's


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN is not


def _positive(value: Any) -> bool:
    return _number(value) and value > 1e-9


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _text(value: Any) -> bool:
    return isinstance(value, str)


SAID = {"status": _text, "text": _text, "step": _count, "steps": _count, "time": _number}
ROW = {"step": _count, "time": _number, "images_per_second": _positive}
RUN = {
    "device": _text,
    "devices": _positive,
    "processes": _count,
    "flops_per_step": _number,
    "peak_flops": lambda value: value is None or _positive(value),
}


def read_status(workdir: str | Path, now: float | None = None) -> dict[str, Any]:
    """Everything that `gadjax status` prints, by name; None for what is not known (yet).

    now: Unix seconds. Raises: InputError for what is no workdir, or cannot be read.
    """
    workdir, now = as_path(workdir, "WORKDIR"), time.time() if now is None else now
    check_access(workdir)
    config = _json(workdir / "config.json")
    sizes = _fields(config, {"steps": _count, "batch": _positive})
    if len(sizes) < 2:
        found = "no config.json of a run" if workdir.is_dir() else "no such folder"
        raise InputError(f"{workdir}: found {found}; expected a workdir of gadjax train")
    said, row = _fields(_json(workdir / "status.json"), SAID), _row(workdir)
    run = _fields(_json(workdir / "run.json"), RUN)
    state, total = said.get("status", "unknown"), said.get("steps", sizes["steps"])
    step = max(said.get("step", 0), row.get("step", 0))
    speed = row.get("images_per_second")
    seconds = sizes["batch"] / speed if speed else None
    heard = max(row.get("time", 0), said.get("time", 0)) or None
    clock = _clock(workdir / GOODPUT)
    age = None if heard is None else now - heard
    running = state == "running"
    found = {
        "workdir": str(workdir),
        "state": state,
        "text": said.get("text", state),
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
        "metrics": {name: value for name, value in row.items() if name not in OWN},
        "seconds_since_news": age,
        "goodput": shares(clock["seconds"]) if clock else None,
        "seconds": clock.get("seconds"),
        "starts": clock.get("starts"),
        "checkpoint": _checkpoint(workdir / "checkpoints", now),
        "preview": _newest(workdir / "previews", "*.png"),
        "profile": _newest(workdir / "profile", "plugins/profile/*"),
        "warning": None,
    }
    if len(run) == len(RUN):
        found |= {name: run[name] for name in ("device", "devices", "processes")}
        if speed:
            found["images_per_second_per_chip"] = speed / run["devices"]
            if run["peak_flops"]:
                peak = run["peak_flops"] * run["devices"]
                found["utilisation"] = run["flops_per_step"] / seconds / peak
    if running and age is not None:
        begun = row.get("time", 0) >= said.get("time", 0) or row.get("step", 0) > said.get(
            "step", 0
        )
        patience = PAUSE if begun else START
        if seconds:
            log = config.get("log")
            every = _fields(log if isinstance(log, dict) else {}, {"every": _count})
            patience += (every.get("every", 1) + LATE) * seconds
        if age > patience:
            found["warning"] = (
                f"no news for {_span(age)}: it has probably died; the same command resumes it"
            )
    return found


def table(found: dict[str, Any]) -> str:
    """For people."""
    speed, seconds = found["images_per_second"], found["seconds_per_step"]
    share = found["step"] / found["steps"] if found["steps"] else 0
    lines = [("step", f"{found['step']} / {found['steps']} ({share:.0%})")]
    if found["eta_seconds"] is not None:
        lines.append(("left", _span(found["eta_seconds"])))
    if speed:
        chips = found["images_per_second_per_chip"]
        each = f", {chips:.4g} per chip" if chips is not None else ""
        lines.append(("speed", f"{speed:.4g} images/s{each}, {seconds:.4g} s/step"))
    if found["device"]:
        where = f"{found['devices']} x {found['device']}"
        if found["processes"] > 1:
            where += f" in {found['processes']} processes"
        lines.append(("devices", where))
        if found["utilisation"] is not None:
            lines.append(("utilisation", f"{found['utilisation']:.1%} of the bfloat16 peak"))
        elif speed:
            lines.append(("utilisation", "unknown hardware"))
    values = [
        f"{k} {'not finite' if v is None else f'{v:.4g}'}" for k, v in found["metrics"].items()
    ]
    for begin in range(0, len(values), 4):
        lines.append(("" if begin else "metrics", "  ".join(values[begin : begin + 4])))
    if found["goodput"]:
        parts = "  ".join(f"{kind} {found['goodput'][kind]:.1%}" for kind in KINDS)
        starts = f"  ({found['starts']} starts)" if found["starts"] > 1 else ""
        lines.append(("goodput", parts + starts))
    last = found["checkpoint"]
    text = f"step {last['step']}, {_span(last['age_seconds'])} ago" if last else "none yet"
    lines.append(("checkpoint", text))
    lines += [(name, found[name]) for name in ("preview", "profile") if found[name]]
    head = f"{found['workdir']}: {found['text']}"
    block = [f"  {name:<12}{text}" for name, text in lines]
    warning = [f"  WARNING: {found['warning']}"] if found["warning"] else []
    return "\n".join(map(escape_nonprintable, [head, *block, *warning]))


def _json(path: Path) -> dict[str, Any]:
    """Nothing where it is not there, or not whole."""
    try:
        return read_json(path)
    except InputError:
        return {}


def _fields(found: dict[str, Any], kinds: dict[str, Callable[[Any], bool]]) -> dict[str, Any]:
    return {key: found[key] for key, valid in kinds.items() if key in found and valid(found[key])}


def _clock(path: Path) -> dict[str, Any]:
    """What the clock wrote, or nothing."""
    found = _json(path)
    starts, seconds = found.get("starts"), found.get("seconds")
    if not _count(starts) or not isinstance(seconds, dict):
        return {}
    seconds = _fields(seconds, dict.fromkeys(KINDS, _number))
    return {"starts": starts, "seconds": seconds} if len(seconds) == len(KINDS) else {}


def _row(workdir: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl, with the last speed that is known."""
    path = workdir / "metrics.jsonl"
    try:
        if not path.is_file():  # a pipe would be waited for
            return {}
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - TAIL, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the first may be cut by the tail, the last by a kill
        if isinstance(row, dict):
            more = {k: v for k, v in row.items() if k not in OWN and (v is None or _number(v))}
            rows.append(_fields(row, ROW) | more)
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return rows[-1] | {"images_per_second": speeds[-1] if speeds else None} if rows else {}


def _checkpoint(folder: Path, now: float) -> dict[str, Any] | None:
    """The newest committed one, which has a seal."""
    remote = is_remote(folder)
    marks = {
        int(path.parent.name): path
        for path in folder.glob(f"[0-9]*/{COMMIT_MARKER}")
        if path.parent.name.isdecimal()
    }
    for step in sorted(marks, reverse=True):
        with suppress(OSError):  # a running run has removed it by now
            stat = marks[step].stat()
            age = max(now - (stat.mtime if remote else stat.st_mtime), 0)
            return {"step": step, "age_seconds": age}
    return None


def _newest(folder: Path, pattern: str) -> str | None:
    """By name, which begins with the step or the date."""
    return max(map(str, folder.glob(pattern)), default=None)


def _span(seconds: float) -> str:
    if abs(seconds) > 1e13:  # days beyond what timedelta counts
        return f"{seconds:.3g} s"
    return str(timedelta(seconds=round(seconds)))
