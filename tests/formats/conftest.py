import shutil

import pytest
from checkpoints import STEM, numpy_tensors

from gadjax.formats.weights import write_weights


@pytest.fixture
def source(tiny_pipeline, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(tiny_pipeline, tmp_path / "source")


@pytest.fixture
def good(tmp_path):
    """A folder with one good file, and that file."""
    (path,) = write_weights(tmp_path / "net", STEM, numpy_tensors().items())
    return path
