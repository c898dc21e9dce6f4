import json

import pytest
from checkpoints import refused
from programs import run_python

from gadjax.errors import InputError
from gadjax.io import atomic
from gadjax.io.atomic import atomic_folder, check_target, partial_folder, restore_replaced


def test_atomic_folder(tmp_path):
    dst = tmp_path / "deep" / "out"
    with atomic_folder(dst) as partial:
        (partial / "a").write_text("1")
        assert partial.parent == dst.parent and not dst.exists()
    assert [p.name for p in dst.parent.iterdir()] == ["out"]
    assert (dst / "a").read_text() == "1"
    assert dst.stat().st_mode == dst.parent.stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_keeps_the_old_folder(tmp_path, error):
    dst = tmp_path / "out"
    for old in ([], ["kept"]):
        for name in old:
            dst.mkdir()
            (dst / name).write_text("old")
        with pytest.raises(error), atomic_folder(dst, overwrite=True) as partial:
            (partial / "a").write_text("1")
            raise error
        assert sorted(p.name for p in tmp_path.rglob("*")) == (["kept", "out"] if old else [])


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanges(request, monkeypatch) -> bool:
    """Run with and without a file system that can exchange two folders."""
    if not request.param:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return request.param


def test_atomic_folder_replaces(tmp_path, exchanges):
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


def test_exchange_is_atomic_on_this_system(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    assert not atomic._exchange(a, b)  # there is no b
    b.mkdir()
    (b / "of b").touch()
    assert atomic._exchange(a, b)
    assert (a / "of b").exists() and not any(b.iterdir())


def test_atomic_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: atomic_folder(tmp_path / "file").__enter__(), "found a file")
    refused(lambda: atomic_folder(tmp_path / "file" / "out").__enter__(), "a folder to write in")
    with pytest.raises(InputError, match="with files"), atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("2")  # another process was faster
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "out", "theirs"]


def test_nested_atomic_folder(tmp_path):
    with atomic_folder(tmp_path / "out") as outer, atomic_folder(outer) as inner:
        assert inner == outer
        (inner / "a").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "out"]


def test_next_writer_removes_abandoned_folders(tmp_path):
    dst, remaining = tmp_path / "out", tmp_path / "out.partial-dead"
    (remaining / "deep").mkdir(parents=True)
    another = tmp_path / "out2.partial-dead"
    another.mkdir()
    with atomic_folder(dst) as first, atomic_folder(dst) as second:  # both live
        assert first.exists() and second.exists() and not remaining.exists()
        with partial_folder(dst) as third:
            assert first.exists() and second.exists() and third.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", another.name]


def test_replaced_folder_is_restored(tmp_path, caplog):
    dst, aside = tmp_path / "out", tmp_path / "out.replaced-dead"
    aside.mkdir()
    (aside / "a").write_text("old")
    with atomic._if_abandoned(aside):  # its writer lives
        restore_replaced(dst)
        assert not dst.exists()
    refused(lambda: check_target(dst), dst, "a folder with files in it")
    assert (dst / "a").read_text() == "old" and not aside.exists()
    assert "restored" in caplog.text
    aside.mkdir()
    restore_replaced(dst)  # nothing to do: dst is there
    assert aside.exists()
    with atomic_folder(dst, overwrite=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Writers that are killed before their first event, their second, and so on until one completes.
# Events are those of Python's audit hooks: every file opened, renamed, removed or locked.
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from gadjax.io import atomic

dst = Path(sys.argv[1], "out")
if sys.argv[2] == "False":
    atomic._exchange = lambda a, b: False

def write(word):
    with atomic.atomic_folder(dst, overwrite=True) as new:
        (new / "deep").mkdir()
        for name in ("a", "deep/b"):
            (new / name).write_text(word)

def killed(events):
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = events
    def hook(event, arguments):
        nonlocal left
        left -= event.partition(".")[0] in ("open", "os", "shutil", "fcntl", "ctypes")
        if left == -1:  # os.kill itself is an event
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write("new")
    os._exit(0)

def found():
    paths = (path for path in dst.rglob("*") if path.is_file())
    files = {str(path.relative_to(dst)): path.read_text() for path in paths}
    return "missing" if not dst.exists() else next(
        (word for word in ("old", "new") if files == {"a": word, "deep/b": word}), "mixed"
    )

code, seen = -signal.SIGKILL, []
while code == -signal.SIGKILL:
    write("old")
    code = killed(len(seen))
    at_once = found()
    atomic.restore_replaced(dst)
    seen.append((at_once, found()))
    write("next")
    assert os.listdir(dst.parent) == ["out"], os.listdir(dst.parent)
assert code == 0
print(json.dumps(seen))
"""


def test_kill_at_any_event_leaves_old_or_new(tmp_path, exchanges):
    done = run_python("-c", KILLED, tmp_path, exchanges)
    at_once, later = zip(*json.loads(done.stdout), strict=True)
    assert len(later) > 20 and set(later) == {"old", "new"}
    assert list(later) == sorted(later, reverse=True)  # the old, then the new
    # Between two renames there is neither, until the next command puts the old one back.
    assert ("missing" in at_once) != exchanges and "mixed" not in at_once
    assert done.stderr.count("restored") == at_once.count("missing")
