"""Write a diffusers pipeline folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import (
    CARRIED,
    INDEX,
    SCHEDULER,
    Component,
    PipelineFolder,
    listed_parts,
)
from gadjax.formats.state_dict import check_keys, tensors_from_params
from gadjax.formats.weights import STEMS, copy_folder, copy_weights, write_weights
from gadjax.io.atomic import atomic_folder, check_target
from gadjax.io.untrusted import read_json
from gadjax.types import Params


def write_pipeline(
    pipeline: PipelineFolder,
    dst: Path,
    params: Mapping[str, Params],
    *,
    scheduler: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dtype=None,
) -> Path:
    """Write a complete pipeline folder atomically: `pipeline` with the parameters of some networks.

    Args:
      pipeline: a diffusers pipeline folder. Its configurations are kept, but for `config` of a
        network in `params` where that was changed, and its other parts copied, weights under plain
        names.
      dst: the folder to write.
      params: parameters by network name.
      scheduler: replacement of scheduler_config.json, with its `_class_name`.
      overwrite: replace a pipeline folder at `dst`.
      dtype: dtype of the given networks' files; None keeps the parameters'.

    Returns: `dst`.
    Raises: InputError, with nothing written.
    """
    src, dst = pipeline.path, Path(dst)
    check_target(dst, overwrite=overwrite, marker=INDEX)
    if dst.resolve() in src.resolve().parents:
        raise InputError(f"{dst}: found {src} inside it; expected a folder elsewhere")
    for name, given in params.items():
        if name not in pipeline.components:
            raise InputError(f"{src}: found no network {name}; expected one to replace")
        part = pipeline.components[name]
        shapes = {key: value.shape for key, value in _tensors(part, given)}
        check_keys(shapes, part.abstract, part.keymap, f"{name} to be written")

    model_index = dict(pipeline.model_index)
    with atomic_folder(dst, overwrite=overwrite, marker=INDEX) as out:
        for name, part in pipeline.components.items():
            (out / name).mkdir()
            shutil.copyfile(src / name / "config.json", out / name / "config.json")
            if name in params and part.config != read_json(src / name / "config.json"):
                _write_json(out / name / "config.json", part.config)
            if name in params:
                tensors = _tensors(part, params[name])
                stem = STEMS[part.library]["safetensors"]
                write_weights(out / name, stem, tensors, dtype=dtype)
            else:
                copy_weights(part.weights, out / name)
        for name in listed_parts(src / INDEX, model_index):
            if CARRIED.fullmatch(name):
                copy_folder(src / name, out / name)
        for path in src.glob("LICENSE*"):
            shutil.copyfile(path, out / path.name)
        if scheduler is not None:
            model_index["scheduler"] = ["diffusers", scheduler["_class_name"]]
            (out / SCHEDULER).parent.mkdir(exist_ok=True)
            _write_json(out / SCHEDULER, scheduler)
        _write_json(out / INDEX, model_index)
    return dst


def _tensors(part: Component, params: Params):
    return tensors_from_params(params, part.keymap, views=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
