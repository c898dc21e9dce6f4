"""Folders for outside scripts, read back as those scripts read them."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from gadjax.errors import InputError
from gadjax.evaluation.layouts import HPS_STYLES, LAYOUTS, open_layout

AWKWARD = ["a cat/dog", 'a "red" hat', "an emoji 👩‍👧", "x" * 300, "under_score", "a: <b>"]
PLAIN = ["a red bench", "two cats, one hat"]


def picture(p, n, side=8):
    return np.full((side, side, 3), 10 * p + n, np.uint8)


def write(layout, folder, per_prompt):
    names = []
    for p in range(len(layout.prompts)):
        for n in range(per_prompt):
            names.append(layout.save(folder, p, n, picture(p, n)))
    layout.save_files(folder)
    return names


def shade(path):
    return int(np.asarray(Image.open(path))[0, 0, 0])


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_geneval_reads_its_folder(tmp_path):
    """The loop of its evaluate_images.py."""
    records = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": text}
        for text in AWKWARD
    ]
    prompts = lines(tmp_path / "evaluation_metadata.jsonl", *records)
    layout = open_layout("geneval", prompts, 2)
    write(layout, tmp_path / "out", 2)
    root, read = tmp_path / "out" / "images", []
    for subfolder in sorted(os.listdir(root)):
        assert subfolder.isdigit()
        with open(root / subfolder / "metadata.jsonl") as file:
            metadata = json.load(file)
        names = sorted(os.listdir(root / subfolder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names)
        read.append((metadata, [shade(root / subfolder / "samples" / name) for name in names]))
    assert read == [(record, [10 * p, 10 * p + 1]) for p, record in enumerate(records)]


def test_compbench_reads_its_folder(tmp_path):
    """Order by the number behind the last underscore, the prompt before the first."""
    path = tmp_path / "val.txt"
    path.write_text("\n".join(PLAIN))
    write(open_layout("t2i-compbench", path, 3), tmp_path / "out", 3)
    folder = tmp_path / "out" / "samples"
    names = sorted(os.listdir(folder), key=lambda x: int(x.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [text for text in PLAIN for _ in range(3)]
    assert [shade(folder / name) for name in names] == [0, 1, 2, 10, 11, 12]
    assert names[4] == "two cats, one hat_000004.png"
    for text in ("a cat/dog", "under_score", "x" * 300):
        path.write_text(f"plain\n{text}\n")
        with pytest.raises(InputError, match="found prompt 2, .*as T2I-CompBench reads"):
            open_layout("t2i-compbench", path, 1)


def test_dpg_reads_its_grids(tmp_path):
    """Cells row by row; the item's name before the first dot."""
    path = lines(tmp_path / "dpg.jsonl", *({"id": f"item{p}", "prompt": p_text}
                 for p, p_text in enumerate(AWKWARD)))  # fmt: skip
    layout = open_layout("dpg", path, 4)
    layout.check_size(8, 8)
    names = write(layout, tmp_path / "out", 4)
    assert names[:5] == ["images/item0.png"] * 4 + ["images/item1.png"]
    folder = tmp_path / "out" / "images"
    assert sorted(os.listdir(folder)) == [f"item{p}.png" for p in range(len(AWKWARD))]
    grid = Image.open(folder / "item2.png")
    boxes = (0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)
    assert [int(np.asarray(grid.crop(box)).mean()) for box in boxes] == [20, 21, 22, 23]
    with pytest.raises(InputError, match="expected square ones"):
        layout.check_size(8, 16)
    with pytest.raises(InputError, match="--per-prompt: found 1; expected 4"):
        open_layout("dpg", path, 1)
    for value in ("a.b", "../x", "a/b", ""):
        lines(path, {"id": value, "prompt": "x"})
        with pytest.raises(InputError, match=r"dpg.jsonl"):
            open_layout("dpg", path, 4)
    lines(path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"})
    with pytest.raises(InputError, match="repeated id"):
        open_layout("dpg", path, 4)


def test_hpsv2_reads_its_styles(tmp_path):
    """Its benchmark lists the folder, which holds styles alone, and counts within each."""
    records = [{"style": HPS_STYLES[p % 3], "prompt": text} for p, text in enumerate(AWKWARD)]
    path = lines(tmp_path / "hps.jsonl", *records)
    write(open_layout("hpsv2", path, 1), tmp_path / "out", 1)
    root = tmp_path / "out" / "images"
    assert sorted(os.listdir(root)) == sorted(HPS_STYLES[:3])
    for number, style in enumerate(HPS_STYLES[:3]):
        for index in range(2):
            value = shade(root / style / f"{index:05d}.jpg")
            assert abs(value - 10 * (number + 3 * index)) <= 1
    with pytest.raises(InputError, match="--per-prompt: found 2; expected 1"):
        open_layout("hpsv2", path, 2)
    lines(path, {"style": "cubism", "prompt": "x"})
    with pytest.raises(InputError, match="style: found 'cubism'; expected one of anime"):
        open_layout("hpsv2", path, 1)


def test_flat_and_pairs(tmp_path):
    path = lines(tmp_path / "p.jsonl", *({"prompt": text} for text in AWKWARD))
    write(open_layout("flat", path, 2), tmp_path / "flat", 2)
    names = os.listdir(tmp_path / "flat" / "images")
    assert len(names) == 2 * len(AWKWARD) and all(name.endswith(".png") for name in names)
    write(open_layout("pairs", path, 2), tmp_path / "pairs", 2)
    text = (tmp_path / "pairs" / "pairs.jsonl").read_text()
    pairs = [json.loads(line) for line in text.splitlines()]
    assert [pair["prompt"] for pair in pairs] == [text for text in AWKWARD for _ in range(2)]
    assert [shade(tmp_path / "pairs" / pair["path"]) for pair in pairs[:3]] == [0, 1, 10]


def test_other_prompt_files_are_refused(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\n")
    with pytest.raises(InputError, match="--layout: found 'coco'; expected one of plain"):
        open_layout("coco", path, 1)
    for name, message in (
        ("geneval", "expected .jsonl"),
        ("dpg", "with id"),
        ("hpsv2", "with style"),
    ):
        with pytest.raises(InputError, match=message):
            open_layout(name, path, 4)
    geneval = lines(tmp_path / "g.jsonl", {"prompt": "a cat", "tag": "single_object"})
    with pytest.raises(InputError, match=r"g.jsonl:1: found no tag and include"):
        open_layout("geneval", geneval, 4)
    for name in LAYOUTS:
        with pytest.raises(InputError):
            open_layout(name, tmp_path / "missing.jsonl", 4)
