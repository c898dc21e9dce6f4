"""Where a run stands, read from its workdir alone: in a moment, from any machine that sees it."""

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from gadjax.errors import InputError
from gadjax.storage import as_path, is_remote, reach
from gadjax.training.goodput import GOODPUT, KINDS, shares
from gadjax.training.seal import COMMIT, SEAL

TAIL = 1 << 16  # bytes of metrics.jsonl that are read, from its end
# A run is late after so many steps beyond its next line of metrics, and these seconds: the second
# where it loads and compiles.
LATE, PAUSE, START = 10, 60, 1800
OWN = ("step", "time", "images_per_second", "goodput")  # of a row; the rest is the objective's


def read_status(workdir: str | Path, now: float | None = None) -> dict[str, Any]:
    """Everything that `gadjax status` prints, by name; None for what is not known (yet).

    now: Unix seconds. Raises: InputError for what is no workdir, or cannot be read.
    """
    workdir, now = as_path(workdir, "WORKDIR"), time.time() if now is None else now
    reach(workdir)
    config = _json(workdir / "config.json")
    if "steps" not in config or "batch" not in config:
        found = "no config.json of a run" if workdir.is_dir() else "no such folder"
        raise InputError(f"{workdir}: found {found}; expected a workdir of gadjax train")
    said, run, row = _json(workdir / "status.json"), _json(workdir / "run.json"), _row(workdir)
    state, total = said.get("status", "unknown"), said.get("steps", config["steps"])
    step = max(said.get("step", 0), row.get("step", 0))
    speed = row.get("images_per_second")
    seconds = config["batch"] / speed if speed else None
    heard = max(row.get("time", 0), said.get("time", 0)) or None
    clock = _json(workdir / GOODPUT)
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
        "goodput": shares(clock["seconds"]) if "seconds" in clock else None,
        "seconds": clock.get("seconds"),
        "starts": clock.get("starts"),
        "checkpoint": _checkpoint(workdir / "checkpoints", now),
        "preview": _newest(workdir / "previews", "*.png"),
        "profile": _newest(workdir / "profile", "plugins/profile/*"),
        "warning": None,
    }
    if run:
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
            patience += (config["log"]["every"] + LATE) * seconds
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
    return "\n".join([head, *block, *warning])


def _json(path: Path) -> dict[str, Any]:
    """Nothing where it is not there, or not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _row(workdir: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl, with the last speed that is known."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - TAIL, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the first may be cut by the tail, the last by a kill
    speeds = [row["images_per_second"] for row in rows if row.get("images_per_second")]
    return rows[-1] | {"images_per_second": speeds[-1] if speeds else None} if rows else {}


def _checkpoint(folder: Path, now: float) -> dict[str, Any] | None:
    """The newest sealed one; on an object store, the newest committed one, which has a seal."""
    remote = is_remote(folder)
    marks = {
        int(path.parent.name): path
        for path in folder.glob(f"[0-9]*/{COMMIT if remote else SEAL}")
        if path.parent.name.isdigit()
    }
    if not marks:
        return None
    stat = marks[step := max(marks)].stat()
    return {"step": step, "age_seconds": max(now - (stat.mtime if remote else stat.st_mtime), 0)}


def _newest(folder: Path, pattern: str) -> str | None:
    """By name, which begins with the step or the date."""
    return max(map(str, folder.glob(pattern)), default=None)


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
