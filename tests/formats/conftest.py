import shutil

import pytest


@pytest.fixture
def source(tiny_pipeline, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(tiny_pipeline, tmp_path / "source")
