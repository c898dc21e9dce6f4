import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gadjax.errors import InputError
from gadjax.formats.state_dict import (
    BLOCK,
    all_finite,
    check_dtypes,
    check_keys,
    expected_shapes,
    fill,
    params_from_tensors,
    place_tensors,
    tensors_from_params,
)
from gadjax.models.keymap import KeyMap
from gadjax.models.params import flatten

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
KEYMAP = KeyMap(
    renames=((r"^blocks/", "layers/#/"),),
    ignored=(r"^position_ids$",),
    aliases=((r"^old_conv\.", "conv."),),
)
ABSTRACT = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    {
        "conv": {"kernel": (3, 2, 5, 7), "bias": (7,)},
        "norm": {"scale": (4,)},
        "step": {"shift": ()},
        "table": {"embedding": (6, 4)},
        "blocks": {"fc": {"kernel": (2, 3, 4), "bias": (2, 4)}, "gain": {"shift": (2,)}},
    },
    is_leaf=lambda leaf: isinstance(leaf, tuple),
)
SHAPES = {
    "conv.weight": (7, 5, 3, 2),
    "conv.bias": (7,),
    "norm.weight": (4,),
    "step.shift": (),
    "table.weight": (6, 4),
    "layers.0.fc.weight": (4, 3),
    "layers.0.fc.bias": (4,),
    "layers.0.gain.shift": (),
    "layers.1.fc.weight": (4, 3),
    "layers.1.fc.bias": (4,),
    "layers.1.gain.shift": (),
}


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {key: np.array(rng.standard_normal(shape), dtype) for key, shape in SHAPES.items()}


def refused(shapes):
    with pytest.raises(InputError) as caught:
        check_keys(shapes, ABSTRACT, KEYMAP, "the file")
    message = str(caught.value)
    assert message.startswith("the file: found") and "\n" not in message
    return message


def test_expected_shapes():
    assert {
        key: shape for key, (_, _, shape) in expected_shapes(ABSTRACT, KEYMAP).items()
    } == SHAPES


def test_layouts():
    given = tensors()
    params = flatten(params_from_tensors(given, ABSTRACT, KEYMAP))
    assert {path: leaf.shape for path, leaf in params.items()} == {
        path: leaf.shape for path, leaf in flatten(ABSTRACT).items()
    }
    conv, fc = given["conv.weight"], given["layers.1.fc.weight"]
    assert params["conv/kernel"][2, 1, 3, 4] == conv[4, 3, 2, 1]
    assert params["blocks/fc/kernel"][1, 2, 3] == fc[3, 2]
    assert params["table/embedding"][5, 3] == given["table.weight"][5, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", [False, True])
def test_round_trip_is_bit_exact(dtype, views):
    given = tensors(dtype)
    params = params_from_tensors(given, ABSTRACT, KEYMAP)
    back = dict(tensors_from_params(params, KEYMAP, views=views))
    assert set(back) == set(given)
    for key, value in back.items():
        assert value.dtype == dtype and value.shape == given[key].shape
        assert value.tobytes() == given[key].tobytes()
        assert views or value.flags.c_contiguous


def test_views_share_memory():
    params = params_from_tensors(tensors(), ABSTRACT, KEYMAP)
    views = dict(tensors_from_params(params, KEYMAP, views=True))
    assert np.shares_memory(views["conv.weight"], params["conv"]["kernel"])
    assert np.shares_memory(views["layers.1.fc.weight"], params["blocks"]["fc"]["kernel"])


def test_ignored_and_older_names():
    shapes = {key.replace("conv.", "old_conv."): shape for key, shape in SHAPES.items()}
    tensor_map = check_keys(shapes | {"position_ids": (1, 77)}, ABSTRACT, KEYMAP, "the file")
    assert set(tensor_map) == set(shapes)
    assert tensor_map["old_conv.weight"] == ("conv/kernel", None)
    assert tensor_map["layers.1.fc.bias"] == ("blocks/fc/bias", 1)


def test_missing_unexpected_misshapen():
    shapes = {key: shape for key, shape in SHAPES.items() if key != "norm.weight"}
    shapes |= {"extra.weight": (3,), "layers.0.fc.weight": (3, 4)}
    message = refused(shapes)
    assert "found 11 tensors; expected 11" in message
    assert "1 missing: norm.weight" in message and "1 unexpected: extra.weight" in message
    assert "layers.0.fc.weight (found (3, 4), expected (4, 3))" in message


def test_one_tensor_under_two_names():
    message = refused(SHAPES | {"old_conv.bias": (7,)})
    assert "1 under two names: conv.bias and old_conv.bias" in message


def test_long_lists_are_cut():
    message = refused(SHAPES | {f"extra.{i:02d}": (1,) for i in range(30)})
    assert "30 unexpected" in message and "extra.09, ..." in message and "extra.10" not in message


def test_dtypes():
    given = tensors()
    tensor_map = check_keys(SHAPES, ABSTRACT, KEYMAP, "the file")
    dtypes = {key: value.dtype for key, value in given.items()}
    check_dtypes(dtypes | {"conv.bias": np.dtype(ml_dtypes.bfloat16)}, tensor_map, "the file")
    with pytest.raises(InputError, match=r"the file: found conv.bias \(int8\); expected floating"):
        check_dtypes(dtypes | {"conv.bias": np.dtype(np.int8)}, tensor_map, "the file")
    with pytest.raises(InputError, match=r"found layers.1.fc.bias \(float16, while layers.0.fc.b"):
        check_dtypes(dtypes | {"layers.1.fc.bias": np.dtype(np.float16)}, tensor_map, "the file")


def test_place_tensors_needs_every_tensor():
    given = tensors()
    tensor_map = check_keys(SHAPES, ABSTRACT, KEYMAP, "the file")
    short = [(key, value) for key, value in given.items() if key != "layers.1.fc.bias"]
    with pytest.raises(ValueError, match="without layers.1.fc.bias"):
        place_tensors(short, tensor_map, ABSTRACT)


def test_cast_that_overflows():
    given = tensors()
    tensor_map = check_keys(SHAPES, ABSTRACT, KEYMAP, "the file")
    params = place_tensors(given.items(), tensor_map, ABSTRACT, np.float16, "the file")
    np.testing.assert_array_equal(params["norm"]["scale"], given["norm.weight"].astype(np.float16))
    given["layers.1.fc.weight"][3, 1] = 7e4
    with pytest.raises(InputError, match="the file: found values of layers.1.fc.weight .* float16"):
        place_tensors(given.items(), tensor_map, ABSTRACT, np.float16, "the file")


@pytest.mark.parametrize("shape", [(3, 2), (65, 64), (64, 129), (200, 1), (0, 5)])
def test_fill(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    for value in (x, np.asfortranarray(x), x[::-1]):
        target = np.full(shape, np.nan, np.float32)
        fill(target, value)
        np.testing.assert_array_equal(target, value.astype(np.float32))


@pytest.mark.parametrize("dtype", (*DTYPES, np.float64))
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_all_finite(dtype, bad):
    largest = ml_dtypes.finfo(dtype).max
    x = np.full(BLOCK + 3, -largest, dtype)
    x[::2] = ml_dtypes.finfo(dtype).smallest_subnormal
    assert all_finite(x) and all_finite(x[:0]) and all_finite(x[:2].reshape(1, 2, 1))
    for index in (0, BLOCK - 1, BLOCK, BLOCK + 2):
        y = x.copy()
        y[index] = bad
        assert not all_finite(y)
    assert not all_finite(np.array(bad, dtype))


def test_integers_are_finite():
    assert all_finite(np.array([-1, 2**31 - 1], np.int32))
