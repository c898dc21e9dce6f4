"""Repairs of a student of the tiny pipeline, from the command to the files that they leave."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from workdirs import make_workdir

from gadjax import load
from gadjax.cli.main import main
from gadjax.errors import InputError
from gadjax.evaluation.metric_catalogue import catalogue
from gadjax.evaluation.oracles import WORLDS
from gadjax.evaluation.results import EvaluationConfig
from gadjax.formats.diffusers_folder import INDEX
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.sampling_config import GADJAX_JSON, SamplingConfig
from gadjax.formats.scheduler_config import student_scheduler_config
from gadjax.pipelines.adapted import adapted_model
from gadjax.pipelines.sampling import draw, initial_noise
from gadjax.repair.comparison import MEASURED, write_comparison
from gadjax.repair.patient import Patient, open_patient
from gadjax.repair.repair import Request, repair_config
from gadjax.training.checks import validate
from gadjax.training.export import export, scheduler_and_sampling
from gadjax.training.workdir import Trained, read_trained

TIMES = (899.0, 449.0)
SMALL = "--count=2", "--seeds=2", "--tangents=1", "--library=0", "--updates=2"
CHEAP = (
    "--config.objective.regression.steps=1",
    "--config.objective.gad.steps=1",
    "--config.objective.anchor.steps=1",
    "--config.batch=4",
    "--config.student.lora.rank=2",
)


@pytest.fixture(scope="module")
def student(tiny_pipeline, tmp_path_factory):
    """A student's pipeline folder, exported from a workdir."""
    folder = tmp_path_factory.mktemp("students")
    run = make_workdir(folder / "run", tiny_pipeline, timesteps=TIMES, student={"steps": 2})
    export(read_trained(run), folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("red circle\ngreen square\nblue circle\n")
    return path


def repair(teacher, student, prompts, out, *more, cheap=CHEAP):
    flags = f"--teacher={teacher}", f"--student={student}", f"--prompts={prompts}", f"--out={out}"
    return main(["repair", *flags, *SMALL, *cheap, *more])


@pytest.fixture(scope="module")
def repaired(tiny_pipeline, student, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("repairs") / "out"
    assert repair(tiny_pipeline, student, prompts, out) == 0
    return out


def pictures(model):
    return draw(model, ["red circle"] * 2, initial_noise(3, 2, model.pipeline.latent))


@pytest.mark.slow
def test_what_a_repair_leaves(repaired, student, tiny_pipeline):
    names = {path.name for path in repaired.iterdir()}
    assert names == {"train", "lora", "repair.json", "repair.md", "before_after.png", "scales.png"}
    report = json.loads((repaired / "repair.json").read_text())
    assert report["student"] == "student" and report["updates"] == 2 and report["rank"] == 2
    assert {"student before", "student after"} < report["rows"].keys()
    card = (repaired / "lora" / "README.md").read_text()
    text = (repaired / "repair.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert table in card and card.count("## Before and after") == 1


@pytest.mark.slow
def test_the_training_is_on_the_student_and_against_the_teacher(repaired, student, tiny_pipeline):
    """Whose own weights, steps and settings it has; only adapters are trained."""
    trained = read_trained(repaired / "train")
    assert trained.base == student and trained.teacher == tiny_pipeline
    assert trained.sampling.timesteps == TIMES and trained.lora.rank == 2
    assert trained.config["guidance"] == 3.0  # of the student's own distillation
    assert set(trained.config["objective"]) == {"regression", "gad", "anchor", "tether"}
    inputs = json.loads((repaired / "train" / "inputs.json").read_text())
    assert {"student.init", "teacher", "data.prompts"} <= inputs.keys()


def test_the_tables_metrics_exist():
    assert set(MEASURED) <= catalogue(WORLDS["shapes"]).keys()
    assert len(set(MEASURED)) == len(MEASURED)


@pytest.mark.slow
def test_the_lora_on_the_student_draws_as_the_run(repaired, student):
    """At scale 1; at 0 as the student before."""
    before, run = load(str(student)), load(str(repaired / "train"))
    at = {s: adapted_model(student, [(repaired / "lora", s)]) for s in (0.0, 1.0)}
    np.testing.assert_allclose(pictures(at[1.0]), pictures(run), atol=1e-4)
    np.testing.assert_allclose(pictures(at[0.0]), pictures(before), atol=1e-5)
    assert np.abs(pictures(run) - pictures(before)).max() > 1e-3


@pytest.mark.slow
def test_a_finished_repair_is_left_as_it_is(repaired, student, prompts, tiny_pipeline, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in repaired.rglob("*")}
    assert repair(tiny_pipeline, student, prompts, repaired) == 0
    assert "already done" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in repaired.rglob("*")}


@pytest.mark.slow
def test_a_student_that_adds_noise_is_repaired_as_it_draws(tiny_pipeline, prompts, tmp_path):
    """With new noise after each step, before and after; diffusers draws the LoRA on it with that
    noise and the scheduler that it has."""
    settings = {"steps": 2, "rollout": "fresh_noise"}
    run = make_workdir(tmp_path / "run", tiny_pipeline, timesteps=TIMES, student=settings)
    student, out = tmp_path / "student", tmp_path / "out"
    export(read_trained(run), student)
    cheap = [flag for flag in CHEAP if "anchor" not in flag]  # which such a student cannot have
    assert repair(tiny_pipeline, student, prompts, out, "--config.optim.lr=0.03", cheap=cheap) == 0
    trained = read_trained(out / "train")
    assert trained.config["student"]["rollout"] == trained.sampling.rollout == "fresh_noise"
    assert trained.base == student and trained.sampling.timesteps == TIMES
    assert {"regression", "tether"} < trained.config["objective"].keys()
    index = json.loads((student / INDEX).read_text())
    assert index["scheduler"][1] == "LCMScheduler" and not (out / "lora" / "scheduler").exists()
    export(trained, tmp_path / "merged")
    for folder in (out / "lora", tmp_path / "merged"):
        verified = json.loads((folder / GADJAX_JSON).read_text())["verified"]
        assert verified["max_difference"] <= 1e-4
    at = {s: pictures(adapted_model(student, [(out / "lora", s)])) for s in (0.0, 1.0)}
    np.testing.assert_allclose(at[1.0], pictures(load(str(out / "train"))), atol=1e-4)
    np.testing.assert_allclose(at[0.0], pictures(load(str(student))), atol=1e-5)
    assert np.abs(at[1.0] - at[0.0]).max() > 1e-3
    report = json.loads((out / "repair.json").read_text())
    assert {"student before", "student after"} < report["rows"].keys()


def test_a_start_that_adds_noise_keeps_its_scheduler(tiny_pipeline):
    """In an export; the teacher's, which adds none, is replaced."""
    plain = open_folder(tiny_pipeline, components=())
    lcm = student_scheduler_config(plain.scheduler, TIMES, rollout="fresh_noise")
    noisy = replace(plain, scheduler=lcm)
    sampling = SamplingConfig(2, TIMES, 1.0, 8, rollout="fresh_noise")
    trained = Trained(tiny_pipeline, 1, "ema", {}, {}, "", sampling, on_start=True)
    assert scheduler_and_sampling(trained, noisy) == (None, sampling)
    assert scheduler_and_sampling(trained, plain) == (lcm, sampling)
    for other in (
        replace(trained, on_start=False),
        replace(trained, sampling=replace(sampling, rollout="ode")),
    ):
        with pytest.raises(InputError, match="found 'LCMScheduler'; expected one with determin"):
            scheduler_and_sampling(other, noisy)


def test_tcds_steps_are_refused(tiny_pipeline, student, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    betas = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    path.write_text(json.dumps(betas | {"_class_name": "TCDScheduler"}))
    index = json.loads((folder / INDEX).read_text()) | {"scheduler": ["diffusers", "TCDScheduler"]}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="found TCDScheduler; expected LCMScheduler or one of"):
        open_patient(str(folder), tiny_pipeline, tmp_path / "unused")


def interrupted(*_):
    raise RuntimeError("stopped")


def test_the_report_is_written_last(tmp_path, monkeypatch):
    row = SimpleNamespace(label="x", metrics={}, images_PSHWC=np.zeros((1, 1, 4, 4, 3), np.uint8))
    given = tmp_path, SimpleNamespace(catalogue={}), {"x": row}, ["a"], {}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("gadjax.repair.comparison.save_png", interrupted)
        write_comparison(*given)
    assert not list(tmp_path.iterdir())
    write_comparison(*given)
    assert {p.name for p in tmp_path.iterdir()} == {"repair.json", "repair.md", "before_after.png"}


@pytest.mark.slow
def test_a_repair_without_its_report_only_measures_again(
    repaired, student, prompts, tiny_pipeline, tmp_path, monkeypatch
):
    """The report is written last: without one of the other files there is none."""
    out = tmp_path / "out"
    shutil.copytree(repaired, out)
    for name in ("repair.json", "repair.md", "before_after.png", "scales.png"):
        (out / name).unlink()
    card = (out / "lora" / "README.md").read_text()
    (out / "lora" / "README.md").write_text(card.partition("## Before and after")[0])
    for stage in ("gadjax.repair.repair.write_scales", "gadjax.repair.comparison.save_png"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(stage, interrupted)
            repair(tiny_pipeline, student, prompts, out)
        assert not (out / "repair.json").exists() and not (out / "repair.md").exists()
    assert repair(tiny_pipeline, student, prompts, out) == 0
    for name in ("repair.json", "repair.md", "lora/README.md"):
        assert (out / name).read_text() == (repaired / name).read_text()
    for name in ("before_after.png", "scales.png"):
        assert (out / name).read_bytes() == (repaired / name).read_bytes()


@pytest.mark.slow
def test_another_start_is_refused_at_the_export(repaired, student, tmp_path):
    """Adapters belong to the weights that they were trained on."""
    trained = read_trained(repaired / "train")
    other = tmp_path / "other"
    shutil.copytree(trained.teacher, other)
    with pytest.raises(InputError, match="with which the run in .* was begun"):
        export(trained, tmp_path / "out", teacher=other)


@pytest.mark.slow
def test_the_merged_export_is_the_repaired_student(repaired, tmp_path):
    export(read_trained(repaired / "train"), tmp_path / "merged")
    model, run = load(str(tmp_path / "merged")), load(str(repaired / "train"))
    np.testing.assert_allclose(pictures(model), pictures(run), atol=1e-5)
    assert model.sampling.steps == 2


@pytest.mark.slow
def test_patients_of_other_kinds(student, repaired, tiny_pipeline, tmp_path):
    """A workdir and a LoRA are written as a pipeline folder, once."""
    run = make_workdir(tmp_path / "run", tiny_pipeline, timesteps=TIMES, student={"steps": 2})
    patient = open_patient(str(run), tiny_pipeline, tmp_path / "from_run")
    assert patient.folder == tmp_path / "from_run" and (patient.folder / INDEX).exists()
    assert patient.times == TIMES and patient.rollout == "ode" and patient.guidance == 3.0
    assert open_patient(str(run), tiny_pipeline, tmp_path / "from_run") == patient
    by_folder = open_patient(str(student), tiny_pipeline, tmp_path / "unused")
    assert by_folder.folder == student and not (tmp_path / "unused").exists()
    patient = open_patient(str(repaired / "lora"), tiny_pipeline, tmp_path / "from_lora")
    expected = adapted_model(tiny_pipeline, [(repaired / "lora", 1.0)])
    actual = load(str(patient.folder))
    same = map(np.allclose, *map(jax.tree.leaves, (actual.params, expected.params)))
    assert all(same) and patient.times == TIMES


def test_a_published_student_is_repaired_as_its_card_samples_it(tiny_pipeline, tmp_path):
    """A folder that does not say its steps is written once more, with the preset's."""
    given = str(tiny_pipeline), tiny_pipeline, tmp_path / "made"
    patient = open_patient(*given, "tdm-pixart")
    assert patient.folder == tmp_path / "made" and patient.rollout == "ode"
    assert patient.times == (899, 674, 449, 224) and patient.sampling.guidance == 1
    assert open_patient(*given, "tdm-pixart") == patient
    assert load(str(patient.folder)).fingerprint == load(str(tiny_pipeline)).fingerprint
    with pytest.raises(InputError, match="found a PixArtAlphaPipeline; expected a StableDiff"):
        open_patient(*given[:2], tmp_path / "other", "sid-sd")
    with pytest.raises(InputError, match="^--student-preset: found 'x'; expected one of"):
        open_patient(*given, "x")


def test_an_embedded_guidance_is_no_fault_and_is_trained_with(folders, prompts, tmp_path):
    """FLUX.1-dev's students are told a scale; the config has it."""
    flux = tmp_path / "flux"
    shutil.copytree(folders("flux_dev"), flux)
    (flux / GADJAX_JSON).write_text(json.dumps({"steps": 8, "guidance": 3.5}))
    patient = open_patient(str(flux), flux, tmp_path / "unused")
    assert patient.embedded == 3.5 and len(patient.times) == 8 and patient.times[0] == 1000
    request = Request(str(flux), "s", str(prompts), tmp_path, 7, None, 4, EvaluationConfig(), ())
    assert repair_config(request, patient).student.guidance == 3.5
    plain = Patient(flux, patient.sampling, TIMES, "ode", 3.5)
    assert repair_config(request, plain).student.guidance == 1


@pytest.mark.parametrize("family,guidance", [("flux_dev", 3.5), ("z_image", 6.0)])
def test_a_student_that_does_not_tell_is_repaired_at_its_teachers_guidance(
    folders, prompts, tmp_path, family, guidance
):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(folders(family), teacher)
    shutil.copytree(folders(family), student)
    (student / GADJAX_JSON).write_text(json.dumps({"steps": 4, "guidance": 1.0}))
    for expected in (guidance, 2.5):
        patient = open_patient(str(student), teacher, tmp_path / "unused")
        more = "--config.guidance=7.0"
        request = Request(
            str(teacher), "s", str(prompts), tmp_path, 7, None, 4, EvaluationConfig(), ()
        )
        assert repair_config(request, patient).guidance == patient.guidance == expected
        assert repair_config(replace(request, changes=(more,)), patient).guidance == 7
        (teacher / GADJAX_JSON).write_text(json.dumps({"guidance": 2.5}))


@pytest.mark.parametrize(
    "case,words",
    [
        ("teacher as student", "which is sampled at guidance 4.5; expected a distilled student"),
        ("nothing", "found no {tmp}/nothing; expected a pipeline folder, a workdir or a LoRA"),
        ("many steps", "which is sampled in 20 steps; expected a distilled student of at most 16"),
        ("files", "{tmp}/out: found files; expected a new folder, or that of a repair"),
        ("overlap", "found"),
        ("count", "--count: found 0; expected 1 or more"),
        ("preset", "--student-preset: found 'x'; expected one of"),
        ("key", "found no key 'nothing' to change"),
    ],
)
def test_bad_input_is_one_line_and_trains_nothing(
    case, words, student, tiny_pipeline, prompts, tmp_path, capsys
):
    out, patient, more = tmp_path / "out", student, ()
    if case == "teacher as student":
        patient = tiny_pipeline
    elif case == "nothing":
        patient = tmp_path / "nothing"
    elif case == "many steps":
        patient = tmp_path / "many"
        shutil.copytree(tiny_pipeline, patient)
        (patient / GADJAX_JSON).write_text(json.dumps({"guidance": 1.0}))
    elif case == "files":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif case == "overlap":
        out = student
    elif case == "count":
        more = ("--count=0",)
    elif case == "preset":
        more = ("--student-preset=x",)
    elif case == "key":
        more = ("--config.nothing=1",)
    assert repair(tiny_pipeline, patient, prompts, out, *more) == 2
    error = capsys.readouterr().err.strip()
    assert words.format(tmp=tmp_path) in error and "\n" not in error
    assert not (out / "train").exists()


@pytest.mark.parametrize("rollout", ["ode", "fresh_noise"])
def test_the_config_is_the_students(tiny_pipeline, student, prompts, tmp_path, rollout):
    """Its steps and walk; the request's updates and changes go before what is set by default."""
    sampling = SamplingConfig(2, TIMES, 1.0, 8)
    patient = Patient(student, sampling, TIMES, rollout, 3.0)
    plan = EvaluationConfig()

    def made(updates, *changes):
        request = Request(
            str(tiny_pipeline), "s", str(prompts), tmp_path, updates, None, 4, plan, changes
        )
        return repair_config(request, patient)

    config = made(7)
    assert tuple(config.student.timesteps) == TIMES and config.student.rollout == rollout
    assert config.guidance == 3.0 and config.data.length == 8 and config.optim.warmup == 0
    assert config.steps == config.optim.decay == 7
    settings = validate(config)
    assert not settings.objective.needs.critic
    assert ("anchor" in config.objective) == (rollout == "ode")
    changed = made(None, "--config.guidance=2.0", "--config.optim.decay=11")
    assert changed.guidance == 2.0 and changed.optim.decay == 11 and changed.steps == 600
