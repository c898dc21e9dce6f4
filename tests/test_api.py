"""Python API: the same students, images and folders as the commands."""

import json

import jax
import numpy as np
import pytest
from checkpoints import refused
from PIL import Image
from programs import run_python
from workdirs import make_workdir

import gadjax
from gadjax.cli.main import main
from gadjax.models.adapters import TARGETS
from gadjax.objectives import DMD, GAD, TERMS, Regression, Sum, as_config, build

PROMPTS = ["a red circle above a blue square", "green square"]
SMALL = {"batch": 2, "remat": "none", "data": {"length": 8}, "optim": {"lr": 1e-3}, "guidance": 3}


@pytest.fixture(scope="module")
def student(tiny_pipeline):
    """One update of a student in two steps, in memory."""
    teacher = gadjax.load(tiny_pipeline)
    return gadjax.distill(teacher, Regression(steps=1), PROMPTS, steps=2, updates=1, **SMALL)


def test_importing_is_instant():
    """Neither JAX nor any module of the package is imported before use."""
    code = (
        "import gadjax, sys; assert 'jax' not in sys.modules and 'numpy' not in sys.modules; "
        "assert 'distill' in dir(gadjax); assert gadjax.objectives.DMD and gadjax.load"
    )
    run_python("-c", code)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        gadjax.distil  # noqa: B018


def test_images_equal_those_of_the_command(tiny_pipeline, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(PROMPTS))
    flags = ["--model", str(tiny_pipeline), "--prompts", str(prompts), "--out", str(out)]
    assert main(["sample", *flags, "--seed", "5", "--steps", "2", "--guidance", "3"]) == 0
    model = gadjax.load(tiny_pipeline)
    images = gadjax.sample(model, PROMPTS, seed=5, steps=2, guidance=3.0)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 5
    for name, image in zip(("00000-0.png", "00001-0.png"), images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), image)
    np.testing.assert_array_equal(
        gadjax.sample(model, PROMPTS[0], seed=5, steps=2, guidance=3.0), images[:1]
    )


def test_guidance_zero_is_no_guidance(tiny_pipeline):
    """Guidance 0 is no guidance, as in diffusers and on published cards; negative prompts fail."""
    model = gadjax.load(tiny_pipeline)
    zero, one, two = (
        gadjax.sample(model, PROMPTS, steps=1, guidance=guidance) for guidance in (0, 1, 2)
    )
    np.testing.assert_array_equal(zero, one)
    assert np.any(zero[0] != two[0])
    refused(lambda: gadjax.sample(model, PROMPTS, guidance=0, negative="blue"), "negative: found")


def test_a_distilled_student_is_that_of_the_command(student, tiny_pipeline, tmp_path):
    """The same config in a workdir, by `gadjax train`, and the same weights bit for bit."""
    config, prompts = student.trained.config, tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    assert config["student"] == {
        "guidance": 1.0,
        "init": "teacher",
        "trained": "",
        "earlier_expert": "",
        "trained_steps": [],
        "layers": [],
        "lora": {"rank": 0, "alpha": None, "targets": TARGETS},
        "latents": "student",
        "redraw": [],
        "rollout": "ode",
        "steps": 2,
        "timesteps": [999.0, 500.0],
    }
    assert config["objective"] == {"regression": {"steps": 1}}
    assert (config["steps"], config["guidance"], config["optim"]["lr"]) == (1, 3.0, 1e-3)
    config["data"]["prompts"] = str(prompts)
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )
    assert main(["train", "--config", str(path), "--workdir", str(tmp_path / "run")]) == 0
    again = gadjax.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, student.trained.params, again.trained.params)
    assert again.sampling == student.sampling
    start = gadjax.load(tiny_pipeline).params["transformer"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), student.params["transformer"], start)
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_the_students_pictures_start_from_the_teachers_noises(student, tiny_pipeline, tmp_path):
    shown = gadjax.sample(student, PROMPTS, seed=2)
    assert repr(student) == f"<student of {tiny_pipeline.name}: 2 steps, guidance 1>"
    verified = gadjax.save(student, tmp_path / "student")
    assert verified["max_difference"] <= 1e-4
    np.testing.assert_array_equal(
        gadjax.sample(gadjax.load(tmp_path / "student"), PROMPTS, seed=2), shown
    )
    refused(lambda: gadjax.save(student, tmp_path / "student"), "new or empty")
    before = (tmp_path / "student" / "model_index.json").read_text()
    gadjax.save(student, tmp_path / "student", overwrite=True)
    assert (tmp_path / "student" / "model_index.json").read_text() == before


@pytest.mark.slow
def test_a_workdir_is_kept_and_resumed(tiny_pipeline, tmp_path, student):
    def run(prompts=PROMPTS, updates=1, **more):
        changes = SMALL | {"preview": {"every": 0}} | more
        objective = {"regression": {"steps": 1}}
        return gadjax.distill(
            str(tiny_pipeline),
            objective,
            prompts,
            timesteps=(999, 500),
            updates=updates,
            workdir=tmp_path / "run",
            **changes,
        )

    first = run()
    jax.tree.map(np.testing.assert_array_equal, first.trained.params, student.trained.params)
    assert run(updates=2).trained.step == 2
    refused(lambda: run(["another"], updates=2), "belongs to another config", "prompts")
    refused(lambda: run(updates=2, seed=1), "belongs to another config", "seed")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(bacth=3), ["bacth", "did you mean batch?"]),
        (dict(optim={"lrr": 3}), ["optim.lrr", "did you mean optim.lr?"]),
        (dict(batch="many"), ["config", "batch"]),
        (dict(steps=0), ["steps: found 0"]),
        (dict(timesteps=[1200, 3]), ["student.timesteps: found", "up to 999"]),
        (dict(objective={"dmd2": {}}), ["objective: found 'dmd2'"]),
        (dict(prompts="absent.txt"), ["absent.txt"]),
        (dict(teacher="absent"), ["absent", "no such folder"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_pipeline, tmp_path, changes, words):
    given = {"teacher": tiny_pipeline, "objective": 1.0 * DMD(), "prompts": PROMPTS}
    given |= {"workdir": tmp_path / "run"} | changes
    refused(lambda: gadjax.distill(**given), *words)
    assert not (tmp_path / "run").exists()


def test_a_student_is_no_teacher_and_a_teacher_cannot_be_saved(student, tiny_pipeline):
    refused(lambda: gadjax.distill(student, DMD(), PROMPTS), "teacher", "distilled")
    refused(lambda: gadjax.save(gadjax.load(tiny_pipeline), "out"), tiny_pipeline.name)
    refused(lambda: gadjax.sample(student, PROMPTS, steps=3), "steps: found 3", "999, 500")
    refused(lambda: gadjax.sample(student, PROMPTS, guidance=float("nan")), "guidance: found nan")


def test_a_workdir_is_read_as_the_command_reads_it(tiny_pipeline, tmp_path):
    model = gadjax.load(make_workdir(tmp_path / "run", tiny_pipeline))
    assert model.trained.step == 2 and model.sampling.timesteps == (899, 674, 449, 224)


def test_a_workdirs_student_has_steps_of_its_own(tiny_pipeline, tmp_path):
    """A preset is refused for it, and taken for a network that was trained by plain denoising."""
    student = make_workdir(tmp_path / "student", tiny_pipeline)
    refused(
        lambda: gadjax.load(student, student_preset="tdm-pixart"),
        f"student_preset: found tdm-pixart for {student}, a workdir whose student has steps",
    )
    data = {"world": "gadjax.worlds.shapes", "length": 8}
    teacher = make_workdir(
        tmp_path / "teacher", tiny_pipeline, objective={"denoising": {}}, data=data
    )
    model = gadjax.load(teacher, student_preset="tdm-pixart")
    assert model.sampling.timesteps == (899, 674, 449, 224) and model.sampling.guidance == 1


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        (DMD(), {"dmd": {}}),
        (DMD() + 0.3 * GAD(steps=8), {"dmd": {}, "gad": {"weight": 0.3, "steps": 8}}),
        (2 * GAD(step_weights=(1.0, 0.5)), {"gad": {"weight": 2.0, "step_weights": (1.0, 0.5)}}),
        (DMD() + 0 * GAD(), {"dmd": {}}),
        (GAD() + 0.5 * GAD(end="clean"), {"gad": {}, "gad_2": {"weight": 0.5, "end": "clean"}}),
    ],
)
def test_an_objective_is_a_config_and_back(objective, config):
    assert as_config(objective, TERMS) == config
    assert as_config(config, TERMS) == config
    for stored in (config, json.loads(json.dumps(config))):
        assert build(stored, TERMS, (999, 499)) == Sum(()) + objective
    required = {"disback": {"path": ("x",)}, "uni_dad": {"target": "x"}}
    required["dmm"] = {"teachers": ("x", "y")}
    for name, kind in TERMS.items():
        given = required.get(name, {})
        assert as_config(kind(**given), TERMS) == {name: given}


def test_terms_that_no_config_can_name():
    class Mine(Regression):
        pass

    refused(lambda: as_config(DMD() + Mine(), TERMS), "found Mine", "TERMS")
    assert as_config(0.5 * Mine(), TERMS | {"mine": Mine}) == {"mine": {"weight": 0.5}}


def test_a_term_that_was_given_a_name_is_a_config_too(monkeypatch):
    class Mine(Regression):
        pass

    monkeypatch.setitem(TERMS, "half", Mine)
    config = as_config(GAD() + Mine(), TERMS)
    assert config == {"gad": {}, "half": {}}
    total = build(config, TERMS, (999, 499))
    assert total.names == ("gad", "half") and type(total.parts[1][1]) is Mine
