import os
from pathlib import Path

import pytest
from tiny_run import build_pipeline, write_config

# Tests compile the same programs again and again, also in processes of their own.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/jax").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Nearly all of the time goes into optimising programs that then run for none.
HURRY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
if HURRY not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HURRY}".strip()


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
