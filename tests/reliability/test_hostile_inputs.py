"""Mutants of every target of hostile_inputs; pictures and reports that are not what they seem."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from hostile_inputs import TARGETS, refused
from mutate import Special, mutate, read_tree
from one_input import read_once
from PIL import Image

from gadjax.cli.main import main
from gadjax.data.images import open_images, read_image
from gadjax.formats.model_card import read_license, read_report

INSTEAD = {
    "nothing": None,
    "empty": b"",
    "a folder": Special("folder"),
    "a pipe": Special("fifo"),
    "a device": Special("link", "/dev/zero"),
    "a loop": Special("link", "loop"),
    "another kind of file": b"\x7fELF\x02\x01\x01\0\0",
    "a broken bracket": b"[" * 100_000,
}
MUTANTS = 15
pytestmark = pytest.mark.usefixtures("hurry")


@pytest.fixture(scope="module")
def trees():
    found = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            target.make(Path(folder))
            found[target.name] = read_tree(Path(folder))
    return found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_mutants_are_read_or_refused(target, trees, tmp_path):
    tree = trees[target.name]
    assert read_once(target, tree, tmp_path).kind == "ok"
    mutants = {i: mutate(tree, random.Random(i)) for i in range(MUTANTS)}
    few = sorted(tree)[:: 1 + len(tree) // 5]
    for name in few:
        for kind, content in INSTEAD.items():
            other = {key: value for key, value in tree.items() if key != name}
            mutants[name, kind] = other if content is None else other | {name: content}
    for which, mutant in mutants.items():
        outcome = read_once(target, mutant, tmp_path)
        assert not outcome.bad, (which, outcome)


def png(width, height):
    """One of few bytes, all black; whole, unless it is a huge one."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress(b"\0" * min(height * ((width + 7) // 8 + 1), 1 << 25), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_001, 10_000), (14_000, 14_000), (60_000, 60_000)])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size))
    assert (tmp_path / "a.png").stat().st_size < 100_000
    code = (
        "import resource, sys; from gadjax.data.images import read_image; "
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
        "try: read_image(sys.argv[1], (8, 8))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert "found a picture that cannot be read (" in done.stdout and "pixels" in done.stdout


def test_a_picture_of_the_most_pixels_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(10_000, 3_001))
    assert read_image(tmp_path / "a.png", (4, 4)).max() == -1


def test_only_some_formats_are_decoded(tmp_path, monkeypatch):
    def run(*args, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(script)
    (tmp_path / "b.jpg").write_bytes(b"")
    for kind in ("PCX", "TGA", "ICO", "SGI"):
        data = io.BytesIO()
        Image.new("RGB", (8, 8)).save(data, kind)
        (tmp_path / f"{kind}.png").write_bytes(data.getvalue())
    for path in tmp_path.iterdir():
        refused(lambda path=path: read_image(path, (8, 8)), "cannot be read .cannot identify")


def test_metadata_stays_in_its_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "x/../a.png",
        "a.png\0",
        "\x1b.png",
    ):
        line = json.dumps({"file_name": name, "prompt": "a"})
        (folder / "metadata.jsonl").write_text(line)
        refused(lambda: open_images(folder), "found (file_name|a NUL)")


def test_reports_that_are_none(tmp_path):
    row = {"label": "a", "evaluations": 1, "metrics": {}}
    metric = {"value": 1.0, "low": None, "high": 2}
    path = tmp_path / "report.json"
    for changed in (
        *({"rows": x} for x in (3, [], {"a": 3}, {"a": {}}, {"a": row | {"label": 3}})),
        *({"rows": {"a": row | {"evaluations": x}}} for x in ("1", True, -1, 10**30)),
        *({"rows": {"a": row | {"metrics": x}}} for x in (3, {"a": 3}, {"a": {"value": 1}})),
        {"rows": {"a": row | {"metrics": {"a": metric | {"value": None}}}}},
        {"rows": {"a": row | {"metrics": {"a": metric | {"high": "2"}}}}},
        {"rows": {"a": row}, "settings": 3},
    ):
        path.write_text(json.dumps(changed))
        refused(lambda: read_report(path), "found no rows with metrics; expected a report.json")
    path.write_text(json.dumps({"rows": {"a": row | {"metrics": {"a": metric}}}}))
    assert read_report(path)["rows"]["a"]["label"] == "a"


def test_a_license_from_a_hostile_card(tmp_path):
    card = tmp_path / "README.md"
    assert read_license(tmp_path) == "unknown"
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(9)
    )
    for text in (bomb + "license: [*j]", "license: !!python/object/apply:os.system [true]"):
        card.write_text(f"---\n{text}\n---\n")
        assert read_license(tmp_path) == "unknown"
    card.write_text("---\nlicense: mit\n---\n" + "x" * (1 << 20))
    assert read_license(tmp_path) == "unknown"
    card.unlink()
    os.mkfifo(card)
    assert read_license(tmp_path) == "unknown"


def test_paths_that_are_too_long(tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("red")
    for name in ("x" * 300, "/".join(["x" * 100] * 60), "~nobody-of-this-name/x"):
        for flags in (
            ["--model", name, "--prompts", str(prompts)],
            ["--model", "x", "--prompts", f"{name}.txt"],
        ):
            assert main(["sample", *flags, "--out", str(tmp_path / "out")]) == 2
            stderr = capsys.readouterr().err
            assert stderr.count("\n") == 1 and stderr[:-1].isprintable()
    assert sorted(os.listdir(tmp_path)) == ["p.txt"]
