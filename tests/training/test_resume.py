import pytest

from gadjax.errors import InputError
from gadjax.training.config import as_json, read_config
from gadjax.training.resume import check_resume, differences


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "from gadjax.training.config import default_config\n"
        "def get_config(variant=None):\n"
        "    config = default_config()\n"
        "    config.objective = {'gad': {'weight': 0.5, 'steps': 2}}\n"
        "    config.batch = 8\n"
        "    return config\n"
    )
    return f"--config={path}"


def test_differences_are_named_by_their_dotted_keys():
    old = {"a": {"b": 1, "c": 2}, "d": [1], "e": 0}
    new = {"a": {"b": 1, "c": 3}, "d": [1, 2], "f": 4}
    expected = [("a.c", 2, 3), ("d", [1], [1, 2]), ("e", 0, None), ("f", None, 4)]
    assert differences(old, new) == expected


def test_a_workdir_of_an_older_version_had_the_default_of_a_newer_key(plain, tmp_path):
    saved = as_json(read_config([plain]))
    del saved["data"]["column"], saved["ema"]
    check_resume(saved, read_config([plain]), tmp_path)
    with pytest.raises(InputError, match="ema: found 0.999, asked for 0.5"):
        check_resume(saved, read_config([plain, "--config.ema=0.5"]), tmp_path)


def test_keys_that_a_resumed_run_may_change(plain, tmp_path):
    saved = as_json(read_config([plain]))
    free = ("mesh.data=1", "steps=5", "log.every=1", "preview.every=7", "checkpoint.keep=1")
    check_resume(saved, read_config([plain, *(f"--config.{flag}" for flag in free)]), tmp_path)
    for flag, message in (
        ("batch=4", "batch: found 8, asked for 4"),
        ("optim.lr=1.0", "optim.lr: found 1e-05, asked for 1.0"),
        ("objective.gad.weight=0.1", "objective.gad.weight: found 0.5, asked for 0.1"),
        ("seed=1", "seed: found 0, asked for 1"),
        ("student.timesteps=(5,)", "student.timesteps: found [899, 674, 449, 224], asked for [5]"),
    ):
        with pytest.raises(InputError) as error:
            check_resume(saved, read_config([plain, f"--config.{flag}"]), tmp_path)
        assert message in str(error.value) and str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
