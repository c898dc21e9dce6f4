"""Untrusted files: git-lfs pointers, macOS metadata, symlinks that escape."""

import shutil

import numpy as np
import pytest
from checkpoints import refused

from gadjax.data.embeddings import Origin, open_embeddings, write_embeddings
from gadjax.data.images import read_image
from gadjax.data.prompts import read_prompts
from gadjax.formats.diffusers_folder import check_pipeline
from gadjax.io.untrusted import check_no_escape
from gadjax.models.text.tokenizer import load_tokenizer
from gadjax.pipelines.pipeline import load_pipeline

POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4665606b0a4b1ae3c0d65a15fc8b2a5f5d3a9a6b2c5e0f0a0b0c0d0e0f101112
size 3438167536
"""


@pytest.fixture
def copy(tiny_pipeline, tmp_path):
    return shutil.copytree(tiny_pipeline, tmp_path / "copy")


@pytest.mark.parametrize(
    "name",
    ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"],
)
def test_git_lfs_pointer_of_weights(copy, name):
    (copy / name).write_text(POINTER)
    refused(lambda: check_pipeline(copy), copy / name, "a git-lfs pointer", "git lfs pull")


def test_git_lfs_pointer_of_data(copy, tmp_path):
    """Pointers in place of data files; undetected, their three lines would be prompts."""
    for name in ("prompts.txt", "a.png"):
        (tmp_path / name).write_text(POINTER)
    refused(lambda: read_prompts(tmp_path / "prompts.txt"), "prompts.txt: found a git-lfs pointer")
    refused(lambda: read_image(tmp_path / "a.png", (8, 8)), "a.png: found a git-lfs pointer")
    for path in (copy / "tokenizer").iterdir():
        path.write_text(POINTER)
    refused(lambda: load_tokenizer(copy / "tokenizer"), "tokenizer/", "a git-lfs pointer")
    text = {"text": np.zeros((1, 2, 4), np.float32), "mask": np.ones((1, 2))}
    (tmp_path / "new").mkdir()
    null = {name: value[0] for name, value in text.items()}
    write_embeddings(tmp_path / "new", ["a"], [text], null, origin=Origin("a"))
    (tmp_path / "new" / "text.npy").write_text(POINTER)
    refused(lambda: open_embeddings(tmp_path / "new"), "text.npy: found a git-lfs pointer")


def test_macos_metadata_is_ignored(copy, tiny_pipeline):
    for folder in ("", "tokenizer", "transformer", "text_encoder"):
        for name in (".DS_Store", "._tokenizer_config.json", "._config.json"):
            (copy / folder / name).write_bytes(b"\0\5\26\7\0")
    pipeline, _ = load_pipeline(copy)
    plain, _ = load_pipeline(tiny_pipeline)
    for one, other in zip(pipeline.tokens(["red"], 8), plain.tokens(["red"], 8), strict=True):
        np.testing.assert_array_equal(one, other)


def test_symlink_escape_is_refused(copy, tmp_path):
    (copy / "vae" / "config.json").rename(tmp_path / "elsewhere.json")
    (copy / "vae" / "config.json").symlink_to(tmp_path / "elsewhere.json")
    refused(
        lambda: check_no_escape(copy / "vae", copy), "found a link to", "`cp -rL` makes a folder"
    )
