"""The text fingerprint changes with everything that changes an embedding, and nothing else."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import edit, refused

from gadjax.formats.diffusers_folder import read_pipeline
from gadjax.formats.fingerprints import text_fingerprint
from gadjax.formats.orbax_folder import write_gadjax_folder


@pytest.fixture
def copy(tiny_pipeline, tmp_path):
    return shutil.copytree(tiny_pipeline, tmp_path / "copy")


def rewrite(path, change):
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_other_parts_do_not_matter(copy, tiny_pipeline, tmp_path):
    expected = text_fingerprint(tiny_pipeline)
    edit(copy / "transformer" / "config.json", num_layers=7)
    (copy / "scheduler" / "scheduler_config.json").unlink()
    assert text_fingerprint(copy) == expected
    gadjax_folder = tmp_path / "own"
    gadjax_folder.mkdir()
    write_gadjax_folder(read_pipeline(tiny_pipeline), gadjax_folder, expected)
    assert text_fingerprint(gadjax_folder) == expected


def test_everything_that_changes_embeddings_matters(copy):
    weights = copy / "text_encoder" / "model.safetensors"

    def nudge(tensors):
        tensors["shared.weight"][0, 0] += 1

    def widen(tensors):
        tensors["shared.weight"] = np.pad(tensors["shared.weight"], ((0, 1), (0, 0)))

    def halve(tensors):
        tensors["shared.weight"] = tensors["shared.weight"].astype(np.float16)

    tokenizer = copy / "tokenizer" / "tokenizer_config.json"
    fingerprints = [text_fingerprint(copy), text_fingerprint(copy, dtype=ml_dtypes.bfloat16)]
    for change in (
        lambda: edit(copy / "text_encoder" / "config.json", num_heads=2),
        lambda: tokenizer.write_text(tokenizer.read_text() + "\n"),
        lambda: shutil.copyfile(tokenizer, copy / "tokenizer" / "more.json"),
        lambda: rewrite(weights, nudge),
        lambda: rewrite(weights, widen),
        lambda: rewrite(weights, halve),
    ):
        change()
        fingerprints.append(text_fingerprint(copy))
    assert len(set(fingerprints)) == len(fingerprints) == 8


def test_a_folder_without_text(copy):
    shutil.rmtree(copy / "tokenizer")
    refused(lambda: text_fingerprint(copy), copy / "tokenizer")
    shutil.rmtree(copy / "text_encoder")
    (copy / "tokenizer").mkdir()
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(lambda: text_fingerprint(copy), copy / "text_encoder")
