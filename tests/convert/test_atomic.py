import pytest
from checkpoints import refused

from gadjax.convert.atomic import atomic_folder
from gadjax.errors import InputError


def test_atomic_folder(tmp_path):
    dst = tmp_path / "deep" / "out"
    with atomic_folder(dst) as partial:
        (partial / "a").write_text("1")
        assert partial.parent == dst.parent and not dst.exists()
    assert [p.name for p in dst.parent.iterdir()] == ["out"]
    assert (dst / "a").read_text() == "1"
    assert dst.stat().st_mode == dst.parent.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_folder_keeps_the_old_on_an_error(tmp_path, error):
    dst = tmp_path / "out"
    for old in ([], ["kept"]):
        for name in old:
            dst.mkdir()
            (dst / name).write_text("old")
        with pytest.raises(error), atomic_folder(dst, overwrite=True) as partial:
            (partial / "a").write_text("1")
            raise error
        assert sorted(p.name for p in tmp_path.rglob("*")) == (["kept", "out"] if old else [])


def test_atomic_folder_replaces(tmp_path):
    dst = tmp_path / "out"
    dst.mkdir()
    with atomic_folder(dst) as partial:  # empty: nothing is lost
        (partial / "a").write_text("1")
    refused(lambda: atomic_folder(dst).__enter__(), dst, "a folder with files in it")
    other = lambda: atomic_folder(dst, overwrite=True, marker="b").__enter__()  # noqa: E731
    refused(other, dst, "a folder without b")
    with atomic_folder(dst, overwrite=True, marker="a") as partial:
        (partial / "c").write_text("2")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c", "out"]


def test_atomic_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: atomic_folder(tmp_path / "file").__enter__(), "found a file")
    refused(lambda: atomic_folder(tmp_path / "file" / "out").__enter__(), "a folder to write in")
    with pytest.raises(InputError, match="with files"), atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("2")  # another process was faster
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "out", "theirs"]
