"""Many pictures: noises as they are needed, memory that does not grow, and several devices."""

import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from several import run_on_devices
from tiny_clip import write_clip
from tqdm import tqdm

from gadjax.evaluation.draw import draw_sets
from gadjax.evaluation.learned import Observer
from gadjax.evaluation.noise_sets import evaluation_sets
from gadjax.evaluation.noises import ChainedNoises, SeedNoises
from gadjax.evaluation.oracles import World
from gadjax.evaluation.results import EvaluationConfig
from gadjax.evaluation.sensitivity import map_tangents
from gadjax.features.flags import load_named
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline, resized
from gadjax.pipelines.sampling import initial_noise, noise_rows
from gadjax.seeds import make_key

PROMPTS = ["red circle", "blue square", "green"]
TEACHER = SamplingConfig(2, None, 2.0, 6)
LATENT = (2, 3, 4)


def normal(seed, row):
    """Row of a seed's noise, by its definition."""
    return jax.random.normal(jax.random.fold_in(make_key(seed), row), LATENT)


def test_noise_depends_on_seed_and_row():
    rows = noise_rows([7, 2**40, 7], np.array([5, 0, 1]), LATENT)
    for noise, (seed, row) in zip(rows, ((7, 5), (2**40, 0), (7, 1)), strict=True):
        np.testing.assert_array_equal(noise, normal(seed, row))
        np.testing.assert_array_equal(noise, initial_noise(seed, row + 1, LATENT)[row])


@pytest.mark.parametrize("shared", [False, True])
def test_noises_are_those_of_the_seeds(shared):
    noises = SeedNoises(4, 3, 5, LATENT, shared)
    expected = [initial_noise(4 + s, 5, LATENT)[[0] * 5 if shared else slice(None)] for s in (0, 1)]
    np.testing.assert_array_equal(noises[np.arange(10)], np.concatenate(expected))
    assert len(noises) == len(noises.all()) == 15


def test_chained_noises_are_those_of_their_parts():
    parts = [SeedNoises(0, 2, 3, LATENT), initial_noise(9, 4, LATENT), SeedNoises(3, 1, 2, LATENT)]
    chained = ChainedNoises(parts)
    full = np.concatenate([parts[0].all(), parts[1], parts[2].all()])
    assert len(chained) == 12
    np.testing.assert_array_equal(chained[np.arange(12)], full)
    rows = np.array([11, 5, 6, 6, 0])
    np.testing.assert_array_equal(chained[rows], full[rows])


@pytest.fixture(scope="module")
def teacher(tiny_pipeline):
    return Model("teacher", *load_pipeline(tiny_pipeline), TEACHER)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.mark.slow
def test_memory_does_not_grow_by_pictures(teacher, clip):
    """From batch to batch, in arrays of the host and of JAX, by less than a tenth of the pictures
    and of their noises: features, scores and reduced pictures stay."""
    side, seeds, batch = 64, 16, 8
    model = replace(teacher, pipeline=resized(teacher.pipeline, (side, side)))
    extractors, scorers = load_named([f"clip={clip}"], [f"clipscore={clip}"])
    config = EvaluationConfig(seeds, 0, batch, 0, 0, strips=0)
    sets = dict(evaluation_sets(PROMPTS, model.pipeline.latent, config))
    sets = {name: sets[name] for name in ("own", "others")}
    observer, held = Observer(World(features=extractors, scores=scorers), sets, seeds), []

    def observe(start, images):
        observer(start, images)
        on_devices = sum(array.nbytes for array in jax.live_arrays())
        held.append((start, tracemalloc.get_traced_memory()[0], on_devices))

    tracemalloc.start()
    try:
        kept = draw_sets(model, sets, batch, tqdm(disable=True), observe, {"own": 8})
    finally:
        tracemalloc.stop()
    # The first batches fill the caches of libraries.
    (first, *before), (last, *after) = held[2], held[-1]
    pictures = (last - first) * side * side * 3
    assert last - first == 2 * seeds * len(PROMPTS) - 3 * batch
    assert sum(after) - sum(before) < pictures / 10
    assert after[1] <= before[1]
    assert list(kept) == ["own"] and kept["own"].shape == (48, 8, 8, 3)
    outputs = observer.outputs()
    assert outputs.features["clip"].shape == outputs.others["clip"].shape == (3, 16, 20)


def measured(teacher: Model, clip: Path, split: list[bool]) -> dict[str, np.ndarray]:
    """Pictures, features, scores and tangents; `split` receives, for each batch of eight, whether
    a device holds one of them."""
    extractors, scorers = load_named([f"clip={clip}"], [f"clipscore={clip}"])
    config = EvaluationConfig(5, 1, 8, 0, 0, strips=0)
    sets = {"own": evaluation_sets(PROMPTS, teacher.pipeline.latent, config)["own"]}
    observer = Observer(World(features=extractors, scores=scorers), sets, config.seeds)

    def observe(start, images):
        observer(start, images)
        batches = [x for x in jax.live_arrays() if x.ndim == 4 and x.shape[0] == 8]
        split.append(any(x.sharding.shard_shape(x.shape)[0] == 1 for x in batches))

    kept = draw_sets(teacher, sets, 8, tqdm(disable=True), observe, {"own": 1})
    outputs = observer.outputs()
    directions = (SeedNoises(seed, 1, 3, teacher.pipeline.latent) for seed in (0, 9))
    return {
        "images": kept["own"],
        "features": outputs.features["clip"],
        "scores": outputs.scores["clipscore"],
        "tangents": map_tangents(teacher, PROMPTS, *directions, batch=8),
    }


def on_devices(pipeline: Path, clip: Path, expected: Path) -> None:
    """Pictures, features and tangents on the devices of this process, which are those of one."""
    assert jax.device_count() == 8
    single, split = np.load(expected), []
    found = measured(Model("teacher", *load_pipeline(pipeline), TEACHER), clip, split)
    assert split == [True, True]
    assert np.abs(found["images"].astype(int) - single["images"]).max() <= 1
    for name in ("features", "scores", "tangents"):
        tolerance = (1e-4 if name == "tangents" else 0.02) * np.abs(single[name]).max()
        np.testing.assert_allclose(found[name], single[name], atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_eight_devices_draw_the_pictures_of_one(teacher, tiny_pipeline, clip, tmp_path):
    """A batch is split over them, in drawing, extraction and tangents; features are of pictures
    that may differ by one of 255 levels."""
    split = []
    found = measured(teacher, clip, split)
    assert len(np.unique(found["images"])) > 20 and split == [False, False]
    np.savez(tmp_path / "one.npz", **found)
    run_on_devices(8, __file__, tiny_pipeline, clip, tmp_path / "one.npz")


if __name__ == "__main__":
    on_devices(*map(Path, sys.argv[1:]))
