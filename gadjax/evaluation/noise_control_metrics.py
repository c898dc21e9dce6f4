"""Metrics of the noise-control tasks, and the reasons for those that are absent."""

from collections.abc import Callable
from functools import partial

import numpy as np

from gadjax.evaluation.draw import map_pictures
from gadjax.evaluation.interpolation import largest_jump, path_steps
from gadjax.evaluation.layout_control import SNAPSHOT_STEPS
from gadjax.evaluation.metric_catalogue import catalogue
from gadjax.evaluation.noise_control import ControlResults, NoiseControl
from gadjax.evaluation.oracles import World
from gadjax.evaluation.retrieval import retrieval
from gadjax.evaluation.statistics import Estimate, mean, ratio
from gadjax.io.image_grid import from_uint8


def control_metrics(control: ControlResults, key: str) -> dict[str, Estimate]:
    """Noise-control metrics of one row; the teacher is not compared with itself."""
    row, teacher = control.rows[key], control.rows["teacher"]
    world = control.library.world
    metrics = _retrieval(row, teacher, world)
    if row.layout_result:
        hits = row.layout_result.reached_RN.astype(float)
        metrics["control"] = mean(hits[-1])
        metrics |= {
            f"control_{n}": mean(h) for n, h in zip(SNAPSHOT_STEPS[:-1], hits[:-1], strict=True)
        }
        metrics["control_angle"] = mean(row.layout_result.angles_N)
    if row is not teacher:
        named_MKA = teacher.path_words_MKA != ""
        named_MKA &= _open_along(control)[:, None]
        same_MKA = named_MKA & (row.path_words_MKA == teacher.path_words_MKA)
        if named_MKA.any():
            metrics["path_agreement"] = ratio(same_MKA.sum((1, 2)), named_MKA.sum((1, 2)))
    for kind, embed in _path_spaces(world).items():
        steps, teacher_steps = (path_steps(embed(x.paths_MKHWC)) for x in (row, teacher))
        metrics[f"path_length_{kind}"] = mean(steps.sum(1))
        if row is not teacher and teacher_steps.any():
            metrics[f"path_length_{kind}_ratio"] = ratio(steps.sum(1), teacher_steps.sum(1))
        metrics[f"path_jump_{kind}"] = mean(largest_jump(steps))
    return metrics


def absent_control(control: ControlResults | None, taken: set[str], world: World) -> dict[str, str]:
    """Reason for every noise-control metric that is not among `taken`, by name."""
    absent = {}
    for name, metric in catalogue(world).items():
        if metric.group not in ("retrieval", "control", "path") or name in taken:
            continue
        if world.oracle is None:
            absent[name] = "no oracle"
        elif not world.captions:
            absent[name] = "the world has no captions for it"
        elif control is None:
            absent[name] = "no library asked for"
        elif metric.group == "control":
            absent[name] = "no moves asked for" if world.layout else "the world has no places"
        elif world.extractor is None and "features" in name:
            absent[name] = "no feature extractor"
        else:
            absent[name] = "the teacher draws nothing to compare with"
    return absent


def _retrieval(row: NoiseControl, teacher: NoiseControl, world: World) -> dict[str, Estimate]:
    open_CA = world.oracle.left_open(world.captions)
    columns = np.flatnonzero(open_CA.any(0)).tolist()
    groups = {"retrieval": columns}
    groups |= {f"retrieval_{world.oracle.attributes[a]}": [a] for a in columns}
    metrics = {}
    for name, attributes in groups.items():
        taken = retrieval(row.words_CLA, teacher.words_CLA, open_CA, attributes)
        if taken:
            metrics |= {f"{name}_chance": taken[1]} if row is teacher else {}
            metrics |= {} if row is teacher else {name: taken[0], f"{name}_chance": taken[1]}
    return metrics


def _open_along(control: ControlResults) -> np.ndarray:
    """Attributes that the caption of each path leaves open: bool [M, A]."""
    open_CA = control.library.world.oracle.left_open(control.library.captions)
    return open_CA[[c for c, _, _ in control.library.paths]]


def _path_spaces(world: World) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Distance spaces by name: functions from path pictures [M, K, H, W, 3] to values [M, K, D]."""

    spaces = {"features": partial(map_pictures, world.extractor)} if world.extractor else {}
    return spaces | {"pixels": lambda images: from_uint8(images).reshape(*images.shape[:2], -1)}
