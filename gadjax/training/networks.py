"""Frozen networks of a run beside its teacher, and the student's start, by their sources."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from gadjax import assets
from gadjax.checkpoints.restore import PARTS
from gadjax.diffusion.experts import Experts
from gadjax.errors import InputError
from gadjax.formats.lora_header import is_lora
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.state_dict import tensors_from_params
from gadjax.formats.weights import fingerprint
from gadjax.models.depth import keep_layers
from gadjax.models.params import split_frozen
from gadjax.objectives import Sum
from gadjax.pipelines.pipeline import Pipeline, make_pipeline, random_params
from gadjax.training.config import INITS, OF_RUN
from gadjax.training.lora import base_source, loras
from gadjax.training.lora_start import read_adapters, read_merged
from gadjax.training.partial import trained_patterns, untrained_part
from gadjax.training.steps import EARLIER
from gadjax.training.workdir import Trained, is_workdir, read_trained
from gadjax.types import Params


def read_network(source: str, pipeline: Pipeline, key: str) -> tuple[Params, str]:
    """Parameters of a backbone like the teacher's, and their fingerprint.

    Args:
      source: a diffusers folder, `asset:NAME`, a LoRA of the teacher, or a workdir of `gadjax
        train`: its newest EMA, or with WORKDIR@PART@STEP the part "student" or "critic", of a step
        where one is named.
      pipeline: the teacher's pipeline.
      key: of the config, for messages.

    Raises: InputError for a path that is neither, or a network of another configuration, noise
      schedule or parameterization than the teacher's.
    """
    params, identity, _ = _read(source, pipeline, key)
    return params, identity


def _read(source: str, pipeline: Pipeline, key: str) -> tuple[Params, str, Trained | None]:
    """Parameters and fingerprint of a source, and the trained weights of a workdir."""
    path, part_name, step = _parse_source(source, key)
    if is_lora(path):
        params = read_merged(path, pipeline, key)
        part = pipeline.folder.components[pipeline.backbone]
        return params, fingerprint(tensors_from_params(params, part.keymap)), None
    if not path.is_dir():
        raise InputError(
            f"{key}: found {source!r}; expected a diffusers folder, a LoRA or a workdir of gadjax "
            "train"
        )
    trained = read_trained(path, part_name, step) if is_workdir(path) else None
    if trained and part_name != "critic" and trained.layers:
        raise InputError(
            f"{key}: found {source!r}, a student of {len(trained.layers)} layers; expected a "
            "network of the teacher's"
        )
    folder = open_folder(trained.base if trained else path, components=())
    _check_like_teacher(make_pipeline(folder), pipeline, f"{key}: {source}")
    backbone = folder.backbone
    part = open_folder(folder.path, components=(backbone,)).components[backbone]
    params = trained.full_params(part) if trained else part.params
    return params, fingerprint(tensors_from_params(params, part.keymap)), trained


def read_expert(
    source: str, pipeline: Pipeline, key: str, times: Sequence[float], first: int
) -> tuple[Experts, str]:
    """Frozen network of a student's earlier steps, and its fingerprint.

    Args:
      source, pipeline, key: as for `read_network`; an expert's workdir brings the one before it.
      times: of the student's steps.
      first: number of its first own step.

    Returns: experts without the late one, with all fingerprints.
    Raises: InputError as `read_network`; for a workdir of a student of other times, or whose own
      steps are not before `first`.
    """
    params, identity, trained = _read(source, pipeline, key)
    if trained and trained.trained_steps:
        theirs, steps = trained.sampling.timesteps or (), trained.trained_steps
        if tuple(theirs[:first]) != tuple(times[:first]) or steps[0] >= first:
            raise InputError(
                f"{key}: found {source!r}, an expert of steps {steps} of timesteps {theirs}; "
                f"expected one of the steps before {first} of {tuple(times)}"
            )
    early, before = with_earlier_expert(trained, params, pipeline)
    boundary = (times[first - 1] + times[first]) / 2
    return Experts(early, None, boundary), f"{before} {identity}".strip()


def with_earlier_expert(
    trained: Trained | None, params: Params, pipeline: Pipeline
) -> tuple[Params | Experts, str]:
    """Parameters of a run's student beside its earlier expert, if it has one, and the fingerprint
    of that, else "".

    Args:
      trained: the run; None for none.
      params: of its student.
      pipeline: the teacher's pipeline.

    Raises: InputError as `read_expert`.
    """
    if trained is None or not trained.earlier_expert:
        return params, ""
    key, first = f"{trained.workdir}: student.earlier_expert", trained.trained_steps[0]
    times = trained.sampling.timesteps
    experts, identity = read_expert(trained.earlier_expert, pipeline, key, times, first)
    return replace(experts, late=params), identity


def _parse_source(source: str, key: str) -> tuple[Path, str, int | None]:
    """Path, part and step of a source. Raises: InputError for a part or step that none can have."""
    path = assets.resolve(source)
    if path.is_dir() or "@" not in source:
        return path, "ema", None
    name, part, *step = source.rsplit("@", 2 if source.count("@") > 1 else 1)
    if part not in PARTS or step and not re.fullmatch(r"[0-9]{1,12}", step[0]):
        raise InputError(
            f"{key}: found {source!r}; expected WORKDIR@PART or WORKDIR@PART@STEP, PART being one "
            f"of {', '.join(PARTS)}"
        )
    return assets.resolve(name), part, int(step[0]) if step else None


def _check_like_teacher(other: Pipeline, teacher: Pipeline, where: str) -> None:
    """Check that a network takes the place of the teacher's. Raises: InputError."""
    parts = [p.folder.components[p.folder.backbone] for p in (other, teacher)]
    kind, teachers = (part.family.class_names[0] for part in parts)
    if parts[0].spec != parts[1].spec or kind != teachers:
        config = " of another configuration" if kind == teachers else ""
        raise InputError(f"{where}: found a {kind}{config}; expected a {teachers} as the teacher's")
    a, b = other.denoiser, teacher.denoiser
    if (a.schedule, a.parameterization) != (b.schedule, b.parameterization):
        raise InputError(
            f"{where}: found {a.schedule} and {a.parameterization!r}; expected {b.schedule} and "
            f"{b.parameterization!r}, as the teacher has"
        )


class Networks(NamedTuple):
    """Backbones of a run beside its teacher.

    Attributes:
      initial: initial parameters by role: those that it trains, or adapters that start at a
        LoRA's; the critic's only if they are not the student's.
      frozen: key in `Run.frozen` -> parameters, of the student's earlier expert among them.
      bases: role -> key in `Run.frozen` of the weights that its adapters are on, or of the rest of
        a network trained in part, if those are not the teacher's.
      sources: name that a term uses -> key in `Run.frozen`.
      fingerprints: key of the config -> fingerprint of the networks that it names by their paths.
    """

    initial: dict[str, Params]
    frozen: dict[str, Params]
    bases: dict[str, str]
    sources: dict[str, str]
    fingerprints: dict[str, str]


def load_networks(
    config: ConfigDict, objective: Sum, pipeline: Pipeline, teacher: Params, abstract: bool
) -> Networks:
    """Read the starts of student and critic and the networks that terms name, each path once.

    Args:
      config: training config.
      objective: its terms.
      pipeline: the teacher's pipeline.
      teacher: the teacher's parameters.
      abstract: read nothing; parameters are shapes.

    Raises: InputError as `read_network` and `read_adapters`.
    """
    read: dict[str, tuple[Params, str]] = {}
    fingerprints, inits = {}, init_paths(config, objective)
    options = [*network_options(objective), *((f"{r}.init", (path,)) for r, path in inits.items())]
    for key, sources in options:
        paths = [source for source in sources if source not in OF_RUN]
        for path in paths if not abstract else ():
            read[path] = read.get(path) or read_network(path, pipeline, key)
            fingerprints[key] = " ".join(read[path][1] for path in paths if path in read)
    network = pipeline.networks[pipeline.backbone]
    starts = {role: teacher if abstract else read[path][0] for role, path in inits.items()}
    layers = tuple(config.student.layers)
    if config.student.init == "random":
        starts["student"] = network.abstract if abstract else random_params(network, config.seed)
        if not layers:
            starts.setdefault("critic", starts["student"])
    start = starts["student"] = keep_layers(starts.get("student", teacher), layers)
    starts.setdefault("critic", teacher)
    is_teacher = config.student.init == "teacher" and not layers
    bases = base_keys(config, inits)
    keys = {
        "teacher": pipeline.backbone,
        "start": pipeline.backbone if is_teacher else "start",
    }
    sources = {name: keys.get(source, source) for name, source in objective.needs.networks.items()}
    of_starts = {"start": start} | {key: starts[role] for role, key in bases.items()}
    frozen = {
        key: of_starts[key] if key in of_starts else teacher if abstract else read[key][0]
        for key in (*sources.values(), *bases.values())
        if key != pipeline.backbone
    }
    patterns = trained_patterns(config)
    for key in set(bases.values()) - set(sources.values()):
        of_roles = [patterns.get(role) for role, base in bases.items() if base == key]
        if all(of_roles):  # adapters are on the whole
            frozen[key] = untrained_part(pipeline, frozen[key], of_roles)
    initial = _initial(config, objective, pipeline, starts)
    for role in loras(config).keys() & inits.keys() - bases.keys():
        initial[role] = read_adapters(config, role, pipeline, abstract)
    if (expert := config.student.earlier_expert) and abstract:
        frozen[EARLIER] = Experts(teacher, None, 0.0)
    elif expert:
        key, times = "student.earlier_expert", config.student.timesteps
        first = config.student.trained_steps[0]
        frozen[EARLIER], fingerprints[key] = read_expert(expert, pipeline, key, times, first)
    return Networks(initial, frozen, bases, sources, fingerprints)


def init_paths(config: ConfigDict, objective: Sum) -> dict[str, str]:
    """Paths from which student and critic start, by role."""
    roles = ("student", "critic") if objective.needs.critic else ("student",)
    return {role: config[role].init for role in roles if config[role].init not in (*INITS, None)}


def base_keys(config: ConfigDict, inits: dict[str, str]) -> dict[str, str]:
    """Role -> key in `Run.frozen` of a base that is not the teacher: once where two are the same.

    Args:
      config: training config.
      inits: of `init_paths`.
    """
    on = {role: path for role, path in inits.items() if base_source(config, role) != "teacher"}
    keys = {path: "start" if role == "student" else f"{role}/start" for role, path in on.items()}
    if "student" in on and not config.student.layers:  # with fewer layers the start is another
        keys[on["student"]] = "start"
    needing = loras(config).keys() | trained_patterns(config).keys()
    return {role: keys[path] for role, path in on.items() if role in needing}


def _initial(
    config: ConfigDict, objective: Sum, pipeline: Pipeline, starts: dict[str, Params]
) -> dict[str, Params]:
    """Initial parameters of the roles without adapters. starts: of student and critic."""
    frozen = pipeline.folder.components[pipeline.backbone].frozen
    roles = {"student", "critic"} if objective.needs.critic else {"student"}
    trained, patterns = roles - loras(config).keys(), trained_patterns(config)
    initial = {
        role: split_frozen(starts[role], frozen, (patterns.get(role, ""),))[0]
        for role in sorted(trained)
    }
    alike = patterns.get("critic") == patterns.get("student")
    if trained == {"student", "critic"} and starts["critic"] is starts["student"] and alike:
        del initial["critic"]
    return initial


def network_options(objective: Sum) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Key of the config and sources of each option of a term that names networks."""
    for name, (_, term) in zip(objective.names, objective.parts, strict=True):
        for option in getattr(term, "sources", ()):
            value = getattr(term, option)
            yield f"objective.{name}.{option}", (value,) if isinstance(value, str) else tuple(value)
