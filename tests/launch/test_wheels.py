"""launch/wheels.sh with a pip that records what it is asked for, and needs no network."""

import shlex
import shutil

import pytest
from launching import ROOT, Bench

NAMES = (
    "diffusers clu grain ml_collections array_record cloudpickle etils importlib_resources "
    "more_itertools portpicker"
).split()


@pytest.fixture
def machine(bench) -> Bench:
    (bench.bin / "stat").symlink_to(shutil.which("stat"))
    return bench


def put_wheel(bench: Bench, size: int) -> None:
    """Make pip write one wheel of `size` bytes, into the folder after --dest."""
    find = "for ((i = 1; i < $#; i++)); do [[ ${!i} != --dest ]] || n=$((i + 1)); done"
    bench.program(
        "python3",
        '[ "$3" = download ] || exit 0',
        find,
        'mkdir -p "${!n}"',
        f'truncate -s {size} "${{!n}}/a.whl"',
    )
    (bench.bin / "truncate").symlink_to(shutil.which("truncate"))


def requested(argv: list[str]) -> list[str]:
    """Requirements at the end of a call of pip."""
    return argv[argv.index("manylinux_2_28_x86_64") + 1 :]


def test_the_wheels_of_another_python_are_downloaded(machine):
    put_wheel(machine, 2_000_000)
    out, _ = machine.run("wheels.sh", "my wheels")
    argv, own = machine.calls
    assert own[2:4] == ["pip", "wheel"] and own[-1] == "."
    assert own[own.index("--wheel-dir") + 1] == str(machine.folder / "my wheels")
    assert argv[:4] == ["python3", "-m", "pip", "download"]
    flags = dict(zip(argv, argv[1:], strict=False))
    assert flags["--dest"] == str(machine.folder / "my wheels")
    assert flags["--python-version"] == "3.12" and flags["--implementation"] == "cp"
    assert {"--no-deps", "--only-binary=:all:"} <= {*argv}
    wheels = requested(argv)
    assert sorted(name.split("<")[0].split(">")[0] for name in wheels) == sorted(NAMES)
    # Versions are those of requirements.txt.
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    bounded = [name for name in wheels if ">" in name]
    assert len(bounded) == 4 and {*bounded} <= {line.split(" ")[0] for line in lines}
    assert "2 MB" in out and "--no-index" in out


def test_too_much_is_refused(machine):
    put_wheel(machine, 60_000_001)
    _, err = machine.run("wheels.sh", "wheels", code=2)
    assert err == (
        f"wheels.sh: DIR: found 60000001 bytes of wheels in {machine.folder}/wheels; expected at "
        "most 60000000\n"
    )


def test_a_failed_download_fails(machine):
    machine.programs("python3", code=1)
    machine.run("wheels.sh", "wheels", code=1)


def test_a_dry_run_prints_the_command(machine):
    machine.programs("pip-of-mine")
    out, _ = machine.run("wheels.sh", "/w", "--dry-run", PYTHON="pip-of-mine")
    download, wheel = map(shlex.split, out.splitlines())
    assert download[:4] == ["pip-of-mine", "-m", "pip", "download"] and wheel[3] == "wheel"
    assert len(requested(download)) == len(NAMES) and machine.calls == []


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--index"]])
def test_other_arguments_are_refused(machine, arguments):
    machine.programs("python3")
    _, err = machine.run("wheels.sh", *arguments, code=2)
    assert err.startswith("wheels.sh: DIR: found ") and machine.calls == []


def test_help_is_the_head_of_the_script(machine):
    out, _ = machine.run("wheels.sh", "--help")
    assert "wheels.sh DIR" in out and "--no-index" in out
