"""Fingerprints of training data depend on contents, not on times of files."""

import numpy as np
import pytest
from PIL import Image

from gadjax.data.embeddings import Origin, open_embeddings, write_embeddings
from gadjax.data.fingerprints import (
    _evenly_spaced,
    fingerprint_embeddings,
    fingerprint_pictures,
    fingerprint_prompts,
)
from gadjax.data.images import open_images


def test_fingerprint_of_prompts_depends_on_texts_and_order():
    assert fingerprint_prompts(["ab", "c"]) == fingerprint_prompts(["ab", "c"])
    others = [["a", "bc"], ["c", "ab"], ["ab"], ["ab", "c", "c"]]
    assert len({fingerprint_prompts(prompts) for prompts in (["ab", "c"], *others)}) == 5


def test_fingerprint_of_images_depends_on_names_captions_and_sizes(tmp_path):
    def write(name, caption, colour=0):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)

    write("a.png", "one")
    write("b.png", "two")
    first = fingerprint_pictures(open_images(tmp_path))
    write("a.png", "one")
    assert fingerprint_pictures(open_images(tmp_path)) == first
    write("a.png", "other")
    renamed = fingerprint_pictures(open_images(tmp_path))
    write("a.png", "one")
    Image.effect_noise((9, 9), 50).save(tmp_path / "b.png")
    assert len({first, renamed, fingerprint_pictures(open_images(tmp_path))}) == 3


@pytest.mark.parametrize("changed", ["prompt", "text", "x0", "origin"])
def test_fingerprint_of_embeddings_depends_on_all_arrays(tmp_path, changed):
    def write(name, changed=""):
        rng = np.random.default_rng(0)
        batch = {"text": rng.random((3, 2, 4)), "mask": np.ones((3, 2)), "x0": rng.random((3, 2))}
        batch["x0"] = np.float32(batch["x0"]).reshape(3, 1, 1, 2)
        batch["text"] = np.float32(batch["text"])
        if changed in batch:
            batch[changed][1] += 1
        null = {"text": np.zeros((2, 4), np.float32), "mask": np.ones(2)}
        origin = Origin("b" if changed == "origin" else "a", "v", (1, 1, 2))
        prompts = ["x", "y", "other" if changed == "prompt" else "z"]
        (tmp_path / name).mkdir()
        write_embeddings(tmp_path / name, prompts, [batch], null, origin=origin)
        return fingerprint_embeddings(open_embeddings(tmp_path / name))

    assert write("one") == write("two") != write("three", changed)


def test_evenly_spaced_indices():
    assert _evenly_spaced(3, 5) == [0, 1, 2]
    chosen = _evenly_spaced(10**6, 11)
    assert len(chosen) == 11 and chosen[0] == 0 and chosen[-1] == 10**6 - 1
    assert np.ptp(np.diff(chosen)) <= 1
