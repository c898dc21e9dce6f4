"""Sampling settings in gadjax.json: round trip, and refusal of invalid values."""

import json

import pytest

from gadjax.errors import InputError
from gadjax.formats.sampling_config import (
    GADJAX_JSON,
    SamplingConfig,
    read_sampling,
    read_teacher_guidance,
    read_world,
)


def test_defaults_without_a_file(tmp_path):
    assert read_sampling(tmp_path, SamplingConfig()) == SamplingConfig(20, None, 4.5, 120)
    assert read_world(tmp_path) is None


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(4, (899.0, 674.0, 449.0, 224.0), 1.0, 16),
        SamplingConfig(12, None, 3.0, 300, eta=0.3),
    ],
)
def test_round_trip(tmp_path, sampling):
    (tmp_path / GADJAX_JSON).write_text(
        json.dumps({**sampling.to_dict(), "world": "shapes", "by": 1})
    )
    assert read_sampling(tmp_path, SamplingConfig()) == sampling
    assert read_world(tmp_path) == "shapes"


def test_timesteps_determine_the_number_of_steps(tmp_path):
    (tmp_path / GADJAX_JSON).write_text('{"timesteps": [999, 1]}')
    assert read_sampling(tmp_path, SamplingConfig()) == SamplingConfig(2, (999.0, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"steps": 0}', "steps: found 0"),
        ('{"steps": 2.5}', "steps: found 2.5"),
        ('{"eta": 1.5}', "eta: found 1.5; expected a number from 0 to 1"),
        ('{"eta": "0"}', "eta: found '0'"),
        ('{"steps": true}', "steps: found True"),
        ('{"length": "16"}', "length: found '16'"),
        ('{"guidance": null}', "guidance: found None"),
        ('{"guidance": NaN}', "guidance: found nan"),
        ('{"timesteps": []}', "timesteps: found "),
        ('{"timesteps": [1, 2]}', "timesteps: found "),
        ('{"timesteps": [2, 2]}', "timesteps: found "),
        ('{"timesteps": ["2"]}', "timesteps: found "),
        ('{"timesteps": [999, 499], "steps": 3}', "steps: found 3; expected 2"),
        ("[]", "found a list"),
        ("{", "corrupt"),
    ],
)
def test_refused(tmp_path, text, message):
    (tmp_path / GADJAX_JSON).write_text(text)
    with pytest.raises(InputError) as error:
        read_sampling(tmp_path, SamplingConfig())
    assert message in str(error.value) and GADJAX_JSON in str(error.value)
    assert "\n" not in str(error.value)


def test_a_world_is_a_name(tmp_path):
    (tmp_path / GADJAX_JSON).write_text('{"world": 3}')
    with pytest.raises(InputError, match="world: found 3"):
        read_world(tmp_path)


@pytest.mark.parametrize(
    ("text", "guidance"),
    [("{}", None), ('{"teacher": "x"}', None), ('{"teacher": {"guidance": 4}}', 4)],
)
def test_teacher_guidance_of_a_student(tmp_path, text, guidance):
    (tmp_path / GADJAX_JSON).write_text(text)
    assert read_teacher_guidance(tmp_path) == guidance


def test_teacher_guidance_is_a_number(tmp_path):
    assert read_teacher_guidance(tmp_path) is None
    (tmp_path / GADJAX_JSON).write_text('{"teacher": {"guidance": "4"}}')
    with pytest.raises(InputError, match="teacher.guidance: found '4'; expected a number"):
        read_teacher_guidance(tmp_path)
