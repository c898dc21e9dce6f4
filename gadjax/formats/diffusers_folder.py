"""Check and read a diffusers pipeline folder.

Layout: model_index.json names the parts; each network has a folder with config.json and weights;
scheduler and tokenizers have no weights.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gadjax.errors import InputError
from gadjax.formats.pipeline_classes import effective_network_config, effective_scheduler_config
from gadjax.formats.state_dict import TensorMap, check_dtypes, check_keys, place_tensors
from gadjax.formats.weights import STEMS, Weights, component_variant, open_weights
from gadjax.io.untrusted import check_files_no_escape, check_no_escape, is_safe_filename, read_json
from gadjax.models.family import Family
from gadjax.models.keymap import KeyMap
from gadjax.models.registry import COMPONENTS, read_network
from gadjax.types import Params

INDEX = "model_index.json"
SCHEDULER = Path("scheduler", "scheduler_config.json")
# Parts that are no networks: they are copied unchanged.
CARRIED = re.compile(r"scheduler|tokenizer(_\d+)?|feature_extractor|safety_checker")


@dataclass(frozen=True)
class Component:
    """One network of a pipeline.

    Attributes:
      name: name of the part in model_index.json.
      library: "diffusers" or "transformers".
      family: family of the class.
      config: config.json as in the file.
      spec: the family's Config, with the pipeline's corrections.
      abstract: shapes and dtypes of the parameters.
      weights: weight files and their headers.
      tensor_map: key in `weights` -> parameter.
      params: numpy arrays in the file's dtype unless another was asked for; None when the
        component was only checked.
    """

    name: str
    library: str
    family: Family
    config: dict[str, Any]
    spec: Any
    abstract: Params
    weights: Weights
    tensor_map: TensorMap
    params: Params | None = None

    @property
    def keymap(self) -> KeyMap:
        return self.family.keymap_of(self.spec)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Regexes of the paths of parameters that are never trained."""
        return self.family.frozen


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline folder: its configurations and networks.

    Attributes:
      path: the folder.
      model_index: contents of model_index.json.
      scheduler: scheduler_config.json with the pipeline's corrections; empty without a scheduler.
      components: networks by name.
    """

    path: Path
    model_index: dict[str, Any]
    scheduler: dict[str, Any]
    components: dict[str, Component]

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline in diffusers; empty without one."""
        return self.model_index.get("_class_name", "")

    @property
    def backbone(self) -> str:
        """Name of the denoiser's network: "unet", or else "transformer"."""
        return "unet" if "unet" in self.components else "transformer"

    @property
    def files(self) -> str:
        """Names of the weight files in one line; shards are named by their index."""
        firsts = (part.weights.files[0] for part in self.components.values() if part.weights.files)
        return ", ".join(str(path.relative_to(self.path)) for path in firsts)

    @property
    def unused_files(self) -> list[str]:
        """Other weight files of the same networks, which diffusers does not read either."""
        others = (path for part in self.components.values() for path in part.weights.unused_files)
        return [str(path.relative_to(self.path)) for path in others]

    @property
    def text_encoders(self) -> list[str]:
        """Names of the text encoders."""
        return [name for name in self.components if name.startswith("text_encoder")]


def check_pipeline(
    folder: Path, *, variant: str | None = None, allow_pickle: bool = False
) -> PipelineFolder:
    """Validate a pipeline folder from its configurations and weight headers, within seconds.

    Accounts for every tensor of every network by name, shape and dtype.

    Args:
      folder: a diffusers pipeline folder.
      variant: variant of the weight files, such as "fp16"; None for the plain ones.
      allow_pickle: also read torch's .bin.

    Returns: the folder without parameters.
    Raises: InputError for anything absent, damaged, unsupported or unexpected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: found no such folder; expected a diffusers pipeline on this machine "
            "(`hf download <repository> --local-dir <folder>` fetches one)"
        )
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: found no {INDEX}; expected a diffusers pipeline folder")
    model_index = read_json(folder / INDEX)
    parts = listed_parts(folder / INDEX, model_index)
    check_parts(folder, parts)
    scheduler = read_scheduler(folder, model_index) if "scheduler" in parts else {}
    for name in parts:
        if CARRIED.fullmatch(name) and not _has_files(folder / name):
            raise InputError(f"{folder / name}: found no files; expected those of the {name}")
    networks = {name: value for name, value in parts.items() if not CARRIED.fullmatch(name)}
    variants = {name: component_variant(folder / name, variant) for name in networks}
    if variant is not None and not any(variants.values()):
        raise InputError(
            f"{folder}: found no variant {variant} of {', '.join(networks)}; expected files of it, "
            "or no --variant for the plain ones"
        )
    return PipelineFolder(
        folder,
        model_index,
        scheduler,
        {
            name: _check_component(model_index, folder / name, *value, variants[name], allow_pickle)
            for name, value in networks.items()
        },
    )


def read_scheduler(folder: Path, model_index: Mapping[str, Any]) -> dict[str, Any]:
    """Read scheduler_config.json, with the corrections of the folder's pipeline class."""
    return effective_scheduler_config(model_index, read_json(folder / SCHEDULER))


def check_parts(folder: Path, parts: Iterable[str]) -> None:
    """Refuse path traversal: every file is a regular file inside the pipeline folder.

    Raises: InputError for a link out of the folder, or something that is no regular file.
    """
    check_files_no_escape(folder, folder)
    for name in parts:
        check_no_escape(folder / name, folder)


def listed_parts(path: Path, model_index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Map each part of a pipeline to (library, class).

    Args:
      path: model_index.json, for messages.
      model_index: its contents.

    Raises: InputError for a network class that gadjax does not support.
    """
    parts = {}
    for name, value in model_index.items():
        # Other entries are arguments of the pipeline; [null, null] is an omitted part.
        if not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise InputError(f"{path}: found {name}: {value}; expected [library, class]")
        if not is_safe_filename(name):
            raise InputError(f"{path}: found a part named {name!r}; expected a folder's name")
        if not CARRIED.fullmatch(name) and (value[1] not in COMPONENTS or value[0] not in STEMS):
            nearest = difflib.get_close_matches(value[1], COMPONENTS, 1, cutoff=0)[0]
            raise InputError(
                f"{path}: found {name} of class {'.'.join(value)}; expected a supported class "
                f"({nearest} is the nearest of {', '.join(COMPONENTS)})"
            )
        parts[name] = tuple(value)
    if all(CARRIED.fullmatch(name) for name in parts):
        raise InputError(f"{path}: found no networks; expected a diffusers pipeline")
    return parts


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check_component(
    index: Mapping[str, Any],
    folder: Path,
    library: str,
    class_name: str,
    variant: str | None,
    allow_pickle: bool,
) -> Component:
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else class_name
    declared = config.get("_class_name", first)
    if not isinstance(declared, str) or COMPONENTS.get(declared) != COMPONENTS[class_name]:
        raise InputError(
            f"{folder / 'config.json'}: found class {declared}; expected {class_name}, as in "
            f"{INDEX}"
        )
    effective = effective_network_config(index, folder.name, config)
    family, spec, abstract = read_network(folder / "config.json", class_name, effective)
    weights = open_weights(folder, variant, library=library, allow_pickle=allow_pickle)
    where = f"{weights.files[0]} ({class_name})"
    tensor_map = check_keys(weights.shapes, abstract, family.keymap_of(spec), where)
    check_dtypes(weights.dtypes, tensor_map, where)
    return Component(folder.name, library, family, config, spec, abstract, weights, tensor_map)


def read_pipeline(
    folder: Path,
    *,
    dtype=None,
    variant: str | None = None,
    allow_pickle: bool = False,
    components: Collection[str] | None = None,
) -> PipelineFolder:
    """Validate a pipeline folder, then read the parameters of its networks.

    Args:
      folder: a diffusers pipeline folder.
      dtype: dtype of the parameters; None keeps each file's.
      variant, allow_pickle: see `check_pipeline`.
      components: names of the networks to read; None for all.

    Returns: the folder with the parameters of these networks.
    Raises: InputError as `check_pipeline`, before any data is read; then for non-finite values, in
      the file or in `dtype`.
    """
    pipeline = check_pipeline(folder, variant=variant, allow_pickle=allow_pickle)
    selected = pipeline.components if components is None else components
    if absent := sorted(set(selected) - set(pipeline.components)):
        raise InputError(f"{folder}: found no {', '.join(absent)}; expected a network of that name")
    return dataclasses.replace(
        pipeline,
        components={
            name: dataclasses.replace(part, params=_read(part, dtype)) if name in selected else part
            for name, part in pipeline.components.items()
        },
    )


def _read(part: Component, dtype) -> Params:
    entries = part.weights.entries
    for key, other in part.keymap.tied_keys:
        if key in entries and other in entries:
            if not np.array_equal(entries[key].read(), entries[other].read()):
                raise InputError(
                    f"{entries[key].path}: found {key} and {other} with different values; expected "
                    "the same, as these are two names of one tensor"
                )
    stream = part.weights.stream(part.tensor_map)
    where = str(part.weights.files[0])
    return place_tensors(stream, part.tensor_map, part.abstract, dtype, where)
