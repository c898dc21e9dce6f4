"""A LoRA student of every family: DMD, GAD and anchor on adapters, and back to diffusers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from families import EMBEDDED, LENGTH, TIMES
from train_runs import read_vector, rows, train

from gadjax import load, sample
from gadjax.checkpoints.restore import read_params
from gadjax.cli.main import main
from gadjax.formats.sampling_config import GADJAX_JSON
from gadjax.models.params import flatten

CONFIG = """
from gadjax.training.config import default_config

def get_config():
    config = default_config()
    config.teacher, config.guidance = {teacher!r}, 2.0
    config.student.steps, config.student.timesteps = {count}, {times!r}
    config.student.guidance = {embedded}
    config.student.lora.update(rank=2, alpha=16.0)
    config.objective = {{"dmd": {{}}, "gad": {{"steps": 1}}, "anchor": {{"steps": 1}}}}
    config.steps, config.batch = 2, 2
    config.remat = "block"
    config.optim.lr = config.critic.lr = 3e-2  # two updates show in the pictures
    config.data.update(prompts={prompts!r}, length={length})
    config.preview.every = 0
    return config
"""


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """Family -> workdir of two steps, made when it is first asked for."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            (folder / "prompts.txt").write_text("a red circle\na blue square above the green one\n")
            values = {
                "teacher": str(folders(family)),
                "count": len(TIMES[family]),
                "times": TIMES[family],
                "embedded": EMBEDDED.get(family, 1.0),
                "prompts": str(folder / "prompts.txt"),
                "length": LENGTH.get(family, 77),
            }
            (folder / "config.py").write_text(CONFIG.format(**values))
            assert train(folder / "config.py", folder / "run") == 0
            made[family] = folder / "run"
        return made[family]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMES)
def test_a_lora_student_trains(trained, family):
    workdir = trained(family)
    for row in rows(workdir):
        for name in ("loss/dmd", "loss/gad", "loss/anchor", "critic/loss", "gad/cosine"):
            assert np.isfinite(row[name]), name
        assert row["student/bad"] == row["critic/bad"] == 0
    for part in ("student", "critic"):
        flat = flatten(read_params(workdir / "checkpoints", part)[1])
        unmoved = {path for path, x in flat.items() if not x.any()}  # b starts at zero
        # The text has no queries in the last block of an MMDiT.
        assert unmoved <= {"last_block/attn_context/to_q/kernel/b"}
    assert not np.array_equal(read_vector(workdir, "student"), read_vector(workdir, "critic"))


# diffusers reads kohya's names of U-Nets alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    "family,keys",
    [(family, "diffusers") for family in TIMES]
    + [(family, "kohya") for family in ("sd15", "sd2_v", "sdxl")],
)
def test_its_lora_is_loaded_by_diffusers(folders, trained, family, keys, tmp_path):
    """The export's check loads it by `load_lora_weights`; it is read here from the same folder."""
    pytest.importorskip("peft")
    out, workdir = tmp_path / "out", trained(family)
    flags = ["--lora", "--keys", keys, "--workdir", str(workdir), "--out", str(out)]
    assert main(["export", *flags]) == 0
    assert json.loads((out / GADJAX_JSON).read_text())["verified"]["max_difference"] <= 1e-4
    adapted, merged = load(folders(family), lora=[out]), load(workdir)
    assert adapted.sampling.guidance == EMBEDDED.get(family, 1.0)
    assert adapted.sampling == merged.sampling and adapted.sampling.timesteps == TIMES[family]
    assert adapted.fingerprint != load(folders(family)).fingerprint
    base = replace(load(folders(family)), sampling=adapted.sampling)
    images = [sample(model, "a red circle", seed=3) for model in (adapted, merged, base)]
    ours, same, other = (image.astype(int) for image in images)
    assert np.abs(ours - same).max() <= 1 and np.abs(ours - other).max() > 3


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMES)
def test_its_merged_weights_are_a_pipeline_of_diffusers(trained, family, tmp_path):
    out = tmp_path / "out"
    assert main(["export", "--workdir", str(trained(family)), "--out", str(out)]) == 0
    assert json.loads((out / GADJAX_JSON).read_text())["verified"]["max_difference"] <= 1e-4
