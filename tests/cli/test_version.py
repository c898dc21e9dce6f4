"""gadjax --version, and configs by name as a user of the commands calls them."""

import importlib.metadata

import pytest

from gadjax.cli.main import main


def version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    return capsys.readouterr().out


def test_version(capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2 of {name}")
    assert version(capsys) == "gadjax 1.2 of gadjax\n"


def test_a_clone_that_is_not_installed_has_no_version(capsys, monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert version(capsys) == "gadjax (not installed: no version)\n"


@pytest.mark.parametrize("command", [["train", "--workdir=run"], ["plan", "--topology=v5e:4x4"]])
def test_an_unknown_config_is_one_line(command, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("found 'pixart'", "expected a file, or one of", "shapes_gad", "mean pixart_gad?")
    fails([*command, "--config", "pixart:gad"], 2, *names, out=tmp_path / "run")
