"""gadjax's folder format is read wherever a pipeline folder is."""

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import params_of, refused

from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.orbax_folder import (
    as_diffusers_folder,
    open_folder,
    read_gadjax_folder,
    write_gadjax_folder,
)
from gadjax.pipelines.pipeline import load_pipeline


@pytest.fixture(scope="module")
def gadjax_folder(tiny_pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("own")
    write_gadjax_folder(read_pipeline(tiny_pipeline), out, "digits")
    return out


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_load_pipeline_reads_both_formats(gadjax_folder, tiny_pipeline):
    (ours, params), (theirs, expected) = load_pipeline(gadjax_folder), load_pipeline(tiny_pipeline)
    assert_same(params, expected)
    assert ours.latent == theirs.latent and ours.denoiser.schedule == theirs.denoiser.schedule
    texts = ["red square", ""]
    for a, b in zip(ours.tokens(texts, 6), theirs.tokens(texts, 6), strict=True):
        np.testing.assert_array_equal(a, b)


def test_some_networks_in_another_dtype(gadjax_folder, tiny_pipeline):
    options = {"components": ("vae",), "dtype": ml_dtypes.bfloat16}
    ours, theirs = (
        read_gadjax_folder(gadjax_folder, **options),
        read_pipeline(tiny_pipeline, **options),
    )
    assert ours.components["transformer"].params is None
    assert_same(ours.components["vae"].params, theirs.components["vae"].params)


def test_temporary_diffusers_folder(gadjax_folder, tiny_pipeline, tmp_path):
    with as_diffusers_folder(tiny_pipeline, tmp_path / "out") as folder:
        assert folder == tiny_pipeline
    with as_diffusers_folder(gadjax_folder, tmp_path / "out") as folder:
        assert_same(params_of(read_pipeline(folder)), params_of(read_pipeline(tiny_pipeline)))
    assert not any(tmp_path.iterdir())


def test_refusals(gadjax_folder):
    refused(lambda: open_folder(gadjax_folder, variant="fp16"), "--variant", gadjax_folder)
    refused(
        lambda: read_gadjax_folder(gadjax_folder, components=("unet",)), gadjax_folder, "no unet"
    )
