from pathlib import Path

import pytest

CONFIG = """
from gadjax.training.config import default_config

def get_config():
    config = default_config()
    config.teacher = {teacher!r}
    config.guidance = 2.0
    config.student.steps, config.student.timesteps = 2, (900, 400)
    config.objective = {{"dmd": {{}}, "gad": {{"steps": 1}}, "anchor": {{"steps": 1}}}}
    config.steps, config.batch = 4, 8
    config.remat = "none"
    config.optim.lr = 1e-3
    config.critic.lr = 1e-3
    config.data.update(prompts={prompts!r}, length=8)
    config.checkpoint.every = 2
    config.log.every = 1
    config.preview.every = 0
    return config
"""


@pytest.fixture(scope="session")
def config(tiny_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    prompts = folder / "prompts.txt"
    prompts.write_text("red circle\ngreen square\nblue circle above red square\n")
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(teacher=str(tiny_pipeline), prompts=str(prompts)))
    return path
