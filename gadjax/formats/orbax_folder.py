"""gadjax's folder format: a diffusers pipeline whose parameters are Orbax checkpoints.

  gadjax_folder.json  version; dtype and fingerprint of each network; fingerprint of the text
                      encoders and tokenizers
  params/NETWORK      one Orbax checkpoint per network, by gadjax's parameter paths, and its
                      manifest of checksums
  the rest            model_index.json, configurations, tokenizer, scheduler, cards

Orbax does not detect flipped bits, so checksums are verified before parameters are read, and
fingerprints after that.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gadjax.errors import InputError, RunStopped
from gadjax.formats.diffusers_folder import (
    CARRIED,
    INDEX,
    SCHEDULER,
    Component,
    PipelineFolder,
    check_parts,
    read_pipeline,
    read_scheduler,
)
from gadjax.formats.pipeline_classes import effective_network_config
from gadjax.formats.state_dict import check_keys, place_tensors, tensors_from_params
from gadjax.formats.weights import (
    STEMS,
    WEIGHTS_NAME,
    Weights,
    copy_folder,
    fingerprint,
    write_weights,
)
from gadjax.io.atomic import partial_folder, restore_replaced
from gadjax.io.manifest import finalize_manifest, verify, write_manifest
from gadjax.io.untrusted import is_safe_filename, is_text, read_json
from gadjax.models.params import flatten
from gadjax.models.registry import COMPONENTS, read_network
from gadjax.types import Params

MANIFEST, PARAMS, VERSION = "gadjax_folder.json", "params", 1
COPIED_FILES = ("*.json", "*.md", "LICENSE*", "NOTICE*")  # at the root and next to weights


def is_gadjax_folder(folder: Path) -> bool:
    """True for a folder in gadjax's format."""
    return (Path(folder) / MANIFEST).is_file()


def open_folder(
    folder: Path,
    *,
    dtype=None,
    variant: str | None = None,
    allow_pickle: bool = False,
    components: Collection[str] | None = None,
) -> PipelineFolder:
    """Read a pipeline folder in diffusers' or gadjax's format. Arguments as of `read_pipeline`."""
    restore_replaced(Path(folder))
    if not is_gadjax_folder(folder):
        return read_pipeline(
            folder,
            dtype=dtype,
            variant=variant,
            allow_pickle=allow_pickle,
            components=components,
        )
    if variant is not None:
        raise InputError(f"--variant: found {variant!r}; expected none, {folder} has no variants")
    return read_gadjax_folder(folder, dtype=dtype, components=components)


def read_gadjax_folder(
    folder: Path, *, dtype=None, components: Collection[str] | None = None
) -> PipelineFolder:
    """Read a folder in gadjax's format with the parameters of its networks.

    Args:
      folder: the folder.
      dtype: dtype of the parameters; None keeps the folder's.
      components: names of the networks to read; None for all.

    Returns: the folder with the parameters of these networks.
    Raises: InputError for anything absent, damaged or inconsistent.
    """
    folder = Path(folder)
    manifest, model_index = read_manifest(folder), read_json(folder / INDEX)
    networks = manifest["networks"]
    names = _parts(folder, model_index)
    for name in names:
        if not (folder / name).is_dir():
            raise InputError(f"{folder / name}: found no such folder; expected the {name}'s files")
    check_parts(folder, [*names, PARAMS])
    selected = networks if components is None else components
    if absent := sorted(set(selected) - set(networks)):
        raise InputError(f"{folder}: found no {', '.join(absent)}; expected a network of that name")
    parts = {}
    for name, entry in networks.items():
        part = abstract_component(folder, name, model_index)
        parts[name] = _read(part, entry["fingerprint"], dtype) if name in selected else part
    has_scheduler = (folder / SCHEDULER).is_file()
    scheduler = read_scheduler(folder, model_index) if has_scheduler else {}
    return PipelineFolder(folder, model_index, scheduler, parts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read gadjax_folder.json. Raises: InputError for a malformed file or another version."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        version = manifest.get("version")
        raise InputError(f"{path}: found version {version!r}; expected {VERSION}")
    networks = manifest.get("networks")
    if (
        not is_text(manifest.get("text"))
        or not isinstance(networks, dict)
        or not all(
            is_safe_filename(name) and isinstance(entry, dict) and is_text(entry.get("fingerprint"))
            for name, entry in networks.items()
        )
    ):
        raise InputError(f"{path}: found no networks with fingerprints; expected gadjax's manifest")
    return manifest


def abstract_folder(folder: Path) -> PipelineFolder:
    """Pipeline folder from its configurations alone, with abstract parameters; no weights needed.

    Raises: InputError for anything absent or unsupported.
    """
    folder = Path(folder)
    model_index = read_json(folder / INDEX)
    names = _parts(folder, model_index)
    check_parts(folder, names)
    networks = [name for name in names if not CARRIED.fullmatch(name)]
    parts = {name: abstract_component(folder, name, model_index) for name in networks}
    return PipelineFolder(folder, model_index, read_scheduler(folder, model_index), parts)


def abstract_component(folder: Path, name: str, model_index: Mapping[str, Any]) -> Component:
    """Component from its configuration alone: abstract parameters, no weight files."""
    where, entry = folder / name / "config.json", model_index.get(name)
    strings = isinstance(entry, list) and all(map(is_text, entry))
    if not strings or len(entry) != 2 or entry[1] not in COMPONENTS or entry[0] not in STEMS:
        raise InputError(f"{folder / INDEX}: found {name}: {entry}; expected [library, class]")
    config = read_json(where)
    effective = effective_network_config(model_index, name, config)
    family, spec, abstract = read_network(where, entry[1], effective)
    weights = Weights(folder / PARAMS / name, None, (), {})
    return Component(name, entry[0], family, config, spec, abstract, weights, {})


def _read(part: Component, expected_fingerprint: str, dtype) -> Component:
    import orbax.checkpoint as ocp  # takes seconds, and diffusers' folders do not need it

    path, keymap = part.weights.folder.absolute(), part.keymap
    # Verified first: Orbax's threads print tracebacks of damaged files later.
    if fault := verify(path):
        raise InputError(f"{path}: corrupt: {fault}; expected what gadjax convert wrote")
    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored = handler.metadata(path).tree
        _check_shapes(path, stored, part.abstract)  # before Orbax allocates the stored shapes
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        params = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
    except InputError:
        raise
    except Exception as error:  # a damaged checkpoint fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: missing, truncated or corrupt: found {type(error).__name__} ({reason}); "
            "expected parameters written by gadjax convert"
        ) from None
    tensors = dict(tensors_from_params(params, keymap, views=True))
    tensor_map = check_keys(
        {k: v.shape for k, v in tensors.items()}, part.abstract, keymap, str(path)
    )
    if (digits := fingerprint(tensors.items())) != expected_fingerprint:
        raise InputError(
            f"{path}: corrupt: found fingerprint {digits}; expected {expected_fingerprint}"
        )
    if dtype is not None:
        params = place_tensors(tensors.items(), tensor_map, part.abstract, dtype, str(path))
    return replace(part, params=params)


def _check_shapes(path: Path, stored: Any, abstract: Params) -> None:
    shapes = {key: tuple(leaf.shape) for key, leaf in flatten(stored).items()}
    expected = {key: tuple(leaf.shape) for key, leaf in flatten(abstract).items()}
    for key in sorted(shapes.keys() | expected.keys()):
        if shapes.get(key) != expected.get(key):
            raise InputError(
                f"{path}: {key}: found shape {shapes.get(key, 'none')}; expected "
                f"{expected.get(key, 'none')}, by the config.json of {path.name}"
            )


def write_gadjax_folder(pipeline: PipelineFolder, out: Path, text: str) -> None:
    """Write a pipeline in gadjax's format into an empty folder.

    Args:
      pipeline: the folder to convert, with parameters.
      out: the empty folder.
      text: fingerprint of the text encoders and tokenizers.

    Raises: RunStopped where it cannot be written.
    """
    import orbax.checkpoint as ocp

    _copy_without_weights(pipeline, out)
    networks = {}
    for name, part in pipeline.components.items():
        path = (out / PARAMS / name).absolute()
        try:
            ocp.PyTreeCheckpointer().save(path, part.params)
            write_manifest(path)
            finalize_manifest(path)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunStopped(f"{out}: cannot be written: {reason}") from error
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(part.params)}
        networks[name] = {
            "dtype": ", ".join(sorted(dtypes)),
            "fingerprint": fingerprint(tensors_from_params(part.params, part.keymap)),
        }
    manifest = {"version": VERSION, "networks": networks, "text": text}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_diffusers_folder(pipeline: PipelineFolder, out: Path) -> None:
    """Write a diffusers pipeline folder into an empty folder."""
    _copy_without_weights(pipeline, out)
    for name, part in pipeline.components.items():
        tensors = tensors_from_params(part.params, part.keymap, views=True)
        write_weights(out / name, STEMS[part.library]["safetensors"], tensors)


@contextmanager
def as_diffusers_folder(folder: Path, target: Path) -> Iterator[Path]:
    """Context manager: `folder`, converted to a temporary diffusers folder if it is gadjax's.

    target: the folder being written; the temporary one lies next to it, and after a kill the next
      writer of `target` removes it.
    """
    if not is_gadjax_folder(folder):
        yield folder
        return
    with partial_folder(target.resolve()) as temporary:
        write_diffusers_folder(read_gadjax_folder(folder), temporary)
        yield temporary


def _copy_without_weights(pipeline: PipelineFolder, out: Path) -> None:
    """Copy files at the root, configurations, scheduler and tokenizers."""
    src = pipeline.path
    _copy_files(src, out)
    for name in _parts(src, pipeline.model_index):
        if name in pipeline.components:
            (out / name).mkdir()
            _copy_files(src / name, out / name)
        else:
            copy_folder(src / name, out / name)


def _copy_files(src: Path, out: Path) -> None:
    for path in sorted({path for pattern in COPIED_FILES for path in src.glob(pattern)}):
        if path.is_file() and path.name != MANIFEST and not WEIGHTS_NAME.fullmatch(path.name):
            shutil.copyfile(path, out / path.name)


def _parts(folder: Path, model_index: Mapping[str, Any]) -> list[str]:
    names = [k for k, v in model_index.items() if isinstance(v, list) and v != [None, None]]
    for name in names:
        if not is_safe_filename(name):
            raise InputError(f"{folder / INDEX}: found a part named {name!r}; expected a folder's")
    return names
