"""Every family as a whole: networks, pictures and weights both ways, against diffusers."""

import json

import families
import jax
import numpy as np
import pytest
from checkpoints import same, state

from gadjax import parity
from gadjax.cli.main import main
from gadjax.convert.folder import read_pipeline
from gadjax.convert.recipe import FILE
from gadjax.pipeline import load_pipeline

PROMPTS = ("a red circle above the blue square", "")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family -> its folder, made when it is first asked for; to be read and not changed."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = families.make(family, tmp_path_factory.mktemp("families") / family)
        return made[family]

    return get


def told(folder, tmp_path, **sampling):
    """The folder with a gadjax.json, made of links."""
    path = tmp_path / "told"
    path.mkdir()
    for part in folder.iterdir():
        (path / part.name).symlink_to(part)
    (path / FILE).write_text(json.dumps(sampling))
    return path


@pytest.mark.parametrize("family", families.MAKERS)
def test_networks_say_what_theirs_say(folders, family):
    folder = read_pipeline(folders(family))
    found = parity.compare_networks(folder, folder)
    assert max(found.values()) <= 1e-5, found


# Lengths that are not the defaults, where they are free.
LENGTH = {"sana": 20, "sana_sprint": 20, "sd3": 12, "sd35": 12}
SPRINT = {"guidance": 4.5, "steps": 2}


@pytest.mark.parametrize("family", families.MAKERS)
def test_pictures_are_diffusers_own(folders, family, tmp_path):
    sampling = {"steps": 4, "guidance": 3.0, "length": LENGTH.get(family, 77)}
    folder = told(folders(family), tmp_path, **sampling | (SPRINT if "sprint" in family else {}))
    assert parity.compare_pictures(folder, PROMPTS) <= 1e-4


@pytest.mark.parametrize("family", families.MAKERS)
def test_weights_go_there_and_back(folders, family, tmp_path):
    folder = folders(family)
    own, back = tmp_path / "own", tmp_path / "back"
    for arguments in ((folder, own), (own, back)):
        assert main(["convert", *map(str, arguments)]) == 0
    for name in read_pipeline(folder).components:
        before, after = state(folder, name), state(back, name)
        if name.startswith("text_encoder"):  # both spellings are read, one is written
            after = {key: after[prefixed(key, after)] for key in before}
        assert same(before, after), name


def prefixed(key, tensors):
    return key if key in tensors else f"text_model.{key}"


@pytest.mark.parametrize("family", families.MAKERS)
def test_a_map_of_the_noise_has_a_tangent(folders, family):
    from gadjax.convert.recipe import Sampling
    from gadjax.sampling import clean_latent

    pipeline, params = load_pipeline(folders(family))
    length = LENGTH.get(family, 77)
    sampling = Sampling(2, None, 2.0, length)
    z, v = np.random.default_rng(0).standard_normal((2, 1, *pipeline.latent), np.float32)
    cond = pipeline.encode_text(params, *pipeline.tokens(PROMPTS[:1], length))
    null = pipeline.encode_text(params, *pipeline.prompts.untold(None, length))

    def walk(z):
        return clean_latent(pipeline, params[pipeline.body], sampling, z, cond, null)

    _, tangent = jax.jit(lambda z, v: jax.jvp(walk, (z,), (v,)))(z, v)
    assert np.isfinite(tangent).all() and np.abs(tangent).max() > 1e-3
