import ctypes
import gc
import os
import sys
from pathlib import Path

import psutil
import pytest
from tiny_run import build_pipeline, write_config
from xla_flags import hurried

pytest.register_assert_rewrite("conformance", "conformance_autoencoder", "conformance_text")
# Tests compile the same programs again and again, also in processes of their own.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/jax").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["XLA_FLAGS"] = hurried(os.environ.get("XLA_FLAGS", ""))
ENOUGH = 1 << 31  # bytes of a worker
GROWTH = 1 << 28  # bytes that are worth a look at what may go back


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


class Memory:
    """Resident bytes of this worker, and how many stayed when the rest last went back."""

    stayed = 0

    def now(self) -> int:
        return psutil.Process().memory_info().rss

    def give_back(self) -> None:
        """The C library keeps what compiling has freed: half of a worker."""
        ctypes.CDLL(None).malloc_trim(0)
        self.stayed = self.now()


MEMORY = Memory()


@pytest.fixture(autouse=True)
def freed_memory_goes_back():
    """Where there is some: it takes longer than a small test."""
    yield
    if MEMORY.now() > MEMORY.stayed + GROWTH:
        MEMORY.give_back()


@pytest.fixture(scope="module", autouse=True)
def programs_of_finished_files_go():
    """Another file that needs one compiles or reads it again: hence only of large workers."""
    yield
    if "jax" in sys.modules and MEMORY.now() > ENOUGH:
        sys.modules["jax"].clear_caches()
        gc.collect()
        MEMORY.give_back()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family -> its folder, made when it is first asked for; to be read and not changed."""
    import families

    made = {}

    def get(family):
        if family not in made:
            made[family] = families.make(family, tmp_path_factory.mktemp("families") / family)
        return made[family]

    return get
