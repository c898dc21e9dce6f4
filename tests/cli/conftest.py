"""Commands called as a user calls them."""

from pathlib import Path

import pytest
from workdirs import make_workdir

from gadjax.cli.main import main


@pytest.fixture(scope="session")
def workdir(tiny_pipeline, tmp_path_factory) -> Path:
    """Workdir of a four-step student; read-only."""
    return make_workdir(tmp_path_factory.mktemp("runs") / "student", tiny_pipeline)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle above a blue square\ngreen square\n")
    return path


@pytest.fixture
def gadjax(capsys):
    """Call a command: `gadjax("sample", ...)` returns its output, and fails unless it returns 0."""

    def call(*arguments) -> str:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture
def fails(capsys):
    """Call a command that fails with `code`: one line on stderr with `words`, nothing written."""

    def call(arguments, code: int, *words, out: Path):
        before = sorted(out.parent.rglob("*"))
        assert main([str(argument) for argument in arguments]) == code
        err_line = capsys.readouterr().err
        assert err_line.startswith("gadjax: ") and err_line.count("\n") == 1, err_line
        for word in words:
            assert str(word) in err_line
        assert sorted(out.parent.rglob("*")) == before

    return call
