"""Inception-v3 of FID, block by block against its formula in torch (pytorch-fid's patches of
torchvision's blocks, written here as functions of a state dict)."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from gadjax.errors import InputError
from gadjax.features.inception import RECIPES, is_inception, load_inception
from gadjax.formats.state_dict import expected_shapes, params_from_tensors
from gadjax.models.module import functional
from gadjax.models.vision import inception
from gadjax.models.vision.inception import (
    KEYMAP,
    BlockA,
    BlockB,
    BlockC,
    BlockD,
    BlockE,
    Inception,
    fid_resize,
)


def unit(tensors, name, x, stride=1, padding=0):
    """Convolution, batch norm with stored statistics, ReLU."""
    x = F.conv2d(x, tensors[f"{name}.conv.weight"], stride=stride, padding=padding)
    bn = [tensors[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight")]
    return F.relu(F.batch_norm(x, *bn, tensors[f"{name}.bn.bias"], eps=1e-3))


def chain(tensors, x, *steps):
    for name, *options in steps:
        x = unit(tensors, name, x, *options)
    return x


def pool(tensors, x):
    x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return unit(tensors, "branch_pool", x)


def block_a(t, x):
    return [
        unit(t, "branch1x1", x),
        chain(t, x, ("branch5x5_1",), ("branch5x5_2", 1, 2)),
        chain(t, x, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1)),
        pool(t, x),
    ]


def block_b(t, x):
    return [
        unit(t, "branch3x3", x, 2),
        chain(t, x, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 2)),
        F.max_pool2d(x, 3, stride=2),
    ]


def block_c(t, x):
    row, column = (1, (0, 3)), (1, (3, 0))
    double = [("branch7x7dbl_1",), ("branch7x7dbl_2", *column), ("branch7x7dbl_3", *row)]
    double += [("branch7x7dbl_4", *column), ("branch7x7dbl_5", *row)]
    return [
        unit(t, "branch1x1", x),
        chain(t, x, ("branch7x7_1",), ("branch7x7_2", *row), ("branch7x7_3", *column)),
        chain(t, x, *double),
        pool(t, x),
    ]


def block_d(t, x):
    factors = [("branch7x7x3_1",), ("branch7x7x3_2", 1, (0, 3)), ("branch7x7x3_3", 1, (3, 0))]
    return [
        chain(t, x, ("branch3x3_1",), ("branch3x3_2", 2)),
        chain(t, x, *factors, ("branch7x7x3_4", 2)),
        F.max_pool2d(x, 3, stride=2),
    ]


def block_e(t, x, maximum):
    once = unit(t, "branch3x3_1", x)
    twice = chain(t, x, ("branch3x3dbl_1",), ("branch3x3dbl_2", 1, 1))
    parts = [unit(t, "branch1x1", x)]
    for name, h in (("branch3x3_2", once), ("branch3x3dbl_3", twice)):
        parts += [unit(t, f"{name}a", h, 1, (0, 1)), unit(t, f"{name}b", h, 1, (1, 0))]
    if maximum:
        return [*parts, unit(t, "branch_pool", F.max_pool2d(x, 3, stride=1, padding=1))]
    return [*parts, pool(t, x)]


BLOCKS = {
    "A": (lambda rngs: BlockA(16, 32, rngs), block_a, 16),
    "B": (lambda rngs: BlockB(24, rngs), block_b, 24),
    "C": (lambda rngs: BlockC(24, 20, rngs), block_c, 24),
    "D": (lambda rngs: BlockD(24, rngs), block_d, 24),
    "E, mean": (lambda rngs: BlockE(24, False, rngs), lambda t, x: block_e(t, x, False), 24),
    "E, maximum": (lambda rngs: BlockE(24, True, rngs), lambda t, x: block_e(t, x, True), 24),
}


def random_tensors(abstract, seed=0):
    """Every tensor random, variances positive; convolutions keep the size of what they read."""
    rng, tensors = np.random.default_rng(seed), {}
    for key, (_, _, shape) in expected_shapes(abstract, KEYMAP).items():
        value = rng.standard_normal(shape)
        if key.endswith("conv.weight"):
            value *= 1.4 / np.prod(shape[1:]) ** 0.5
        elif key.endswith("running_var"):
            value = np.exp(0.5 * value)
        elif key.endswith("bn.weight"):
            value = 1 + 0.3 * value
        tensors[key] = value.astype(np.float32)
    return tensors


def as_torch(tensors):
    return {key: torch.from_numpy(value) for key, value in tensors.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    make, reference, channels = BLOCKS[name]
    block = functional(make)
    tensors = random_tensors(block.abstract)
    params = params_from_tensors(tensors, block.abstract, KEYMAP)
    x = np.random.default_rng(1).standard_normal((2, 9, 12, channels)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        out = np.asarray(jax.jit(block.apply)(params, x))
    parts = reference(as_torch(tensors), torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    expected = torch.cat(parts, 1).numpy().transpose(0, 2, 3, 1)
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


def test_resizing_is_that_of_pytorch_fid():
    """In float64: torch's coordinates of float32 are off by 3e-5 of the range."""
    for size in ((512, 384), (64, 301)):
        x = np.random.default_rng(0).random((1, *size, 3)).astype(np.float32)
        pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).double()
        expected = F.interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False)
        resized = np.asarray(fid_resize(x))
        np.testing.assert_allclose(resized, expected.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_the_network_has_the_tensors_of_fid():
    """As many parameters as TensorFlow's network without the classifier."""
    shapes = expected_shapes(functional(Inception).abstract, KEYMAP)
    count = sum(int(np.prod(shape)) for _, _, shape in shapes.values())
    statistics = sum(shape[0] for key, (_, _, shape) in shapes.items() if "running" in key)
    assert count - statistics == 21_785_568
    assert len(shapes) == 94 * 5
    assert shapes["Mixed_6b.branch7x7dbl_3.conv.weight"][2] == (128, 128, 1, 7)


def reference_network(t, x):
    """Features [B, 2048] of pictures [B, 3, H, W] in [-1, 1]."""

    def within(name):
        return {k.removeprefix(f"{name}."): v for k, v in t.items() if k.startswith(f"{name}.")}

    x = chain(t, x, ("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3",), ("Conv2d_2b_3x3", 1, 1))
    x = chain(t, F.max_pool2d(x, 3, stride=2), ("Conv2d_3b_1x1",), ("Conv2d_4a_3x3",))
    x = F.max_pool2d(x, 3, stride=2)
    kinds = {"5b": block_a, "5c": block_a, "5d": block_a, "6a": block_b, "7a": block_d}
    kinds |= dict.fromkeys(("6b", "6c", "6d", "6e"), block_c)
    kinds |= {"7b": lambda t, x: block_e(t, x, False), "7c": lambda t, x: block_e(t, x, True)}
    for name in sorted(kinds):
        x = torch.cat(kinds[name](within(f"Mixed_{name}"), x), 1)
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in pytorch-fid's layout, with the classifier and the counters, all random."""
    tensors = random_tensors(functional(Inception).abstract)
    more = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    more["Conv2d_1a_3x3.bn.num_batches_tracked"] = np.zeros((), np.int64)
    path = tmp_path_factory.mktemp("inception") / "fid_inception.safetensors"
    save_file(tensors | more, path)
    return path, tensors


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_features_of_the_network(weights, recipe):
    path, tensors = weights
    extractor = load_inception("fid", path, recipe=recipe)
    image = np.random.default_rng(0).integers(0, 256, (1, 200, 240, 3), dtype=np.uint8)
    object.__setattr__(extractor, "batch", 1)
    features = extractor(image)
    assert features.shape == (1, 2048)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).double()
    if recipe == "pytorch-fid":
        pixels = F.interpolate(pixels / 255, size=(299, 299), mode="bilinear") * 2 - 1
    else:
        pixels = F.interpolate(pixels, size=(299, 299), mode="bicubic", antialias=True)
        pixels = (pixels - 128) / 128
    expected = reference_network(as_torch(tensors), pixels.float()).numpy()
    assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max()
    assert str(extractor).startswith(f"inception pool3; {recipe}")


def test_other_files_are_refused(weights, tmp_path):
    path, _ = weights
    assert is_inception(path) and not is_inception(tmp_path)
    with pytest.raises(InputError, match=r"found a pickle.*weights_only=True"):
        load_inception("fid", tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(InputError, match="recipe: found 'tf'; expected one of pytorch-fid"):
        load_inception("fid", path, recipe="tf")
    with pytest.raises(InputError, match="vector: found 'pool2'"):
        load_inception("fid", path, vector="pool2")
    save_file({"fc.weight": np.zeros((3, 3), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"470 missing: Conv2d_1a_3x3.bn.bias"):
        load_inception("fid", tmp_path / "x.safetensors")
    assert inception.FEATURES == 2048
