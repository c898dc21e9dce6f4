import json
from pathlib import Path

import pytest

from gadjax.errors import InputError
from gadjax.training.checks import student_times
from gadjax.training.config import (
    as_json,
    config_names,
    default_config,
    read_config,
    with_absolute_paths,
    write_json,
)
from gadjax.training.resume import check_resume, differences

HEAD = "from gadjax.training.config import default_config\n"
PLAIN = HEAD + (
    "def get_config(variant='full'):\n"
    "    config = default_config()\n"
    "    config.objective = {'gad': {'weight': 0.5, 'steps': 2}}\n"
    "    config.update({'full': {'batch': 8}, 'small': {'batch': 4, 'ema': 0.5}}[variant])\n"
    "    return config\n"
)


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)
    return f"--config={path}"


def written(tmp_path, line):
    """A config file that differs from the default one by a line."""
    path = tmp_path / "changed.py"
    path.write_text(
        HEAD + f"def get_config():\n    c = default_config()\n    {line}\n    return c\n"
    )
    return f"--config={path}"


def refused(*arguments):
    with pytest.raises(InputError) as error:
        read_config(arguments)
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and len(text) < 300
    return text


def test_reading_writes_no_bytecode(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    read_config([plain])
    assert [path.name for path in tmp_path.iterdir()] == ["plain.py"]


def test_a_file_its_variant_and_overrides(plain):
    config = read_config([plain])
    assert (config.batch, config.ema, config.optim.lr) == (8, 0.999, 1e-5)
    assert config.is_locked
    flags = ["--config.optim.lr=3e-4", "--config.objective.gad.weight=0", "--config.remat=none"]
    config = read_config([plain + ":small", *flags, "--config.student.timesteps=(899,449)"])
    assert (config.batch, config.ema, config.optim.lr, config.remat) == (4, 0.5, 3e-4, "none")
    assert config.objective.to_dict() == {"gad": {"weight": 0.0, "steps": 2}}
    assert tuple(config.student.timesteps) == (899, 449)
    assert config.optim.b2 == default_config().optim.b2


def test_the_flag_and_its_file_may_be_two_words(plain):
    flag, path = plain.split("=")
    assert read_config([flag, path, "--config.batch", "16"]).batch == 16


def test_unknown_keys(plain, tmp_path):
    assert 'Did you mean "optim"' in refused(plain, "--config.optm.lr=1")
    assert 'Did you mean "lr"' in refused(plain, "--config.optim.lrr=1")
    assert "dmd" in refused(plain, "--config.objective.dmd.weight=1")
    found = refused(written(tmp_path, "c.optim.warmpu = 3"))
    assert found == (
        "config: found the key optim.warmpu; expected a known one; did you mean optim.warmup?"
    )
    found = refused(written(tmp_path, "c.zzz = 3"))
    assert found == "config: found the key zzz; expected a known one"


def test_wrong_types(plain, tmp_path):
    assert "'many'" in refused(plain, "--config.batch=many")
    assert "'1.5'" in refused(plain, "--config.batch=1.5")
    assert "'batch'" in refused(written(tmp_path, "c.batch = 'many'"))
    assert "seed = {'a': 1}" in refused(
        written(tmp_path, "c = type(c)({**c.to_dict(), 'seed': {'a': 1}})")
    )
    assert "optim = 3" in refused(written(tmp_path, "c = type(c)({**c.to_dict(), 'optim': 3})"))
    assert "found no key batch" in refused(written(tmp_path, "c.unlock(); del c.batch"))


def test_unknown_variants(plain):
    assert "found an unknown key or variant, large" in refused(plain + ":large")
    # The project's own config files name what there is.
    path = Path(__file__).parents[2] / "configs" / "shapes_gad.py"
    found = refused(f"--config={path}:best")
    assert found.startswith("--config: found the variant 'best'; expected one of gad")


def test_a_bundled_config_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no clone here
    folder = Path(__file__).parents[2] / "configs"
    names = sorted(path.stem for path in folder.glob("*.py"))
    assert config_names() == names and "pixart_gad" in names
    for name in names:
        assert read_config([f"--config={name}"]) == read_config([f"--config={folder / name}.py"])
    by_file = read_config(["--config", f"{folder}/pixart_gad.py:tdm", "--config.batch=64"])
    assert by_file.objective.to_dict() == {"tdm": {}} and by_file.batch == 64
    for arguments in (["--config", "pixart_gad:tdm"], ["--config=pixart_gad:tdm"]):
        assert read_config([*arguments, "--config.batch=64"]) == by_file


def test_unknown_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = ", ".join(config_names())
    expected = f"--config: found 'pixart'; expected a file, or one of {names}"
    assert refused("--config=pixart:gad") == f"{expected}; did you mean pixart_gad?"
    assert refused("--config", "nothing") == expected.replace("pixart'", "nothing'")
    assert "found the variant 'best'; expected one of gad" in refused("--config=pixart_gad:best")
    for path in ("./pixart_gad", "pixart_gad.py", "../pixart_gad", f"{tmp_path}/pixart_gad"):
        assert "No such file" in refused(f"--config={path}")


def test_a_file_goes_before_a_bundled_config(plain, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes_gad").mkdir()  # a folder does not
    assert read_config(["--config=shapes_gad"]).guidance == 4.0
    (tmp_path / "sdxl").write_text((tmp_path / "plain.py").read_text())
    assert read_config(["--config=sdxl:small"]).batch == 4


def test_missing_files_and_files_that_are_not_configs(plain, tmp_path):
    found = refused(f"--config={tmp_path / 'nowhere.py'}")
    assert "No such file" in found and "nowhere.py" in found
    assert str(tmp_path) in refused(f"--config={tmp_path}")
    assert refused() == "--config: found nothing; expected FILE[:variant] or NAME[:variant]"
    refused("--config=")
    refused("--config")
    path = tmp_path / "broken.py"
    for text, message in (
        ("def get_config(:", "invalid syntax"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def get_config():\n    raise RuntimeError('one\\ntwo')", "one two"),
        ("def get_config():\n    return {}", "dict"),
        ("def get_config():\n    return None", "found nothing"),
    ):
        path.write_text(text)
        assert message in refused(f"--config={path}"), text
    assert "extra" in refused(plain, "extra")
    assert "other" in refused(plain, "--other=1")
    text = refused(plain, "--config.objective.gad.direction=sphere")
    assert "found no key 'direction' to change; expected one that the config file" in text


def test_a_config_reads_back_as_it_was_saved(plain, tmp_path):
    config = read_config([plain])
    write_json(config, tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == as_json(config) and saved["student"]["timesteps"] == [899, 674, 449, 224]
    assert differences(saved, as_json(config)) == []
    check_resume(saved, config, tmp_path)


def test_the_teachers_path_is_saved_as_absolute(plain, tmp_path, monkeypatch):
    """The absolute path is saved; an older workdir has the path as it was given."""
    monkeypatch.chdir(tmp_path)
    given = read_config([plain, "--config.teacher=teachers/one"])
    config = with_absolute_paths(given)
    assert config.teacher == str(tmp_path / "teachers" / "one")
    assert given.teacher == "teachers/one" and with_absolute_paths(config) == config
    check_resume(as_json(given), config, tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    other = read_config([plain, "--config.teacher=../teachers/one"])
    check_resume(as_json(config), other, tmp_path)
    with pytest.raises(InputError, match="teacher: found .*/teachers/one', asked for .*/runs/x'"):
        check_resume(as_json(config), read_config([plain, "--config.teacher=x"]), tmp_path)
    bundled = read_config([plain, "--config.teacher=asset:shapes_teacher"])
    assert with_absolute_paths(bundled) == bundled


def times(**student):
    config = default_config()
    config.student.update(student)
    return student_times(config)


def test_the_students_times():
    assert times() == (899.0, 674.0, 449.0, 224.0)
    assert times(steps=1, timesteps=(0,)) == (0.0,)
    for wrong in (
        dict(steps=3),
        dict(timesteps=(899, 899, 449, 224)),
        dict(timesteps=(224, 449, 674, 899)),
        dict(timesteps=(899, 674, 449, -1)),
        dict(steps=0, timesteps=()),
        dict(init="nothing"),
    ):
        with pytest.raises(InputError, match="^student\\."):
            times(**wrong)
