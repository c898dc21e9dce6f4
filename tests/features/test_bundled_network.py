"""Bundled features: they separate the world's pictures, and corrupted pictures from clean ones."""

import json

import jax
import numpy as np
import pytest

from gadjax.assets import resolve
from gadjax.errors import InputError
from gadjax.evaluation.frechet import frechet
from gadjax.evaluation.oracles import WORLDS, shapes_features
from gadjax.experiments.shapes_features import blur, standardise
from gadjax.features.open import open_extractor
from gadjax.features.shapes import Config, load_features, network, save_features
from gadjax.io.image_grid import from_uint8, to_uint8
from gadjax.worlds import shapes

SMALL = Config(size=8, widths=(4, 6), hidden=5, features=3)


@pytest.fixture(scope="module")
def pictures():
    return shapes.sample_batch(1, range(512))[0], shapes.sample_batch(2, range(512))


def test_they_are_standardised(pictures):
    features = shapes_features(pictures[0])
    assert features.shape == (512, 32) and features.dtype == np.float32
    np.testing.assert_allclose(features.mean(0), 0, atol=0.2)
    np.testing.assert_allclose(features.std(0), 1, atol=0.2)


def test_attributes_are_linear_in_the_features(pictures):
    """Least squares on 512 pictures predicts shape and position of 512 others."""
    images, (others, _, scenes) = pictures
    first = shapes.sample_batch(1, range(512))[2]

    def labels(scenes):
        one_hot = [[float(s.shape == name) for name in shapes.SHAPES] for s in scenes]
        return np.hstack([one_hot, [[s.x, s.y] for s in scenes]])

    def rows(images):
        return np.hstack([shapes_features(images), np.ones((len(images), 1))])

    predicted = rows(others) @ np.linalg.lstsq(rows(images), labels(first), rcond=None)[0]
    right = np.argmax(predicted[:, :4], 1) == [shapes.SHAPES.index(s.shape) for s in scenes]
    assert right.mean() > 0.8
    assert np.abs(predicted - labels(scenes))[:, 4:].mean() < 1.0


def test_the_distance_grows_with_blur_ghosts_and_missing_shapes(pictures):
    images, (others, _, scenes) = pictures
    reference = shapes_features(images)
    floor = frechet(reference, shapes_features(others))
    corrupted = {
        "blur": np.asarray(blur(others)),
        "ghost": 0.7 * others + 0.3 * np.roll(others, 1, axis=0),
        "no circles": others[[s.shape != "circle" for s in scenes]],
    }
    for name, worse in corrupted.items():
        assert frechet(reference, shapes_features(worse)) > 1.3 * floor, name


def test_saved_and_read_again(tmp_path):
    params = network(SMALL).init(jax.random.key(0))
    save_features(tmp_path / "net", SMALL, params)
    images = np.random.default_rng(0).uniform(-1, 1, (300, 8, 8, 3)).astype(np.float32)
    found = load_features(tmp_path / "net")(images)
    expected = np.asarray(network(SMALL).apply(params, images))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_extractor_like_others():
    """Of uint8 pictures, also of another size; the same features as by the network itself."""
    folder = resolve("asset:shapes_features")
    extractor = open_extractor("bundled", folder)
    images = to_uint8(shapes.sample_batch(4, range(3))[0])
    expected = shapes_features(from_uint8(images))
    np.testing.assert_allclose(extractor(images), expected, atol=1e-5)
    larger = images.repeat(2, 1).repeat(2, 2)
    assert np.abs(extractor(larger) - expected).max() < 1
    assert str(extractor).startswith("shapes features; bundled; to 32 x 32, bicubic")
    assert extractor.fingerprint == open_extractor("again", folder).fingerprint
    for options in ({"vector": "raw"}, {"recipe": "dgm"}):
        with pytest.raises(InputError, match="found .*(raw|dgm)"):
            open_extractor("bundled", folder, **options)


def test_standardise():
    net, images = network(SMALL), np.random.default_rng(0).uniform(-1, 1, (64, 8, 8, 3))
    params = net.init(jax.random.key(0))
    after = net.apply(standardise(params, np.asarray(net.apply(params, images))), images)
    np.testing.assert_allclose(after.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(after.std(0), 1, atol=1e-4)


def test_bad_folders_and_pictures(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        load_features(tmp_path)
    save_features(tmp_path, SMALL, network(SMALL).init(jax.random.key(0)))
    with pytest.raises(InputError, match=r"found shape \(2, 9, 9, 3\); expected \(N, 8, 8, 3\)"):
        load_features(tmp_path)(np.zeros((2, 9, 9, 3), np.float32))
    wider = {**json.loads((tmp_path / "config.json").read_text()), "hidden": 7}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    with pytest.raises(InputError, match="linear_1"):
        load_features(tmp_path)
    for changes in ({"size": 10**9}, {"size": 6}, {"hidden": "7"}, {"widths": [True]}):
        (tmp_path / "config.json").write_text(json.dumps(wider | changes))
        with pytest.raises(InputError, match=r"config.json: found .*expected Config"):
            open_extractor("bundled", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="widths"):
        load_features(tmp_path)


def test_the_shipped_files_are_small():
    folder = resolve("asset:shapes_features")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000


def test_worlds():
    images, captions, _ = shapes.sample_batch(3, range(4))
    world = WORLDS["shapes"]
    words = world.oracle.classify(images)
    assert world.oracle.adheres(words, captions).all()
    assert not world.oracle.adheres(words, ["a purple cross at the bottom right"] * 4).any()
    assert not world.oracle.adheres(world.oracle.classify(0 * images), ["a shape"] * 4).any()
    assert world.oracle.left_open(["a small red shape"]).tolist() == [
        [name in ("shape", "position", "background") for name in world.oracle.attributes]
    ]
    assert world.extractor(images).shape == (4, 32)
    assert WORLDS["none"].oracle is None and WORLDS["none"].extractor is None
