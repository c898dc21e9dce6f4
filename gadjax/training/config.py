"""Configurations: their defaults, reading them with overrides, and comparing two runs."""

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from gadjax import assets
from gadjax.errors import InputError, short_repr
from gadjax.io.storage import write_atomic
from gadjax.io.untrusted import read_json

INPUTS = "inputs.json"  # in a workdir: fingerprints of what its run reads
# What may change when a run is resumed; any other difference is another run.
MAY_CHANGE = ("mesh", "attention", "offload", "steps", "log", "preview", "checkpoint")


def default_config() -> ConfigDict:
    """Every key of a training config. A config file changes values and names its objective."""
    return ConfigDict(
        {
            "seed": 0,
            "steps": 1000,  # student updates
            "batch": 32,  # global
            "microbatch": 0,  # global too; 0: the whole batch at once
            # -1: the devices that others leave. sequence: that share the positions of a sample
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "dtype": "float32",  # what networks compute in; parameters are float32
            "remat": "block",  # computed again in reverse: none, results (all but those), block
            "attention": "auto",  # auto: Pallas (on GPUs if it proves right there); jnp; pallas
            "offload": (),  # some of teacher, optimizer, ema: in the host's memory between uses
            "teacher": "",  # diffusers pipeline folder, or asset:NAME
            "guidance": 4.5,  # of the teacher
            "student": {
                "init": "teacher",  # or "random"
                "timesteps": (899, 674, 449, 224),  # in the network's units
                "steps": 4,
            },
            "objective": {},  # name -> {weight, ...}
            "optim": {
                "lr": 1e-5,
                "warmup": 0,  # steps
                "decay": 0,  # steps, to 0.05 of the rate; 0: none
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.0,
                "clip": 1.0,  # of the gradient's global norm; 0: none
            },
            # Of the critic and of a discriminator. What is None is as in optim; warmup and decay
            # are steps of the run here too, however many updates a step has.
            "critic": {
                "updates": 1,  # per student update
                "lr": 1e-5,
                "b1": 0.0,
                "warmup": placeholder(int),
                "decay": placeholder(int),
                "weight_decay": placeholder(float),
                "clip": placeholder(float),
            },
            "ema": 0.999,
            "data": {
                # One of these five; the last three have pictures.
                "prompts": "",  # txt, jsonl or csv file, or asset:NAME
                "embeddings": "",  # folder written by `gadjax embed`
                "world": "",  # module that draws captioned pictures
                "images": "",  # folder of pictures with metadata.jsonl, metadata.csv or NAME.txt
                "latents": "",  # folder written by `gadjax embed --images`
                "column": "prompt",  # with the prompts or captions, in jsonl and csv
                "background": "white",  # under pictures that are transparent
                "cache": 0,  # pictures of the world that are encoded once; 0: each when it is used
                "dropout": 0.0,  # of captions, where a teacher is trained
                "length": 120,  # text tokens
            },
            # failures: saves in a row that may fail before the run stops
            "checkpoint": {"every": 500, "keep": 3, "failures": 0},
            # trackers: some of wandb, trackio; TensorBoard is written where tensorflow is there
            "log": {"every": 10, "trackers": (), "project": "gadjax"},
            "preview": {"every": 500, "prompts": 8, "scale": 3},
            "stop_after_bad": 3,  # non-finite updates in a row
        }
    )


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """From `--config FILE[:variant] --config.a.b=value ...` to a locked config.

    Raises: InputError in one line for a missing file, an unknown key (did you mean), a wrong type
    or an unknown variant.
    """
    values = flags.FlagValues()
    argv = ["gadjax", *arguments]
    config_flags.DEFINE_config_file(
        "config", None, "FILE[:variant]", flag_values=values, sys_argv=argv
    )
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is the user's
    try:
        rest = values(argv)
        config = values.config
        found = None if config is None else config.to_dict()  # a file that is missing raises here
    except Exception as error:  # config files are Python: whatever they raise is the user's input
        raise InputError(_one_line(error)) from error
    finally:
        sys.dont_write_bytecode = writes
    if config is None:
        raise InputError("--config: found nothing; expected FILE[:variant]")
    if len(rest) > 1:
        raise InputError(f"arguments: found {rest[1]!r}; expected only flags")
    _check_keys(found, default_config().to_dict(), "")
    return config


def changed_config(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """`config` with other values, nested as it is.

    Raises: InputError in one line for an unknown key (did you mean) or a wrong type.
    """
    _check_keys(changes, default_config().to_dict(), "", whole=False)
    config = ConfigDict(config)
    try:
        config.update(changes)
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {' '.join(str(error).split())}") from error
    return config


def _one_line(error: Exception) -> str:
    text = str(error)
    if own := [e for e in _chain(error) if isinstance(e, InputError)]:
        text = str(own[-1])  # what the file itself raised; flags and ml_collections quote it
    if isinstance(error, AttributeError) and isinstance(error.args[0], KeyError):
        key = str(error.args[0].args[0]).strip("'")
        text = f"found no key {key!r} to change; expected one that the config file itself names"
    if isinstance(error, KeyError):
        text = f"found an unknown key or variant, {error.args[0]}"
    if "\\n" in text:  # a message that ml_collections quoted, its line breaks spelt out
        text = text.replace("\\n", ". ").replace("\\'", "").strip("'")
    if "Traceback" in text or isinstance(error, OSError):  # ml_collections quotes it all
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split()) or type(error).__name__
    return f"--config: {text.removeprefix('--config: ')}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def _check_keys(found: Mapping, known: dict, prefix: str, whole: bool = True) -> None:
    for key, value in found.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise InputError(f"config: found the key {name}; expected a known one{hint}")
        if isinstance(value, dict) != isinstance(known[key], dict):
            expected = "keys below it" if isinstance(known[key], dict) else "a plain value"
            raise InputError(f"config: found {name} = {value!r}; expected {expected}")
        if isinstance(value, dict) and name != "objective":
            _check_keys(value, known[key], f"{name}.", whole)
    for key in known if whole else ():
        if key not in found:
            raise InputError(f"config: found no key {prefix}{key}; expected it")


def write_json(config: ConfigDict, path: Path) -> None:
    write_atomic(path, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """(key, old value, new value) of every leaf in which two configs differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append((name, a, b))
    return found


def as_json(config: ConfigDict) -> dict:
    """The config as it reads back from a file (tuples as lists)."""
    return json.loads(json.dumps(config.to_dict()))


def with_resolved_teacher(config: ConfigDict) -> ConfigDict:
    """The config with the teacher's folder from the root on: what is drawn from a workdir later may
    be drawn from another folder."""
    config = ConfigDict(config)
    config.teacher = _from_root(config.teacher)
    return config


def _from_root(teacher: Any) -> Any:
    if not isinstance(teacher, str) or not teacher or teacher.startswith(assets.PREFIX):
        return teacher
    return os.path.abspath(assets.resolve(teacher))


def check_resume(saved: dict, config: ConfigDict, where: Path) -> None:
    """Raises: InputError naming every key in which a workdir's config differs and may not.

    A key that was added since the workdir was begun had its default there.
    """
    saved = _filled(saved, as_json(default_config()))
    saved["teacher"] = _from_root(saved["teacher"])  # as it was given, in older ones
    asked = as_json(with_resolved_teacher(config))
    changed = [d for d in differences(saved, asked) if d[0].split(".")[0] not in MAY_CHANGE]
    if changed:
        values = ((key, short_repr(old, 200), short_repr(new, 200)) for key, old, new in changed)
        text = "; ".join(f"{key}: found {old}, asked for {new}" for key, old, new in values)
        raise InputError(f"{where}: belongs to another config ({text}); expected the same values")


def check_inputs(workdir: Path, config: ConfigDict, inputs: dict[str, str]) -> None:
    """Raises: InputError naming what a run reads that is no longer what it was begun with.

    A workdir that was begun without a record has nothing to be compared with.
    """
    path = workdir / INPUTS
    if not path.exists():
        return
    saved = read_json(path)
    for key, found in inputs.items():
        if saved.get(key, found) != found:
            what = "text encoders" if key == "teacher" else "contents"
            raise InputError(
                f"{key} {config[key]}: found other {what} (fingerprint {found}); expected those "
                f"with which the run in {workdir} was begun ({short_repr(saved[key])})"
            )


def _filled(found: dict, default: dict) -> dict:
    """`found` with what it lacks of `default`, at every depth."""
    deeper = {
        key: _filled(value, default[key])
        for key, value in found.items()
        if isinstance(value, dict) and isinstance(default.get(key), dict)
    }
    return default | found | deeper
