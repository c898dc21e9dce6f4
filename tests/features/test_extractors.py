"""Extractors, scorers and their cache, from a folder that transformers wrote."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from several import run_on_devices
from tiny_clip import write_clip

from gadjax.errors import InputError
from gadjax.features.cache import FeatureCache
from gadjax.features.network import load_extractor
from gadjax.features.scorers import HEAD, HEAD_WIDTHS, load_scorer

PROMPTS = ["a red circle", "blue", "a photo of a small cat", "a red circle"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, *write_clip(folder)


def pictures(count=7, size=(40, 33)):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@torch.no_grad()
def reference(clip, images, prompts=PROMPTS):
    """Projected vectors of pictures and prompts, and logits, by transformers."""
    _, model, processor, tokenizer = clip
    inputs = dict(processor(list(images), return_tensors="pt"))
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    out = model(**inputs, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    raw = model.vision_model(**inputs).last_hidden_state[:, 0]
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy(), raw


def normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_features_are_those_of_transformers(clip):
    images = pictures()
    projected = load_extractor("clip", clip[0])
    raw = load_extractor("clip", clip[0], vector="raw")
    vectors, _, _, raw_class_token = reference(clip, images)
    np.testing.assert_allclose(normalised(projected(images)), vectors, atol=2e-6)
    expected = raw_class_token.numpy()
    assert np.abs(raw(images) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert (projected.width, raw.width) == (20, 32)
    assert projected.fingerprint != raw.fingerprint
    assert "clip projected; CLIPImageProcessor; shorter side to 24, bicubic" in str(projected)


def test_batches_do_not_matter(clip):
    images = pictures()
    extractor = load_extractor("clip", clip[0])
    first = extractor(images)
    for batch in (1, 3):
        object.__setattr__(extractor, "batch", batch)
        np.testing.assert_allclose(extractor(images), first, atol=1e-6 * np.abs(first).max())
    with pytest.raises(ValueError, match="expected uint8"):
        extractor(images.astype(np.float32))


def test_scores_are_those_of_transformers(clip):
    images = pictures(len(PROMPTS))
    vectors, texts, logits, _ = reference(clip, images)
    for name, scale in (("clipscore-h14", 1.0), ("pickscore", np.exp(3.0))):
        scorer = load_scorer(name, clip[0])
        scores = scorer(scorer.extractor(images), PROMPTS)
        np.testing.assert_allclose(scores, scale * (vectors * texts).sum(-1), atol=2e-5 * scale)
    np.testing.assert_allclose(scores, np.diagonal(logits), atol=1e-4)  # PickScore


def test_a_long_prompt_keeps_its_end(clip):
    prompts = ["cat " * 90, "dog"]
    scorer = load_scorer("clipscore", clip[0])
    images = pictures(2)
    _, texts, _, _ = reference(clip, images, prompts)
    vectors = scorer.extractor(images)
    expected = (normalised(vectors) * texts).sum(-1)
    np.testing.assert_allclose(scorer(vectors, prompts), expected, atol=2e-6)
    assert scorer.truncated == {prompts[0]}


def test_the_aesthetic_head(tmp_path):
    """Layer by layer, as in the original; without its file, how to make one."""
    write_clip(tmp_path, projection=768)
    with pytest.raises(InputError, match="sac\\+logos"):
        load_scorer("aesthetic", tmp_path)
    rng, tensors = np.random.default_rng(0), {}
    sizes = zip((0, 2, 4, 6, 7), HEAD_WIDTHS, HEAD_WIDTHS[1:], strict=False)
    for number, inputs, outputs in sizes:
        weight = rng.standard_normal((outputs, inputs)) / inputs**0.5
        tensors[f"layers.{number}.weight"] = weight.astype(np.float32)
        tensors[f"layers.{number}.bias"] = rng.standard_normal(outputs).astype(np.float32)
    save_file(tensors, tmp_path / HEAD)
    scorer = load_scorer("aesthetic", tmp_path)
    features = rng.standard_normal((5, 768))
    h = normalised(features)
    for number in (0, 2, 4, 6, 7):
        h = h @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
    np.testing.assert_allclose(scorer(features, PROMPTS), h[:, 0], rtol=1e-6)
    save_file(tensors | {"layers.0.bias": np.zeros(3, np.float32)}, tmp_path / HEAD)
    with pytest.raises(InputError, match="expected those of LAION's head"):
        load_scorer("aesthetic", tmp_path)


def test_a_second_run_reads_the_features(clip, tmp_path):
    extractor = load_extractor("clip", clip[0])
    images, counts = pictures(4), []

    def compute(part):
        counts.append(len(part))
        return extractor.compute(part)

    def cache():
        return FeatureCache(tmp_path / "deep", extractor.fingerprint, extractor.width)

    first = cache()
    features = first(images[[0, 1, 1]], compute)
    assert counts == [2] and (features[1] == features[2]).all()
    first.write()
    second = cache()
    again = second(images[[1, 3, 0]], compute)
    assert counts == [2, 1] and (again[[2, 0]] == features[:2]).all()
    second.write()
    assert (cache()(images[[3]], None) == again[1]).all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [
        f"{extractor.fingerprint}.safetensors"
    ]


def test_a_foreign_cache_is_refused(tmp_path):
    path = tmp_path / "aa.safetensors"
    for tensors in (
        {"keys": np.zeros((2, 16), np.uint8), "features": np.zeros((2, 4), np.float32)},
        {"keys": np.zeros((2, 16), np.uint8), "features": np.zeros((1, 3), np.float32)},
        {"features": np.zeros((2, 3), np.float32)},
        {
            "keys": np.zeros((2, 16), np.uint8),
            "features": np.full((2, 3), np.nan, np.float32),
        },
    ):
        save_file(tensors, path)
        with pytest.raises(InputError, match=r"aa.safetensors: found"):
            FeatureCache(tmp_path, "aa", 3)
    path.write_text("no tensors")
    with pytest.raises(InputError, match=r"aa.safetensors"):
        FeatureCache(tmp_path, "aa", 3)


def test_other_files_are_refused(clip, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip[0], folder)
    with pytest.raises(InputError, match="vector: found 'mean'; expected one of projected, pooled"):
        load_extractor("x", folder, vector="mean")
    with pytest.raises(InputError, match=r"--scores hpsv2: .*HPS_v2.1_compressed.pt.*--layout"):
        load_scorer("hpsv2", folder)
    with pytest.raises(InputError, match="--scores: found 'mine'; expected clipscore"):
        load_scorer("mine", folder)
    with pytest.raises(InputError, match="found no such folder"):
        load_extractor("x", tmp_path / "none")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"vision_model.more": np.zeros(2, np.float32)}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match="1 unexpected: vision_model.more"):
        load_extractor("x", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="found a pickle"):
        load_extractor("x", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(InputError, match=r"config.json: model_type: found 'bert'"):
        load_extractor("x", folder)


def on_devices(folder, expected):
    """Features on the devices of this process, which are those of one."""
    assert jax.device_count() == 8
    extractor, images = load_extractor("clip", folder), pictures()
    features, single = extractor(images), np.load(expected)
    np.testing.assert_allclose(features, single, atol=1e-6 * np.abs(single).max())
    x = np.zeros((8, 24, 24, 3), np.float32)
    from gadjax.parallel.sharding import batch_sharding, make_mesh

    x = jax.device_put(x, batch_sharding(make_mesh({"data": -1})))
    out = extractor.apply(extractor.params, x)
    assert len(out.sharding.device_set) == 8 and not out.sharding.is_fully_replicated


@pytest.mark.slow
def test_eight_devices_give_the_features_of_one(clip, tmp_path):
    np.save(tmp_path / "one.npy", load_extractor("clip", clip[0])(pictures()))
    run_on_devices(8, __file__, clip[0], tmp_path / "one.npy")


if __name__ == "__main__":
    from pathlib import Path

    on_devices(Path(sys.argv[1]), sys.argv[2])
