"""Which numbers are taken of the tasks of noise control, and which cannot be."""

from collections.abc import Callable

import numpy as np

from gadjax.evaluation.interpolation import largest_jump, path_steps
from gadjax.evaluation.layout_control import SNAPSHOT_STEPS
from gadjax.evaluation.metric_catalogue import catalogue
from gadjax.evaluation.noise_control import ControlResults, NoiseControl
from gadjax.evaluation.oracles import World
from gadjax.evaluation.retrieval import retrieval
from gadjax.evaluation.statistics import Estimate, mean, ratio


def control_metrics(control: ControlResults, key: str) -> dict[str, Estimate]:
    """Every metric of one row that can be taken; the teacher's are not compared with itself."""
    row, teacher = control.rows[key], control.rows["teacher"]
    world = control.library.world
    found = _retrieval(row, teacher, world)
    if row.moved:
        hits = row.moved.reached_RN.astype(float)
        found["control"] = mean(hits[-1])
        found |= {
            f"control_{n}": mean(h) for n, h in zip(SNAPSHOT_STEPS[:-1], hits[:-1], strict=True)
        }
        found["control_angle"] = mean(row.moved.angles_N)
    if row is not teacher:
        told_MKA = teacher.path_words_MKA != ""
        told_MKA &= _open_along(control)[:, None]
        same_MKA = told_MKA & (row.path_words_MKA == teacher.path_words_MKA)
        if told_MKA.any():
            found["path_agreement"] = ratio(same_MKA.sum((1, 2)), told_MKA.sum((1, 2)))
    for kind, read in _readers(world).items():
        steps, wanted = (path_steps(read(x.paths_MKHWC)) for x in (row, teacher))
        found[f"path_length_{kind}"] = mean(steps.sum(1))
        if row is not teacher and wanted.any():
            found[f"path_length_{kind}_ratio"] = ratio(steps.sum(1), wanted.sum(1))
        found[f"path_jump_{kind}"] = mean(largest_jump(steps))
    return found


def absent_control(control: ControlResults | None, taken: set[str], world: World) -> dict[str, str]:
    """Metric of noise control that is not among the `taken` -> why."""
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
    found = {}
    for name, attributes in groups.items():
        taken = retrieval(row.words_CLA, teacher.words_CLA, open_CA, attributes)
        if taken:
            found |= {f"{name}_chance": taken[1]} if row is teacher else {}
            found |= {} if row is teacher else {name: taken[0], f"{name}_chance": taken[1]}
    return found


def _open_along(control: ControlResults) -> np.ndarray:
    """What the caption of each path leaves open: [M, A]."""
    open_CA = control.library.world.oracle.left_open(control.library.captions)
    return open_CA[[c for c, _, _ in control.library.paths]]


def _readers(world: World) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Pictures of paths [M, K, H, W, 3] -> values [M, K, D]."""

    def features(images_MKHWC):
        flat = images_MKHWC.reshape(-1, *images_MKHWC.shape[2:])
        return world.extractor(flat).reshape(*images_MKHWC.shape[:2], -1)

    readers = {"features": features} if world.extractor else {}
    return readers | {"pixels": lambda images: images.reshape(*images.shape[:2], -1)}
