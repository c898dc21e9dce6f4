"""Signals of previews and their alarms: values rewritten, bands, state of a resumed run."""

import json
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny_clip import write_clip
from train_runs import train

from gadjax.cli.main import main
from gadjax.errors import InputError, RunStopped
from gadjax.features.open import open_extractor
from gadjax.runtime.progress import Progress
from gadjax.runtime.status import HEALTH, OF_TEACHER, parse_health, read_status, table
from gadjax.training.config import default_config
from gadjax.training.health import (
    BANDS,
    Band,
    Health,
    check_previews,
    earlier_rows,
    judge,
    report_alarms,
)
from gadjax.training.previews import Preview
from gadjax.training.signals import Drawn, compare, extract, measure, same_seed

PROMPTS, SEEDS = 3, 4


def drawn(seed: int, scale: float = 1.0) -> Drawn:
    rng = np.random.default_rng(seed)
    x0 = scale * rng.normal(0.3, 1, (PROMPTS, SEEDS, 8, 12, 5)).astype(np.float32)
    return Drawn(x0, rng.uniform(-1, 1, (PROMPTS, SEEDS, 16, 24, 3)).astype(np.float32))


def test_signals():
    """The definitions, written out picture by picture."""
    given = drawn(0)
    found = measure(given)
    x, pooled = given.x0_PSHWC.astype(np.float64).reshape(-1, 8, 12, 5), []
    for one in x:
        cells = one.reshape(4, 2, 4, 3, 5).mean((1, 3))
        pooled.append(cells - cells.mean((0, 1)))
    assert found["x0_rms"] == pytest.approx(np.sqrt((x**2).mean()))
    whole = sum(((one - one.mean((0, 1))) ** 2).mean() for one in x)
    share = sum((cells**2).mean() for cells in pooled) / whole
    assert found["low_band"] == pytest.approx(share) and 0.05 < share < 0.3
    cosines = []
    for p in range(PROMPTS):
        group = pooled[p * SEEDS : (p + 1) * SEEDS]
        for i in range(SEEDS):
            for j in range(i):
                a, b = group[i].ravel(), group[j].ravel()
                cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert found["seed_similarity"] == pytest.approx(np.mean(cosines))
    levels = np.rint((given.images_PSHWC.reshape(-1, 16, 24, 3) + 1) * 127.5)
    colours = levels / 255
    assert found["saturation"] == pytest.approx(np.mean(colours.max(3) - colours.min(3)))
    assert found["contrast"] == pytest.approx(np.mean([c.mean(2).std() for c in colours]))
    assert found["clipped"] == pytest.approx(np.mean((levels <= 1) | (levels >= 254)))


def test_same_seed_pair_by_pair():
    """Latents that share half of each noise's part with the teacher's."""
    rng = np.random.default_rng(3)
    prompt = rng.normal(size=(PROMPTS, 1, 8, 12, 5))
    x, y = (rng.normal(size=(PROMPTS, SEEDS, 8, 12, 5)) for _ in range(2))
    teacher, student = (prompt + z for z in (x, (x + y) / 2**0.5))
    flat = [z.reshape(PROMPTS * SEEDS, 8, 12, 5) for z in (student, teacher)]
    same, other = [], []
    for i, a in enumerate(flat[0]):
        for j, b in enumerate(flat[1]):
            a, b = (z - z.mean((0, 1)) for z in (a, b))
            if i // SEEDS == j // SEEDS:
                cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
                (same if i == j else other).append(cosine)
    expected = (np.mean(same) - np.mean(other)) / (1 - np.mean(other))
    found = same_seed(*(Drawn(z, np.zeros(())) for z in (student, teacher)))
    assert found == pytest.approx(expected) and 0.6 < found < 0.8


def test_extremes():
    given = drawn(1)
    alike = given.x0_PSHWC[:, :1].repeat(SEEDS, 1)
    # Alike but for a colour and a scale of their own: the layout is the same.
    factors = np.arange(1, SEEDS + 1).reshape(1, SEEDS, 1, 1, 1)
    alike = factors * alike + factors
    grey = np.full_like(given.images_PSHWC, 1.0)
    found = measure(Drawn(alike, grey))
    assert found["seed_similarity"] == pytest.approx(1)
    assert (found["saturation"], found["contrast"], found["clipped"]) == (0, 0, 1)
    assert same_seed(given, Drawn(2 * given.x0_PSHWC + 5, grey)) == pytest.approx(1)
    assert abs(same_seed(given, drawn(2))) < 0.1
    # One picture for all noises of a prompt: no more like the teacher's of one than of another.
    assert same_seed(Drawn(alike, grey), given) == pytest.approx(0, abs=1e-9)
    one = Drawn(*(x[:, :1] for x in given[:2]), np.ones((PROMPTS, 1, 2)))
    assert not {"seed_similarity", "vendi"} & measure(one).keys() and compare(one, one) == {}
    still = Drawn(np.zeros_like(given.x0_PSHWC), grey)  # no division by zero
    assert all(np.isfinite(value) for value in measure(still).values())


def test_signals_by_features():
    """Of prompts whose noises give 1, 2 and 4 different pictures, all as the teacher's but two."""
    given, axes = drawn(0), np.eye(4)
    teacher = np.stack([axes, axes[[0, 0, 1, 1]], axes[[2] * 4]])
    student = teacher.copy()
    student[0, :2] = axes[[1, 0]]
    by_name = measure(given._replace(features_PSD=teacher))
    assert by_name["vendi"] == pytest.approx((4 + 2 + 1) / 3)
    found = compare(*(given._replace(features_PSD=x) for x in (student, teacher)))
    # Two of four; then all, of which each is as near to a second one, or to all four.
    assert found["alignment"] == pytest.approx((2 / 4 + 1 / 2 + 1 / 4) / 3)
    assert found["same_seed"] == pytest.approx(1)
    assert not {"vendi", "alignment"} & {*measure(given), *compare(given, given)}
    broken = given._replace(features_PSD=np.where(student == 1, np.nan, student))
    assert np.isnan(measure(broken)["vendi"]) and np.isnan(compare(broken, broken)["alignment"])


def test_features_are_those_of_the_pictures(tmp_path):
    """A folder of CLIP that transformers wrote, by transformers; NaN for a broken picture alone."""
    model, processor, _ = write_clip(tmp_path)
    extractor = open_extractor("clip", tmp_path)
    images = drawn(0).images_PSHWC
    images[1, 2, 0, 0, 0] = np.nan
    found = extract(extractor, images)
    levels = np.rint((images.reshape(-1, 16, 24, 3) + 1) * 127.5)
    inputs = dict(processor(list(np.nan_to_num(levels).astype(np.uint8)), return_tensors="pt"))
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(**inputs).pooler_output).numpy()
    is_nan = np.isnan(found).all(-1)
    assert np.argwhere(is_nan).tolist() == [[1, 2]] and np.isnan(found).sum() == found.shape[-1]
    expected = expected.reshape(found.shape)
    np.testing.assert_allclose(
        found[~is_nan], expected[~is_nan], atol=1e-5 * np.abs(expected).max()
    )


def test_bands():
    share, above = Band(0.2, least=0.1), Band(0.1, sides=1)
    for value, teacher, expected in ((2.8, 2, 2), (1.2, 2, 2), (0.09, 0.05, 2), (0.01, 0.05, 2)):
        assert share.distance(value, teacher) == pytest.approx(expected)
    assert above.distance(0.7, 0.5) == pytest.approx(2) and above.distance(0.1, 0.5) == 0
    assert BANDS["same_seed"].distance(0.6, 1) == pytest.approx(1)
    assert Band(0.2, least=0.1, sides=-1, floor=1.0).distance(2, 3) == pytest.approx(2.5)


def rms_of(scales, workdir, done=0, first=0):
    """Rows and alarms of previews whose latents are the teacher's, scaled."""
    health = Health(earlier_rows(workdir, done), drawn(0))
    out = []
    for number, scale in enumerate(scales, first):
        row = health(number, drawn(0, scale))
        out.append((row["x0_rms"] / row["x0_rms" + OF_TEACHER], row["alarms"]))
    return out


def test_an_alarm_is_a_band_beyond_the_best(tmp_path):
    """In widths of the band: 3 (outside from the start), 2, 1, 1.9, 2.1, 0, 1.1."""
    widths = np.array([3, 2, 1, 1.9, 2.1, 0, 1.1])
    found = rms_of(1 + widths * BANDS["x0_rms"].width, tmp_path)
    alarms = [alarms for _, alarms in found]
    assert alarms == [[], [], [], [], ["x0_rms"], [], ["x0_rms"]]


def test_stronger_guidance_is_judged_beside_the_teachers_own():
    """At every preview, for the run keeps its guidance: outside of the band alone."""
    width = BANDS["x0_rms"].width
    for stretch, alarms in ((1 + 0.9 * width, []), (1 + 1.1 * width, ["guidance/x0_rms"])):
        health = Health([], drawn(0, stretch), drawn(0))
        for step in range(2):
            row = health(step, drawn(0, stretch))
            assert row["alarms"] == alarms == judge(row, {})
        assert row["guidance/x0_rms"] == pytest.approx(stretch * row["guidance/x0_rms_teacher"])
    notes = []
    report_alarms(row, [], (), notes.append)
    assert len(notes) == 1 and notes[0].startswith("step 1: guidance/x0_rms is ")


def test_state_is_the_rows_of_before(tmp_path):
    scales = [1.0, 1.0, 1.3]
    whole = rms_of(scales, tmp_path)
    assert whole[-1][1] == ["x0_rms"]
    health = Health([], drawn(0))
    rows = [json.dumps(health(number, drawn(0, scale))) for number, scale in enumerate(scales)]
    noise = ["not JSON", "[]", '{"step": "x"}', '{"step": 0, "x0_rms": "NaN", "alarms": 3}']
    (tmp_path / HEALTH).write_text("\n".join([*noise, *rows]) + "\n")
    assert rms_of(scales[2:], tmp_path, done=2, first=2) == whole[2:]
    # Without the rows before it, the third preview is the first one.
    assert rms_of(scales[2:], tmp_path, done=0, first=2)[0][1] == []
    assert parse_health(noise[-1]) == {"step": 0, "alarms": []}


def test_not_finite_pictures_are_an_alarm():
    health = Health([], drawn(0))
    broken = drawn(0)
    broken.x0_PSHWC[0, 3] = np.nan
    row = health(0, broken)
    assert row["x0_rms"] is None and {"x0_rms", "same_seed", "low_band"} <= set(row["alarms"])
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    notes = []
    report_alarms(row, ["low_band"], (), notes.append)
    assert any(n.startswith("step 0: x0_rms is not finite, the teacher's 1.0") for n in notes)
    assert len(notes) == len(row["alarms"]) - 1
    with pytest.raises(RunStopped, match="x0_rms is not finite.*preview.stop_when"):
        report_alarms(row, row["alarms"], ("x0_rms",), notes.append)
    # Without a teacher there are values and no alarms.
    row = Health([])(0, broken)
    assert row["alarms"] == [] and "same_seed" not in row


def test_a_collapse_in_features_is_an_alarm():
    """One picture for all noises of a prompt, by features alone."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(PROMPTS, SEEDS, 16))
    teacher = drawn(0)._replace(features_PSD=features)
    health = Health([], teacher)
    assert health(0, teacher)["alarms"] == []
    collapsed = teacher._replace(features_PSD=features[:, :1].repeat(SEEDS, 1))
    row = health(1, collapsed)
    assert row["alarms"] == ["vendi", "alignment"]
    assert row["vendi"] == pytest.approx(1) and row["alignment_teacher"] == 1
    row = health(2, teacher._replace(features_PSD=features * np.nan))
    assert row["vendi"] is None and row["alarms"] == ["vendi", "alignment"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "preview.seeds: found 0"),
        ({"prompts": 0}, "preview.prompts: found 0"),
        ({"stop_when": ("x",)}, "preview.stop_when: found 'x'; expected one of seed_similarity"),
        ({"stop_when": ("x0_rms",), "every": 0}, "found signals without previews"),
        ({"stop_when": ("seed_similarity",), "seeds": 1}, "preview.seeds: found 1"),
        ({"stop_when": ("vendi",)}, "preview.features: found nothing; expected .* for vendi"),
        ({"features": "/nowhere"}, "preview.features: found '/nowhere', which is not there"),
    ],
)
def test_bad_configs(changes, message):
    preview = default_config().preview
    check_previews(preview)
    preview.update(changes)
    with pytest.raises(InputError, match=message):
        check_previews(preview)


def test_a_preview_is_shown_measured_and_judged(tmp_path, capsys):
    """Sheet, row, alarm and stop of previews whose pictures are given."""
    config = default_config()
    preview = Preview.__new__(Preview)
    preview.teacher, preview.per_prompt, preview.scale = drawn(0), 2, 1
    preview.folder, preview.tolerate_errors, preview.stop_when = tmp_path, False, ()
    preview.draw = lambda scale: drawn(0, scale)
    preview.health = Health([], preview.teacher)
    with Progress(tmp_path, config) as preview.progress:
        for step, scale in enumerate((1.0, 1.3, 1.3)):
            preview.show(SimpleNamespace(ema=scale), step)
        preview.stop_when = ("x0_rms",)
        with pytest.raises(RunStopped, match="step 3: x0_rms is"):
            preview.show(SimpleNamespace(ema=1.3), 3)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"000000{n}.png" for n in range(4)
    ]
    assert [row["alarms"] for row in rows_of(tmp_path)] == [[], *[["x0_rms"]] * 3]
    log = (tmp_path / "train.log").read_text()
    assert log.count("ALARM") == 1 and "step 1: x0_rms is 1.3" in log
    assert table(read_status_of(tmp_path)).count("ALARM at step 3: x0_rms") == 1


def read_status_of(workdir):
    (workdir / "config.json").write_text(json.dumps({"steps": 4, "batch": 1}))
    return read_status(workdir)


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / HEALTH).read_text().splitlines()]


FLAGS = ("--config.preview.every=1", "--config.preview.prompts=2", "--config.preview.seeds=2")


@pytest.mark.slow
def test_a_run_and_its_resumption(config, tmp_path, capsys):
    """Rows of a resumed run are those of one that was not interrupted; the status shows them."""
    whole, parts, clip = tmp_path / "whole", tmp_path / "parts", tmp_path / "clip"
    write_clip(clip)
    variant, flags = f"{config}:regression", (*FLAGS, f"--config.preview.features={clip}")
    assert train(variant, whole, *flags) == 0
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {f"{name}{OF_TEACHER}" for name in BANDS} <= set(rows[0])
    assert 1 < rows[0]["vendi"] <= 2 and rows[0]["alignment_teacher"] == 1
    assert "preview.features: clip projected; CLIP" in (whole / "train.log").read_text()
    assert train(variant, parts, *flags, "--config.steps=2") == 0
    assert train(variant, parts, *flags) == 0
    assert rows_of(parts) == rows
    capsys.readouterr()
    assert main(["status", str(whole)]) == 0
    text = capsys.readouterr().out
    for name in ("x0_rms", "vendi"):
        value, of_teacher = (rows[-1][f"{name}{end}"] for end in ("", OF_TEACHER))
        assert f"{name} {value:.4g} (teacher {of_teacher:.4g})" in text
    assert "ALARM" not in text


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "bert"}'])
def test_a_bad_extractor_ends_the_run_before_it_begins(config, tmp_path, capsys, content):
    folder, workdir = tmp_path / "folder", tmp_path / "run"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    flags = (*FLAGS, f"--config.preview.features={folder}")
    with patch("gadjax.training.loop.compile_steps", side_effect=AssertionError):
        assert train(f"{config}:regression", workdir, *flags) == 2
    error = capsys.readouterr().err
    assert "preview.features: " in error and str(folder) in error and error.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.slow
def test_an_alarm_stops_the_run_where_it_was_asked_for(config, tmp_path, capsys):
    """A learning rate that destroys the student at once."""
    broken = ("--config.optim.lr=0.2", "--config.ema=0.0", "--config.checkpoint.every=1")
    flags = (f"{config}:regression", tmp_path / "run", *FLAGS, *broken)
    assert train(*flags) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    judged = [row["step"] for row in rows_of(tmp_path / "run") if "same_seed" in row["alarms"]]
    logged = [line for line in log.splitlines() if "same_seed is " in line and "ALARM" in line]
    assert len(judged) > 1 and len(logged) == 1  # once, until it is back
    flags = (flags[0], tmp_path / "stopped", *flags[2:])
    assert train(*flags, "--config.preview.stop_when=('same_seed',)") == 3
    status = json.loads((tmp_path / "stopped" / "status.json").read_text())
    assert status["status"] == "stopped" and "same_seed is" in status["reason"]
    assert rows_of(tmp_path / "stopped")[-1]["alarms"]
