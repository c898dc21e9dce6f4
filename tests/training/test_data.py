"""Training data from a config: pictures of a folder, the same encoded ahead; refusals."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import train_runs
from checkpoints import edit, refused
from PIL import Image
from tiny_run import config_file

from gadjax.cli.main import main
from gadjax.data.source import ImageSource, LatentSource
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.config import default_config
from gadjax.training.data import open_data

LENGTH, BATCH = 8, 4
CAPTIONS = ("red circle", "green square", "blue circle above red square", "a circle", "blue")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Pictures of several sizes and formats, with captions beside them."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, caption in enumerate(CAPTIONS):
        pixels = rng.integers(0, 256, (12 + 9 * number, 40 - 6 * number, 3)).astype(np.uint8)
        name = folder / f"{number}{('.png', '.webp', '.jpg')[number % 3]}"
        Image.fromarray(pixels).save(name)
        name.with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture(scope="session")
def latents(images, tiny_pipeline, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "out"
    flags = {"--model": tiny_pipeline, "--images": images, "--out": out, "--length": LENGTH}
    words = [str(word) for pair in flags.items() for word in pair]
    assert main(["embed", *words, "--batch", "2"]) == 0
    return out


@pytest.fixture(scope="session")
def loaded(tiny_pipeline):
    return load_pipeline(tiny_pipeline)


@pytest.fixture
def opened(loaded, tiny_pipeline):
    """`opened(images=..., ...)`: the source and the empty prompt of a config with these data."""

    def call(**data):
        config = default_config()
        config.teacher, config.seed = str(tiny_pipeline), 3
        data = {key: str(x) if isinstance(x, Path) else x for key, x in data.items()}
        config.data.update({"length": LENGTH} | data)
        return open_data(config, loaded[0])

    return call


def test_latents_written_ahead_give_the_batches_of_their_pictures(opened, loaded, images, latents):
    pipeline, params = loaded

    @jax.jit
    def batch(raw, null, update):
        return make_batch(pipeline, {**params, "null": null}, raw, make_key(3), update)

    for dropout in (0.0, 0.5):
        (pictures, ids), (ahead, text) = (
            opened(images=images, dropout=dropout),
            opened(latents=latents, dropout=dropout),
        )
        assert isinstance(pictures, ImageSource) and isinstance(ahead, LatentSource)
        for update in (0, 7):
            one = batch(pictures.batch(update * BATCH, BATCH), ids, update)
            other = batch(ahead.batch(update * BATCH, BATCH), text, update)
            assert one.x0.shape == (BATCH, 8, 8, 4)
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                if a.dtype == np.float32:
                    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
                else:
                    assert (a == b).all()


def test_the_latents_are_the_means_that_diffusers_computes(torch_pipeline, opened, images, latents):
    import torch

    vae = torch_pipeline.vae
    batch = opened(images=images)[0].batch(0, len(CAPTIONS))
    with torch.no_grad():
        mean = vae.encode(torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)).latent_dist.mean
    expected = (mean * vae.config.scaling_factor).permute(0, 2, 3, 1).numpy()
    x0 = opened(latents=latents)[0].batch(0, len(CAPTIONS))["x0"]
    assert np.abs(x0 - expected).max() <= 1e-5 * np.abs(expected).max()


SHORT = dict(
    student={"steps": 1, "timesteps": (900,)},
    objective={"denoising": {}},
    **{"steps": 2, "batch": 4, "remat": "none", "optim": {"lr": 1e-3}},
    data={"length": 8, "dropout": 0.2},
    **{"checkpoint": {"every": 1}, "log": {"every": 1}, "preview": {"every": 0}},
)


@pytest.fixture
def train(tiny_pipeline, tmp_path):
    """`train("name", "images=...", ...)`: the exit code of a run in tmp_path / name."""
    path = config_file(tmp_path / "config.py", teacher=str(tiny_pipeline), **SHORT)

    def call(name, *flags):
        return train_runs.train(path, tmp_path / name, *(f"--config.{flag}" for flag in flags))

    return call


def losses(workdir):
    return [row["loss/denoising"] for row in train_runs.rows(workdir)]


@pytest.mark.slow
def test_pictures_and_their_latents_train_the_same(train, images, latents, tmp_path):
    assert train("images", f"data.images={images}") == 0
    assert train("latents", f"data.latents={latents}") == 0
    one, other = losses(tmp_path / "images"), losses(tmp_path / "latents")
    assert len(one) == 2 and one[0] != one[1]
    np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.slow
def test_a_damaged_picture_stops_the_run_with_its_name(train, opened, images, tmp_path, capsys):
    source, _ = opened(images=images)
    # Seed 3; the first picture that the first batch does not show.
    shown = source.order(0, BATCH)
    (late,) = set(range(len(CAPTIONS))) - set(shown.tolist())
    folder = shutil.copytree(images, tmp_path / "images")
    name = source.pictures.names[late]
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    assert train("run", f"data.images={folder}", "seed=3") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"gadjax: {folder / name}: found a picture that cannot be read")
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("data.prompts=asset:shapes_prompts.txt", ["data.images", "expected a source of pictures"]),
        ("data.embeddings={latents}", ["data.latents", "expected a source of pictures"]),
        ("data.images={latents}", ["found no pictures"]),
        ("data.images=/nowhere", ["/nowhere: found No such file"]),
        ("data.latents=/nowhere", ["/nowhere/manifest.json"]),
    ],
)
def test_a_loss_that_needs_pictures_gets_them_or_one_line(
    train, latents, tmp_path, capsys, flag, words
):
    assert train("run", flag.format(latents=latents)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_exactly_one_source(opened, images, latents):
    five = "expected one of prompts, embeddings, world, images, latents"
    refused(lambda: opened(), "data: found none", five)
    refused(lambda: opened(images=images, latents=latents), "found images and latents", five)
    refused(lambda: opened(images=images, prompts="a.txt"), "found prompts and images", five)
    refused(lambda: opened(images=images, cache=9), "data.cache: found 9 without data.world")
    refused(lambda: opened(images=images, dropout=2.0), "dropout: found 2.0")
    refused(lambda: opened(latents=latents, dropout=-1.0), "dropout: found -1.0")


def test_latents_of_another_folder_are_refused(opened, images, latents, prompts_only, tmp_path):
    refused(lambda: opened(latents=prompts_only), "manifest.json: found no latents")
    refused(lambda: opened(latents=latents, length=5), "found length 8; expected 5")
    copy = shutil.copytree(latents, tmp_path / "copy")
    edit(copy / "manifest.json", vae="0" * 32)
    refused(lambda: opened(latents=copy), "found vae '000", "latents of another autoencoder")
    edit(copy / "manifest.json", fingerprint="0" * 32)
    refused(lambda: opened(latents=copy), "found fingerprint '000")
    os.truncate(copy / "latents.npy", 300)
    refused(lambda: opened(latents=copy), copy / "latents.npy", "truncated")


@pytest.fixture
def prompts_only(tiny_pipeline, tmp_path):
    (tmp_path / "p.txt").write_text("red circle\n")
    flags = {"--model": tiny_pipeline, "--prompts": tmp_path / "p.txt", "--out": tmp_path / "text"}
    words = [str(word) for pair in flags.items() for word in pair]
    assert main(["embed", *words, "--length", str(LENGTH)]) == 0
    return tmp_path / "text"


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sana"])
def test_a_dropped_caption_is_the_negative_prompt(folders, images, family):
    """In SDXL it is zeros, in SANA the empty prompt without its instruction."""
    config = default_config()
    config.teacher = str(folders(family))
    length = 77 if family != "sana" else LENGTH
    config.data.update(images=str(images), length=length, dropout=1.0)
    pipeline, params = load_pipeline(folders(family))
    source, null = open_data(config, pipeline)
    batch = source.batch(0, 1)
    for name in ("ids", "mask"):
        np.testing.assert_array_equal(batch[name], null[name])
    empty = pipeline.encode_text(params, batch["ids"], batch["mask"])
    negative_tokens = pipeline.encode_text(params, *pipeline.prompts.negative_tokens(None, length))
    np.testing.assert_array_equal(empty.text, negative_tokens.text)
    assert np.any(np.asarray(empty.text)) == (family != "sdxl")
    config.data.dropout = 0.0
    captions = open_data(config, pipeline)[0].batch(0, 1)
    assert np.any(captions["ids"] != null["ids"])
