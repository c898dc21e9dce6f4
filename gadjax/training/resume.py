"""Checks of a resumed run: its config and its inputs are those with which it was begun."""

from pathlib import Path

from ml_collections import ConfigDict

from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import read_json
from gadjax.training.config import absolute_source, as_json, default_config, with_absolute_paths

INPUTS = "inputs.json"  # in a workdir: fingerprints of what its run reads
# Keys that may change when a run is resumed; any other difference makes it another run.
MAY_CHANGE = ("mesh", "attention", "offload", "steps", "log", "preview", "checkpoint")


def check_resume(saved: dict, config: ConfigDict, where: Path) -> None:
    """Check that a run may resume a workdir.

    A key that is missing in an older workdir's config had its default there.

    Args:
      saved: config.json of the workdir.
      config: config of the run.
      where: the workdir, for messages.

    Raises: InputError naming every key that differs and may not.
    """
    saved = _with_defaults(saved, as_json(default_config()))
    saved["teacher"] = absolute_source(saved["teacher"])  # older workdirs have it as given
    requested = as_json(with_absolute_paths(config))
    changed = [d for d in differences(saved, requested) if d[0].split(".")[0] not in MAY_CHANGE]
    if changed:
        values = ((key, short_repr(old, 200), short_repr(new, 200)) for key, old, new in changed)
        text = "; ".join(f"{key}: found {old}, asked for {new}" for key, old, new in values)
        raise InputError(f"{where}: belongs to another config ({text}); expected the same values")


def check_inputs(workdir: Path, config: ConfigDict, inputs: dict[str, str]) -> None:
    """Check that a run's inputs are those with which its workdir was begun.

    A workdir without a record of its inputs passes.

    Args:
      workdir: the run's workdir.
      config: config of the run.
      inputs: fingerprints by key of the config, as `input_fingerprints` returns them.

    Raises: InputError naming an input with another fingerprint.
    """
    path = workdir / INPUTS
    if not path.exists():
        return
    saved = read_json(path)
    for key, fingerprint in inputs.items():
        if saved.get(key, fingerprint) != fingerprint:
            kind = "text encoders" if key == "teacher" else "contents"
            raise InputError(
                f"{key} {config[key]}: found other {kind} (fingerprint {fingerprint}); expected "
                f"those with which the run in {workdir} was begun ({short_repr(saved[key])})"
            )


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """Leaves in which two configs differ, as (key, old value, new value).

    Args:
      old, new: nested configs.
      prefix: names of the keys above, with a dot.
    """
    leaves = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            leaves += differences(a, b, f"{name}.")
        elif a != b:
            leaves.append((name, a, b))
    return leaves


def _with_defaults(config: dict, default: dict) -> dict:
    """`config` with its missing keys taken from `default`, at every depth."""
    nested = {
        key: _with_defaults(value, default[key])
        for key, value in config.items()
        if isinstance(value, dict) and isinstance(default.get(key), dict)
    }
    return default | config | nested
