"""Named extractors and scorers in an evaluation, on a tiny pipeline and a tiny CLIP."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_clip import write_clip

from gadjax.cli.evaluate import reduced_size
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.evaluation import draw
from gadjax.evaluation.draw import reduce_pictures, reduction
from gadjax.evaluation.evaluate import evaluate
from gadjax.evaluation.frechet import frechet
from gadjax.evaluation.learned import LearnedOutputs, Observer
from gadjax.evaluation.learned_metrics import describe_learned, learned_metrics
from gadjax.evaluation.oracles import World
from gadjax.evaluation.protocols import PROTOCOLS
from gadjax.evaluation.results import EvaluationConfig
from gadjax.evaluation.set_metrics import Support, cmmd, kid, support_overlap
from gadjax.features.diversity import cosine_diversity, vendi
from gadjax.features.flags import load_named, parse_named, write_caches
from gadjax.formats.sampling_config import SamplingConfig
from gadjax.io.image_grid import to_uint8
from gadjax.pipelines.model import Model
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.pipelines.sampling import draw as draw_pictures
from gadjax.pipelines.sampling import initial_noise

PROMPTS = ["red circle", "blue square", "green"]
TEACHER = {"steps": 4, "guidance": 2.0, "length": 6}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_pipeline):
    return Model("teacher", *load_pipeline(tiny_pipeline), SamplingConfig(**TEACHER))


@pytest.fixture(scope="module")
def world(clip):
    features = [f"clip={clip}", f"cls={clip},vector=raw"]
    extractors, scorers = load_named(features, [f"clipscore={clip}", f"pickscore-x={clip}"])
    return World(features=extractors, scores=scorers)


@pytest.fixture(scope="module")
def evaluated(teacher, world):
    student = replace(teacher, sampling=SamplingConfig(2, None, 1.0, 6))
    config = EvaluationConfig(4, 0, 8, 0, 0, shared_noise=True)
    return evaluate(teacher, student, PROMPTS, world, config)


def values(row):
    return {name: metric.value for name, metric in row.metrics.items()}


@pytest.mark.slow
def test_every_metric_is_that_of_the_pictures(evaluated, teacher, world):
    """From the pictures in the rows, which are small enough to be kept as they are."""
    clip = world.features["clip"]
    first, _, student = evaluated.rows
    x, reference = (
        clip(row.images_PSHWC.reshape(-1, 16, 16, 3)).reshape(3, 4, -1) for row in (student, first)
    )
    latent = teacher.pipeline.latent
    noise = np.concatenate(
        [np.repeat(initial_noise(4 + s, 1, latent), len(PROMPTS), 0) for s in range(4)]
    )
    others = clip(to_uint8(draw_pictures(teacher, PROMPTS * 4, noise, batch=8)))
    flat = x.reshape(12, -1)
    metrics = values(student)
    diversity = cosine_diversity(x)
    expected = {
        "clip/diversity": diversity.mean(),
        "clip/diversity_ratio": diversity.mean() / cosine_diversity(reference).mean(),
        "clip/vendi@4": vendi(x).mean(),
        "clip/kid": kid(flat, others),
        "clip/cmmd": cmmd(flat, others),
        "clip/cmmd_v": cmmd(flat, others, unbiased=False),
        "clip/recall": support_overlap(others, flat).recall,
        "clip/coverage": support_overlap(others, flat).coverage,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    scorer = world.scores["clipscore"]
    scores = [scorer(x[p], [text] * 4) for p, text in enumerate(PROMPTS)]
    before = [scorer(reference[p], [text] * 4) for p, text in enumerate(PROMPTS)]
    assert metrics["clipscore/score"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert metrics["clipscore/win_rate"] == pytest.approx(np.mean(np.array(scores) > before))
    scale = np.exp(3.0)
    assert metrics["pickscore-x/score"] == pytest.approx(scale * np.mean(scores), rel=1e-4)
    assert "cls/cmmd" not in evaluated.catalogue and "cls/kid" in metrics


def test_set_distances_have_no_interval(evaluated):
    for row in evaluated.rows:
        for name, metric in row.metrics.items():
            key = name.split("/")[-1]
            if key in ("kid", "cmmd", "cmmd_v", *Support._fields):
                assert metric.low is None and metric.high is None, name
            elif "/" in name:
                assert metric.low <= metric.value <= metric.high, name


def test_absent_metrics_have_reasons(evaluated):
    taken = {name for row in evaluated.rows for name in row.metrics}
    named = {name for name, metric in evaluated.catalogue.items() if metric.group == "learned"}
    assert named <= taken | evaluated.absent.keys()
    assert evaluated.absent["clip/frechet"] == "12 pictures; takes more than the 20 features"
    first = evaluated.rows[0]
    assert not any(name.endswith(("_ratio", "/win_rate")) for name in first.metrics)
    assert "clip/kid" in first.metrics  # the floor


def test_a_student_that_is_its_teacher(evaluated, teacher, world):
    same = evaluate(
        teacher, teacher, PROMPTS, world, EvaluationConfig(4, 0, 8, 0, 0, shared_noise=True)
    ).rows[2]
    metrics = values(same)
    for name in ("clip/alignment", "clip/cosine", "clip/diversity_ratio"):
        assert metrics[name] == pytest.approx(1, abs=1e-5)
    assert metrics["clipscore/win_rate"] == 0.5
    for name in ("clip", "pixels_16"):
        assert metrics[f"{name}/seed_probe"] == metrics[f"{name}/seed_probe_teacher"]
        assert values(evaluated.rows[0])[f"{name}/seed_probe"] == metrics[f"{name}/seed_probe"]


def test_noise_of_the_seed_probe_is_shared(evaluated, teacher, world):
    """And without it there is no probe, since noises of prompts differ."""
    latent = teacher.pipeline.latent
    alone = draw_pictures(teacher, ["blue square"], initial_noise(2, 1, latent))
    shared = evaluated.rows[0].images_PSHWC[1, 2]
    np.testing.assert_allclose(shared.astype(int), to_uint8(alone[0]), atol=1)
    observer = Observer(world, {"own": (PROMPTS * 2, None)}, 2)
    images = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    observer(0, images)
    assert observer.outputs().low_pass_PSD is None


def test_batches_across_sets(world):
    """Sets that begin within a batch, and one that is not measured."""
    sets = {"own": (PROMPTS * 2, None), "near": (["x"] * 3, None), "others": (PROMPTS * 2, None)}
    images = np.random.default_rng(0).uniform(-1, 1, (15, 16, 16, 3)).astype(np.float32)
    outputs = []
    for batch in (15, 4):
        observer = Observer(world, sets, 2, True)
        for start in range(0, 15, batch):
            observer(start, images[start : start + batch])
        outputs.append(observer.outputs())
    for name in ("clip", "cls"):
        for part in ("features", "others"):
            a, b = (getattr(output, part)[name] for output in outputs)
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
    features = world.features["clip"](to_uint8(images[9:]))
    scale = np.abs(features).max()
    np.testing.assert_allclose(outputs[0].others["clip"][1, 1], features[4], atol=1e-5 * scale)
    assert outputs[1].scores["clipscore"].shape == (3, 2)


def test_enough_pictures_have_a_frechet_distance(world):
    """The teacher's is the floor; neither has an interval."""
    rng = np.random.default_rng(0)
    x, others = rng.standard_normal((2, 5, 8, 20))
    few = World(features={"clip": world.features["clip"]})
    teacher = LearnedOutputs({"clip": x}, {}, {"clip": others})
    student = LearnedOutputs({"clip": x + 1}, {}, {})
    flat, reference = x.reshape(40, 20), others.reshape(40, 20)
    for row, expected in ((teacher, flat), (student, flat + 1)):
        metric = learned_metrics(row, teacher, few)["clip/frechet"]
        assert metric == (pytest.approx(frechet(expected, reference)), None, None)


def test_pictures_that_are_kept_are_reduced(monkeypatch):
    assert reduction(1536, 32, 32) == 1
    assert reduction(1536, 1024, 1024) == 2
    assert reduction(10**9, 24, 40) == 8  # as far as both sides allow
    x = np.arange(2 * 4 * 8 * 3, dtype=np.float32).reshape(2, 4, 8, 3)
    blocks = x.reshape(2, 2, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(reduce_pictures(x, 2), blocks)
    assert reduce_pictures(x, 1) is x


@pytest.mark.slow
def test_large_pictures_are_seen_at_their_size(teacher, world, monkeypatch):
    """Features of the full pictures, while reduced ones stay in memory."""
    config = EvaluationConfig(2, 0, 8, 0, 0, strips=0)
    evaluation = evaluate(teacher, teacher, PROMPTS, world, config)
    assert reduced_size(evaluation, teacher) == {}
    first = evaluation.rows[0]
    # Of three rows, at two seeds and as many perturbed ones.
    monkeypatch.setattr(draw, "KEPT_BYTES", 3 * 2 * 2 * 3 * 8 * 8 * 3)
    evaluation = evaluate(teacher, teacher, PROMPTS, world, config)
    (text,) = reduced_size(evaluation, teacher).values()
    assert text.startswith("of means of 2 x 2 pixels")
    again = evaluation.rows[0]
    assert again.images_PSHWC.shape == (3, 2, 8, 8, 3)
    for name, metric in first.metrics.items():
        if "/" in name:
            assert again.metrics[name] == metric, name


@pytest.mark.slow
def test_a_second_run_reads_the_cache(clip, teacher, tmp_path, monkeypatch):
    config = EvaluationConfig(2, 0, 8, 0, 0)
    reports = []
    for run in range(2):
        features, scores = load_named([f"clip={clip}"], [f"clipscore={clip}"], tmp_path / "cache")
        if run:
            fail = lambda *_: pytest.fail("computed again")  # noqa: E731
            monkeypatch.setattr(type(features["clip"]), "compute", fail)
        world = World(features=features, scores=scores)
        reports.append(evaluate(teacher, teacher, PROMPTS, world, config))
        write_caches(features, scores)
    assert values(reports[0].rows[2]) == values(reports[1].rows[2])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_flags():
    assert parse_named("--features", "a.1=/x=y,vector=raw,recipe=dgm") == (
        "a.1",
        Path("/x=y"),
        {"vector": "raw", "recipe": "dgm"},
    )
    for text in ("a", "=x", "a=", "a b=x", "a|b=x", "a/b=x", "<b>=x", "a=,vector=raw"):
        with pytest.raises(InputError, match="--features: found .*expected NAME=FOLDER"):
            parse_named("--features", text)


def test_names_are_given_once(clip, tmp_path):
    with pytest.raises(InputError, match="--features: found the name a twice"):
        load_named([f"a={clip}", f"a={clip}"], [])
    with pytest.raises(InputError, match="--scores: found the name clipscore twice"):
        load_named([f"clipscore={clip}"], [f"clipscore={clip}"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--feature-cache: found the file"):
        load_named([f"a={clip}"], [], tmp_path / "file")
    with pytest.raises(InputError, match="--scores clipscore: found a vector"):
        load_named([], [f"clipscore={clip},vector=raw"])


def test_protocols(world):
    plan = PROTOCOLS["dpdmd"].apply(EvaluationConfig(2, 3, 8, 5, 4))
    assert plan == EvaluationConfig(9, 0, 8, 0, 0, shared_noise=False)
    missing = PROTOCOLS["dpdmd"].missing(world.features, world.scores)
    assert missing == ["DINOv3 diversity (--features NAME=FOLDER, dinov3 pooled)"]
    with pytest.raises(InputError, match="--protocol: found no folder for it; expected DINOv3"):
        PROTOCOLS["dpdmd"].missing({}, {})
    assert PROTOCOLS["gad"].apply(plan).shared_noise
    lines = describe_learned(world)
    assert lines["features cls"].startswith("clip raw; CLIPImageProcessor; shorter side to 24")
    assert "0 prompts were truncated" in lines["scores clipscore"]


@pytest.fixture(scope="module")
def folders(tiny_pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    for name, sampling in (("teacher", TEACHER), ("student", TEACHER | {"steps": 2})):
        shutil.copytree(tiny_pipeline, root / name)
        (root / name / "gadjax.json").write_text(json.dumps(sampling))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def command(folders, out, *more):
    given = {name: folders / name for name in ("teacher", "student")}
    given |= {"prompts": folders / "prompts.txt", "out": out}
    return ["evaluate", *(f"--{key}={value}" for key, value in given.items()), *more]


@pytest.mark.slow
def test_the_command(folders, clip, tmp_path, capsys):
    imported = tmp_path / "external.json"
    result = {"metric": "GenEval", "version": "16f1681", "row": "student", "value": 0.5, "n": 4}
    imported.write_text(json.dumps(result))
    more = f"--features=cls={clip},vector=raw", f"--scores=pickscore={clip}", "--protocol=dpdmd"
    more += f"--feature-cache={tmp_path / 'cache'}", f"--import={imported}", "--json"
    assert main(command(folders, tmp_path / "out", *more)) == 0
    report = json.loads(capsys.readouterr().out)
    student = report["rows"]["student"]["metrics"]
    assert {"cls/vendi@9", "cls/diversity_ratio", "pickscore/win_rate"} <= student.keys()
    assert student["external/GenEval"]["value"] == 0.5
    settings = report["settings"]
    assert settings["seeds"] == 9 and settings["protocol"].startswith("dpdmd: DP-DMD")
    assert settings["protocol, not measured"].startswith("DINOv3 diversity")
    assert "fingerprint" in settings["features cls"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Named extractors and scorers" in text and "## Outside scripts" in text
    summary = text.split("## ")[0]
    assert "| cls: 1 - cosine / teacher's |" in summary and "win rate" in summary
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--features=x=/nowhere",), "/nowhere: found no such folder"),
        (("--features=x",), "--features: found 'x'"),
        (("--scores=hpsv2=/x",), "--scores hpsv2: its weights"),
        (("--protocol=coco",), "--protocol: found 'coco'; expected one of dpdmd, gad"),
        (("--protocol=gad",), "--protocol: found no folder for it"),
        (("--import=/nowhere.json",), "/nowhere.json: found"),
    ],
)
def test_bad_flags(folders, tmp_path, capsys, more, message):
    assert main(command(folders, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
