"""Prompts, pictures, embeddings, workdirs and reports for fuzz.py: valid ones, and the readers that
commands use for them."""

import csv
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from one_input import Target

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))  # for a script; pytest has it there

from PIL import Image, ImageFont  # noqa: E402

from gadjax.data.embeddings import Origin, open_embeddings, write_embeddings  # noqa: E402
from gadjax.data.images import open_images  # noqa: E402
from gadjax.data.prompts import read_prompts  # noqa: E402
from gadjax.errors import InputError  # noqa: E402
from gadjax.evaluation.compare import comparison, read_reports  # noqa: E402
from gadjax.formats.model_card import read_license, read_report, report_lines  # noqa: E402
from gadjax.io.image_grid import wrap_text  # noqa: E402
from gadjax.io.manifest import COMMIT_MARKER  # noqa: E402
from gadjax.io.untrusted import read_json  # noqa: E402
from gadjax.runtime.goodput import GoodputClock  # noqa: E402
from gadjax.runtime.status import HEALTH, read_status, table  # noqa: E402
from gadjax.training.config import as_json, default_config  # noqa: E402
from gadjax.training.health import BANDS, Health, earlier_rows  # noqa: E402
from gadjax.training.resume import check_inputs, check_resume  # noqa: E402
from gadjax.training.workdir import parse_run_metadata, read_trained  # noqa: E402

TEXTS = [
    "a red circle",
    'a "cross", small | `tick` <b>[x](y)</b>',
    "ein blaues Viereck, groß 圆 👩‍👧",
    "\u202eright to left\u200f \u2028 \u0085 \x1b[31m",
]
SIZE = (8, 8)
NOW = 1e6
INPUTS = {"teacher": "a" * 32, "data.prompts": "b" * 32}


def refused(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert str(caught.value).isprintable()


def make_prompts(suffix: str, folder: Path) -> None:
    lines = TEXTS
    if suffix == "jsonl":
        lines = [json.dumps({"id": i, "prompt": text}) for i, text in enumerate(TEXTS)]
    elif suffix == "csv":
        quoted = (text.replace('"', '""') for text in TEXTS)
        lines = ["id,prompt", *(f'{i},"{text}"' for i, text in enumerate(quoted))]
    (folder / f"p.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_and_show(suffix: str, folder: Path) -> None:
    font = ImageFont.load_default(11)
    for text in read_prompts(folder / f"p.{suffix}"):
        assert text == text.strip() and text and len(text.encode()) <= 1 << 17
        wrap_text(text, font, 100)


def make_images(captions: str, folder: Path) -> None:
    """captions: txt beside each picture, or jsonl or csv of metadata."""
    rng = np.random.default_rng(0)
    names = "a.png", "b.jpg", "deeper/c.webp", "d.gif"
    (folder / "deeper").mkdir()
    records = []
    for name, text in zip(names, TEXTS, strict=True):
        image = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(folder / name, exif=exif)
        if captions == "txt":
            (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
        records.append({"file_name": name, "prompt": text})
    if captions == "jsonl":
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metadata.jsonl").write_text(lines)
    elif captions == "csv":
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("file_name", "prompt"))
            writer.writeheader()
            writer.writerows(records)


def read_images(folder: Path) -> None:
    found = open_images(folder)
    images = found.read(range(len(found.names)), SIZE)
    assert images.shape == (len(found.names), *SIZE, 3) and np.isfinite(images).all()


def make_embeddings(folder: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"text": (3, 5), "mask": (3,), "pooled": (2,)}
    null = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    batch = {name: rng.random((4, *shape), np.float32) for name, shape in shapes.items()}
    batch["x0"] = rng.random((4, 2, 2, 4), np.float32)
    origin = Origin("a" * 32, "b" * 32, (2, 2, 4))
    write_embeddings(folder, TEXTS, [batch], null, origin=origin)


def read_embeddings(folder: Path) -> None:
    found = open_embeddings(folder)
    found.check("a" * 32, 3)
    found.check_latents("b" * 32, (2, 2, 4))
    everything = np.arange(len(found.prompts))
    assert found.texts(everything)["text"].shape == (4, 3, 5)
    assert found.latent_NHWC[everything].shape == (4, 2, 2, 4)


def config():
    found = default_config()
    found.teacher, found.objective = "asset:shapes_teacher", {"dmd": {}, "gad": {"weight": 0.3}}
    return found


def make_run(folder: Path) -> None:
    """What a run writes beside its checkpoints."""
    files = {
        "config.json": as_json(config()),
        "status.json": {
            **{"status": "running", "step": 30, "steps": 1000, "time": NOW - 60, "reason": ""},
            "text": "running",
        },
        "run.json": {
            **{"devices": 4, "device": "TPU v5 lite", "processes": 2, "flops_per_step": 3.9e14},
            **{"peak_flops": 1.97e14, "images_per_step": 32, "versions": {"jax": "0.10"}},
        },
        "goodput.json": {
            **{"step": 40, "steps": 40, "starts": 2},
            "seconds": {
                **{"step": 80.0, "data": 4.0, "checkpoint": 3.0, "preview": 2.0, "compile": 10.0},
                "lost": 1.0,
            },
        },
        "inputs.json": INPUTS,
        f"checkpoints/20/{COMMIT_MARKER}": {"step": 20},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    row = {"step": 2, "time": NOW - 9, "images_per_second": 2.5, "goodput": 0.8, "loss/gad": None}
    rows = [row | {"step": step, "loss/dmd": step / 7} for step in range(10, 50, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"x0_rms": 1.2, "x0_rms_teacher": 1.0, "same_seed": None, "same_seed_teacher": 1.0}
    rows = [{"step": step} | row | {"alarms": ["same_seed"]} for step in (0, 20)]
    (folder / HEALTH).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "previews").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "previews" / "0000020.png")


def read_run(folder: Path) -> None:
    found = read_status(folder, NOW)
    json.dumps(found, allow_nan=False)
    assert all(line.isprintable() for line in table(found).split("\n"))


def read_to_resume(folder: Path) -> None:
    clock = GoodputClock()
    clock.resume(folder, 30)
    assert 0 <= clock.share() <= 1
    assert set(Health(earlier_rows(folder, 30)).alarms) <= set(BANDS)
    check_resume(read_json(folder / "config.json"), config(), folder)
    check_inputs(folder, config(), INPUTS)


def make_meta(folder: Path) -> None:
    meta = {"config": as_json(config()), "teacher": "a" * 32}
    (folder / "meta.json").write_text(json.dumps(meta))


def read_meta(folder: Path) -> None:
    _, _, sampling = parse_run_metadata(read_json(folder / "meta.json"), str(folder))
    sampling.to_dict()


def make_checkpoints(folder: Path) -> None:
    import jax.numpy as jnp
    import optax

    from gadjax.checkpoints.checkpoint import Checkpoints
    from gadjax.training.config import write_json
    from gadjax.training.state import create_state

    write_json(config(), folder / "config.json")
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        state = create_state({"student": {"a": jnp.ones(step + 3)}}, {"student": optax.sgd(1e-3)})
        state = state._replace(step=jnp.int32(step), ema={"a": jnp.ones(3) * step})
        checkpoints.save(step, state, {"config": as_json(config()), "teacher": "a" * 32})
    checkpoints.close()


def make_report(folder: Path) -> None:
    metric = {"value": 0.5, "low": 0.25, "high": 0.75}
    row = {"label": "student, 4 steps", "evaluations": 4, "metrics": {"adherence": metric}}
    rows = {"teacher": row | {"metrics": {}}, "student": row}
    report = {"settings": {"student's transformer": "a" * 32}, "rows": rows}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "README.md").write_text("---\nlicense: openrail++\ntags:\n- a\n---\n# A teacher\n")


def read_for_card(folder: Path) -> None:
    license = read_license(folder)
    assert isinstance(license, str) and len(license) < 1 << 20
    lines = report_lines(report := read_report(folder / "report.json"))
    report.get("settings", {}).get("student's transformer")
    assert all(line.isprintable() and line.startswith("|") for line in lines)


def read_to_compare(folder: Path) -> None:
    text = comparison(read_reports([folder, folder / "report.json"]))
    assert all(line.isprintable() for line in text.split("\n"))


TARGETS = [
    *(
        Target(f"prompts-{suffix}", partial(make_prompts, suffix), partial(read_and_show, suffix))
        for suffix in ("txt", "jsonl", "csv")
    ),
    *(
        Target(f"images-{captions}", partial(make_images, captions), read_images)
        for captions in ("txt", "jsonl", "csv")
    ),
    Target("embeddings", make_embeddings, read_embeddings),
    Target("status", make_run, read_run),
    Target("resume", make_run, read_to_resume),
    Target("meta", make_meta, read_meta),
    Target("checkpoints", make_checkpoints, read_trained),
    Target("report", make_report, read_for_card),
    Target("compare", make_report, read_to_compare),
]
