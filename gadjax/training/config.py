"""Training configs: defaults, bundled files, and parsing with overrides."""

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

# Sources of networks that are no paths: the teacher, and the student's initial parameters.
OF_RUN = "teacher", "start"
INITS = "teacher", "random"  # values of student.init that are no paths
# The repository's configs: in a clone a link to its folder of that name, in the wheel a folder.
CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG_HELP = (
    "--config FILE[:variant], or NAME[:variant] of a bundled config, and --config.a.b=value "
    "choose and change the config"
)


def default_config() -> ConfigDict:
    """Default training config with every key; a config file changes values and sets `objective`."""
    from gadjax.models.adapters import TARGETS  # here: `train --help` does without JAX

    return ConfigDict(
        {
            "seed": 0,
            "steps": 1000,  # student updates
            "batch": 32,  # global
            "microbatch": 0,  # global too; 0: the whole batch at once
            # -1: the remaining devices. sequence: devices that share the positions of a sample
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "dtype": "float32",  # compute dtype of networks; parameters are float32
            # Regex of the kernels of the frozen teacher, and of the start that adapters are on,
            # that are held in 8 bits, as "/(attn|ff)"
            "int8": "",
            "remat": "block",  # recomputed in reverse: none, results (all but results), block
            "attention": "auto",  # auto: Pallas (on GPUs if validated there); jnp; pallas
            "offload": (),  # some of teacher, optimizer, ema: in host memory between uses
            "teacher": "",  # diffusers pipeline folder, or asset:NAME
            # The teacher's classifier-free guidance scale. 4.5 whatever the teacher: set it for
            # yours (docs/models.md has what its pipeline draws with)
            "guidance": 4.5,
            "student": {
                "init": "teacher",  # or "random", or a diffusers folder, LoRA or workdir
                # Regex of the paths of the parameters that it trains, as "/attn2/"; "": all
                "trained": "",
                "layers": (),  # numbers of the teacher's blocks that it has; (): all
                "timesteps": (899, 674, 449, 224),  # in the network's units
                "steps": 4,
                "guidance": 1.0,  # embedded scale, where the network has it as an input
                # or "fresh_noise", added to each predicted x0 as LCM does; or "fixed_noise", the
                # initial noise each time, which no scheduler of diffusers does: not exported
                "rollout": "ode",
                # Two shares of the span of times, as (0.0, 1.0): the inner times of the grid are
                # drawn anew between them for every sample of an update. (): the timesteps above.
                "redraw": (),
                # Numbers, from 0 on, of the first of its steps that it trains and of the one after
                # the last, as (2, 4); (): all
                "trained_steps": (),
                # A diffusers folder, LoRA or workdir: the frozen network of the steps before those
                "earlier_expert": "",
                "latents": "student",  # at drawn steps: of its own rollout; or "data", noised
                # Low-rank adapters on the teacher's frozen weights. rank 0: whole weights are
                # trained. alpha: their factor times the rank; None: the rank
                "lora": {"rank": 0, "alpha": placeholder(float), "targets": TARGETS},
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
            # None: as in optim. warmup and decay count steps of the run here and for the
            # discriminator too, however many updates a step has.
            "critic": {
                "updates": 1,  # per student update
                "first": True,  # they come before the student's; False: after it, as in DMD2's code
                # A diffusers folder, LoRA or workdir; None: the teacher, or the random student
                "init": placeholder(str),
                "trained": placeholder(str),  # None: as the student's
                "follow": 0.0,  # share of the student that it takes over at each student update
                "lr": 1e-5,
                "b1": 0.0,
                "warmup": placeholder(int),
                "decay": placeholder(int),
                "weight_decay": placeholder(float),
                "clip": placeholder(float),
                "lora": {  # None: as the student's
                    "rank": placeholder(int),
                    "alpha": placeholder(float),
                    "targets": placeholder(str),
                },
            },
            "discriminator": {  # None: as the critic's, with which it is updated
                "lr": placeholder(float),
                "b1": placeholder(float),
                "warmup": placeholder(int),
                "decay": placeholder(int),
                "weight_decay": placeholder(float),
                "clip": placeholder(float),
            },
            "ema": 0.999,
            "data": {
                # Exactly one of these five sources; the last three have pictures.
                "prompts": "",  # txt, jsonl or csv file, or asset:NAME
                "embeddings": "",  # folder written by `gadjax embed`
                "world": "",  # module that draws captioned pictures
                "images": "",  # folder of pictures with metadata.jsonl, metadata.csv or NAME.txt
                "latents": "",  # folder written by `gadjax embed --images`
                # Of data.prompts (`gadjax.data.versions`):
                "match": "",  # regex of those that are used; "": all
                "forget": "",  # words in whose place the teacher of `sfd` reads the next ones
                "replacement": "",
                "styles": (),  # endings, by which `dmm` chooses a teacher; it reads none of them
                "column": "prompt",  # of the prompts or captions, in jsonl and csv
                "background": "white",  # under transparent pictures
                "cache": 0,  # samples of the world encoded once, ahead; 0: each when used
                "dropout": 0.0,  # caption dropout, where a teacher is trained
                "length": 120,  # text tokens
            },
            # failures: saves in a row that may fail before the run stops
            "checkpoint": {"every": 500, "keep": 3, "failures": 0},
            # trackers: some of wandb, trackio; TensorBoard is written if tensorflow is installed
            "log": {"every": 10, "trackers": (), "project": "gadjax"},
            "preview": {
                "every": 500,
                "prompts": 4,
                "seeds": 4,  # noises of each prompt
                "scale": 3,
                # Folder of a feature network, for the signals vendi and alignment; None: without
                "features": placeholder(str),
                "stop_when": (),  # signals whose alarm stops the run (docs/monitoring.md)
            },
            "stop_after_bad": 3,  # non-finite updates in a row
        }
    )


def variant_config(objectives: Mapping[str, Mapping[str, Any]], variant: str) -> ConfigDict:
    """Default config with the objective of a config file's variant.

    Raises: InputError for a variant that is not one of `objectives`.
    """
    if variant not in objectives:
        raise InputError(
            f"--config: found the variant {variant!r}; expected one of {', '.join(objectives)}"
        )
    config = default_config()
    config.objective = objectives[variant]
    return config


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """Parse `--config FILE[:variant] --config.a.b=value ...` into a locked config.

    In place of a file, the name of a bundled config: `--config pixart_gad` (`config_names`).

    Raises: InputError in one line for a missing file, an unknown name, an unknown key (did you
      mean), a wrong type or an unknown variant.
    """
    values = flags.FlagValues()
    argv = ["gadjax", *_with_files(arguments)]
    config_flags.DEFINE_config_file("config", None, CONFIG_HELP, flag_values=values, sys_argv=argv)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is the user's
    try:
        rest = values(argv)
        config = values.config
        values_by_key = None if config is None else config.to_dict()  # raises if missing
    except Exception as error:  # config files are Python: whatever they raise is the user's input
        raise InputError(_one_line(error)) from error
    finally:
        sys.dont_write_bytecode = writes
    if config is None:
        raise InputError("--config: found nothing; expected FILE[:variant] or NAME[:variant]")
    if len(rest) > 1:
        raise InputError(f"arguments: found {rest[1]!r}; expected only flags")
    _check_keys(values_by_key, default_config().to_dict(), "")
    return config


def config_names() -> list[str]:
    """Names of the bundled configs, as `--config` takes them."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def _with_files(arguments: Sequence[str]) -> list[str]:
    """Arguments with the value of `--config` as a path to a file."""
    files = list(arguments)
    for i, argument in enumerate(files):
        flag, equals, value = argument.partition("=")
        if argument == "--":
            break
        if flag not in ("--config", "-config"):
            continue
        if equals:
            files[i] = f"{flag}={_config_file(value)}"
        elif i + 1 < len(files):
            files[i + 1] = _config_file(files[i + 1])
    return files


def _config_file(value: str) -> str:
    """Path and variant for NAME[:variant] of a bundled config; anything else is returned as it is.

    Raises: InputError for a name that is neither a file nor a bundled config.
    """
    name, colon, variant = value.partition(":")
    if not name or name.startswith("-") or Path(name).name != name or name.endswith(".py"):
        return value
    if os.path.isfile(name):
        return value
    names = config_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"--config: found {short_repr(name)}; expected a file, or one of {', '.join(names)}"
            f"{hint}"
        )
    return f"{CONFIGS / name}.py{colon}{variant}"


def changed_config(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Copy of `config` with some values replaced; `changes` is nested as `config` is.

    Raises: InputError in one line for an unknown key (did you mean) or a wrong type.
    """
    _check_keys(changes, default_config().to_dict(), "", complete=False)
    config = ConfigDict(config)
    try:
        config.update(changes)
    except (TypeError, ValueError) as error:
        raise InputError(f"config: {' '.join(str(error).split())}") from error
    return config


def _one_line(error: Exception) -> str:
    text = str(error)
    if raised := [e for e in _chain(error) if isinstance(e, InputError)]:
        text = str(raised[-1])  # raised by the file itself; flags and ml_collections quote it
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


def _check_keys(config: Mapping, known: dict, prefix: str, complete: bool = True) -> None:
    """Check a config's keys and nesting against the defaults.

    Args:
      config: values by key, nested.
      known: defaults by key, nested; the options of terms are not checked here.
      prefix: names of the keys above, with a dot.
      complete: every known key must be there.

    Raises: InputError for an unknown or missing key, or a value where keys belong.
    """
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise InputError(f"config: found the key {name}; expected a known one{hint}")
        if isinstance(value, dict) != isinstance(known[key], dict):
            expected = "keys below it" if isinstance(known[key], dict) else "a plain value"
            raise InputError(f"config: found {name} = {value!r}; expected {expected}")
        if isinstance(value, dict) and name != "objective":
            _check_keys(value, known[key], f"{name}.", complete)
    for key in known if complete else ():
        if key not in config:
            raise InputError(f"config: found no key {prefix}{key}; expected it")


def write_json(config: ConfigDict, path: Path) -> None:
    """Write a config as sorted JSON, atomically."""
    write_atomic(path, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def as_json(config: ConfigDict) -> dict:
    """The config as it is read back from JSON (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """Copy of a config whose teacher, student and further networks have absolute paths."""
    from gadjax.objectives import TERMS  # here: `train --help` does without JAX
    from gadjax.objectives.compose import term_class

    config = ConfigDict(config)
    config.teacher = absolute_source(config.teacher)
    config.student.init = absolute_source(config.student.init)
    config.critic.init = absolute_source(config.critic.init)
    config.student.earlier_expert = absolute_source(config.student.earlier_expert)
    config.preview.features = absolute_source(config.preview.features)
    for name, options in config.objective.items():
        for option in getattr(term_class(name, TERMS), "sources", ()):
            if value := options.get(option):
                one = isinstance(value, str)
                options[option] = (
                    absolute_source(value) if one else tuple(map(absolute_source, value))
                )
    return config


def absolute_source(source: Any) -> Any:
    """Source with an absolute path, valid in any directory; what is no path is unchanged."""
    if not isinstance(source, str) or source in ("", *OF_RUN, *INITS):
        return source
    return source if source.startswith(assets.PREFIX) else os.path.abspath(assets.resolve(source))
