"""Starts of student and critic at a LoRA of the teacher: merged, or as their own adapters."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from gadjax import assets
from gadjax.errors import InputError
from gadjax.formats.lora_file import Factors, add_factors, read_lora
from gadjax.formats.lora_names import Layer, layers_of
from gadjax.formats.state_dict import kernel_from_torch
from gadjax.models.adapters import Adapter, Lora, abstract_adapters, init_adapters
from gadjax.models.params import flatten, unflatten
from gadjax.pipelines.known_students import published_loras
from gadjax.pipelines.pipeline import Pipeline
from gadjax.seeds import make_key
from gadjax.training.lora import loras
from gadjax.types import Params


def read_factors(
    path: Path, pipeline: Pipeline, key: str, *, values: bool = True
) -> dict[str, Factors]:
    """Adapters of the backbone in a LoRA's file, at the strength at which it is published.

    Args:
      path: the file or folder.
      pipeline: the teacher's pipeline.
      key: of the config, for messages.
      values: as `read_lora` takes it.

    Raises: InputError as `read_lora`, and for adapters of a text encoder.
    """
    lora = read_lora(path, pipeline.folder, values=values)
    if others := lora.factors.keys() - {pipeline.backbone}:
        raise InputError(
            f"{key}: found adapters of the {min(others)} in {path}; expected ones of the "
            f"{pipeline.backbone} alone"
        )
    ((_, strength),), _ = published_loras([(path, 1.0)])
    factors = lora.factors[pipeline.backbone]
    return {name: f._replace(scale=strength * f.scale) for name, f in factors.items()}


def read_merged(path: Path, pipeline: Pipeline, key: str) -> Params:
    """The teacher's parameters with a LoRA merged, in float32. Arguments as `read_factors`."""
    part = pipeline.folder.components[pipeline.backbone]
    return add_factors(part.params, layers_of(part), read_factors(path, pipeline, key), 1.0)


def read_adapters(config: ConfigDict, role: str, pipeline: Pipeline, abstract: bool) -> Params:
    """Initial adapters of a role that starts at a LoRA of the teacher.

    Kernels and ranks beyond the file's have the usual start, which changes nothing.

    Args:
      config: training config.
      role: "student" or "critic".
      pipeline: the teacher's pipeline.
      abstract: read the file's header alone; adapters are shapes.

    Raises: InputError as `read_factors`, and for an adapter of a kernel that the role does not
      adapt, or of a higher rank.
    """
    lora, key = loras(config)[role], f"{role}.init"
    part = pipeline.folder.components[pipeline.backbone]
    shapes = abstract_adapters(part.abstract, lora)
    path, layers = assets.resolve(config[role].init), layers_of(part)
    read = read_factors(path, pipeline, key, values=not abstract)
    _check_adapted(read, layers, flatten(shapes), config, role)
    if abstract:
        return shapes
    number = ("student", "critic").index(role)
    random = init_adapters(jax.random.fold_in(make_key(config.seed), number), shapes)
    flat = flatten(jax.tree.map(np.array, random))
    for module, factors in read.items():
        _fill(flat[layers[module].path], layers[module], factors, lora)
    return unflatten(flat)


def _check_adapted(
    factors: Mapping[str, Factors],
    layers: Mapping[str, Layer],
    adapters: Mapping[str, Adapter],
    config: ConfigDict,
    role: str,
) -> None:
    """Check that a role adapts every module of a file, at its rank or a higher one.

    Args:
      factors: of the file, by module.
      layers: modules of the network.
      adapters: the role's, by path.
      config: training config.
      role: "student" or "critic".

    Raises: InputError otherwise.
    """
    trained = loras(config)[role].rank
    for module, (a, _, _) in factors.items():
        is_trained = layers[module].path in adapters
        if not is_trained or len(a) > trained:
            what = f"of rank {len(a)}" if is_trained else "that the run does not train"
            raise InputError(
                f"{role}.init: found an adapter of {module} {what} in {config[role].init}; "
                f"expected {role}.lora.rank of at least that of the file, now {trained}, and "
                f"{role}.lora.targets that match its modules"
            )


def _fill(adapter: Adapter, layer: Layer, factors: Factors, lora: Lora) -> None:
    """Write factors of a file into the first columns of an adapter, in place."""
    a, b, scale = factors
    _, index, shape = layer
    rank, sides = len(a), (1,) * len(shape[2:])
    targets = (x if index is None else x[index] for x in (adapter.a, adapter.b))
    target_a, target_b = targets
    target_a[..., :rank] = kernel_from_torch(a.reshape(rank, *shape[1:]))
    b = kernel_from_torch(b.reshape(shape[0], rank, *sides))
    target_b[..., :rank, :] = np.float32(scale / lora.scale) * b
