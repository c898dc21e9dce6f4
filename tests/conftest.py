import os
from pathlib import Path

import pytest
from tiny_run import build_pipeline, write_config
from xla_flags import hurried

# Tests compile the same programs again and again, also in processes of their own.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/jax").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["XLA_FLAGS"] = hurried(os.environ.get("XLA_FLAGS", ""))


@pytest.fixture(scope="session")
def torch_pipeline():
    """A PixArtAlphaPipeline of diffusers with every parameter random, in float32."""
    return build_pipeline()


@pytest.fixture(scope="session")
def tiny_pipeline(torch_pipeline, tmp_path_factory) -> Path:
    """The folder of `torch_pipeline`, to be read and not changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    torch_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def config(tiny_pipeline, tmp_path_factory) -> Path:
    """Of a run of seconds, on `tiny_pipeline`."""
    return write_config(tmp_path_factory.mktemp("config"), tiny_pipeline)
