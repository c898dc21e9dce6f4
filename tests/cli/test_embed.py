"""Embeddings are those of transformers, and are refused where another encoder is used."""

import shutil

import families
import jax
import numpy as np
import pytest
from checkpoints import edit, refused
from PIL import Image
from safetensors.numpy import save_file

from gadjax.cli.main import main
from gadjax.data.embeddings import open_embeddings
from gadjax.data.images import open_images
from gadjax.formats.fingerprints import text_fingerprint
from gadjax.pipelines.pipeline import load_pipeline
from gadjax.seeds import make_key
from gadjax.training.batch import make_batch
from gadjax.training.config import default_config
from gadjax.training.data import open_data

LENGTH = 8


def test_embeddings_are_those_of_transformers(torch_pipeline, tiny_pipeline, tmp_path, gadjax):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    texts = ["Red circle", "a blue square above a circle", "green"]
    prompts.write_text("\n".join(texts))
    flags = ("--length", LENGTH, "--batch", 2)
    output = gadjax("embed", "--model", tiny_pipeline, "--prompts", prompts, "--out", out, *flags)
    assert "3 prompts of 8 tokens" in output
    embeddings = open_embeddings(out)
    assert embeddings.prompts == tuple(texts)
    embeddings.check(text_fingerprint(tiny_pipeline), LENGTH)
    for text, ours, mask in zip(
        [*texts, ""],
        [*embeddings.text_NLD, embeddings.null["text"]],
        [*embeddings.mask_NL, embeddings.null["mask"]],
        strict=True,
    ):
        theirs, their_mask, _, _ = torch_pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
        np.testing.assert_array_equal(mask, their_mask[0].numpy())
        error = np.abs(ours - theirs[0].detach().numpy()).max()
        assert error <= 1e-5 * theirs.abs().max()


def test_training_refuses_embeddings_of_another_encoder(tiny_pipeline, prompts, tmp_path, gadjax):
    out, other = tmp_path / "out", shutil.copytree(tiny_pipeline, tmp_path / "other")
    flags = ("--length", LENGTH, "--dtype", "float16")
    gadjax("embed", "--model", tiny_pipeline, "--prompts", prompts, "--out", out, *flags)
    pipeline, _ = load_pipeline(tiny_pipeline)
    config = default_config()
    config.teacher = str(tiny_pipeline)
    config.data.update(embeddings=str(out), length=LENGTH)
    source, null = open_data(config, pipeline)
    assert source.batch(0, 2)["text"].dtype == np.float16
    assert null["text"].shape == (1, LENGTH, 20)

    config.data.length = LENGTH + 1
    refused(lambda: open_data(config, pipeline), out, "length")
    config.data.length = LENGTH
    config.teacher = str(other)
    open_data(config, pipeline)
    edit(other / "text_encoder" / "config.json", layer_norm_epsilon=1e-5)
    refused(lambda: open_data(config, pipeline), out, "fingerprint")


def test_pictures_are_encoded_with_their_captions(tiny_pipeline, tmp_path, gadjax):
    images, out, text = tmp_path / "images", tmp_path / "out", tmp_path / "text"
    images.mkdir()
    captions = [f"{'red ' * (i + 1)}circle" for i in range(5)]
    lines = ["file_name,text"]
    for number, caption in enumerate(captions):
        Image.new("RGB", (20, 16 + number), (50 * number, 0, 0)).save(images / f"{number}.png")
        lines.append(f"{number}.png,{caption}")
    (images / "metadata.csv").write_text("\n".join(lines))
    flags = ("--model", tiny_pipeline, "--column", "text", "--length", LENGTH, "--batch", 2)
    output = gadjax("embed", "--images", images, "--out", out, *flags)
    assert "5 images, and captions of 8 tokens" in output
    embeddings = open_embeddings(out)
    pipeline, params = load_pipeline(tiny_pipeline)
    expected = pipeline.encode_image(
        params["vae"], open_images(images, "text").read(range(5), (16, 16))
    )
    assert np.abs(embeddings.latent_NHWC - expected).max() <= 1e-5 * np.abs(expected).max()
    embeddings.check(text_fingerprint(tiny_pipeline), LENGTH)
    # The captions come out as prompts do.
    gadjax("embed", "--prompts", images / "metadata.csv", "--out", text, *flags)
    for name in ("prompts.jsonl", "text.npy", "mask.npy"):
        assert (out / name).read_bytes() == (text / name).read_bytes()


def test_prompts_or_pictures(tiny_pipeline, prompts, tmp_path, fails):
    out = tmp_path / "out"
    given = ["embed", "--model", tiny_pipeline, "--out", out]
    fails(given, 2, "--prompts or --images: found nothing; expected one of them", out=out)
    fails([*given, "--prompts", prompts, "--images", tmp_path], 2, "found both", out=out)
    fails([*given, "--images", tmp_path], 2, f"{tmp_path}: found no pictures", out=out)
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "a.txt").write_text("red")
    fails([*given, "--images", tmp_path], 2, "a.png: found a picture that cannot be", out=out)


def test_the_length_is_the_models(tiny_pipeline, prompts, tmp_path, gadjax):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (model / "gadjax.json").write_text('{"length": 5}')
    out = tmp_path / "out"
    gadjax("embed", "--model", model, "--prompts", prompts, "--out", out)
    assert open_embeddings(out).text_NLD.shape == (2, 5, 20)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--length", "0"], ["--length: found 0"]),
        (["--batch", "0"], ["--batch: found 0"]),
        (["--dtype", "bfloat16"], ["--dtype: found 'bfloat16'"]),
        (["--variant", "fp8"], ["fp8"]),
        (["--model", "absent"], ["absent", "no such folder"]),
        (["--prompts", "absent.txt"], ["absent.txt"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_bad_flags(flags, words, tiny_pipeline, prompts, tmp_path, fails):
    out = tmp_path / "out"
    given = {"--model": tiny_pipeline, "--prompts": prompts, "--out": out} | dict([flags])
    fails(["embed", *(x for pair in given.items() for x in pair)], 2, *words, out=out)


def test_an_existing_folder_stays(tiny_pipeline, prompts, tmp_path, fails):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.jpg").write_text("mine")
    arguments = ["embed", "--model", tiny_pipeline, "--prompts", prompts, "--out", out]
    fails(arguments, 2, "files in it", out=out)


def test_embeddings_of_adapted_text_encoders(folders, tmp_path, capsys):
    """Those of the folder with the LoRA merged, to which they belong by their fingerprint."""
    rng, stem = np.random.default_rng(0), "lora_te_text_model_encoder_layers_1_mlp_fc1"
    width = 20
    shapes = {"down": (2, width), "up": (3 * width, 2)}
    tensors = {
        f"{stem}.lora_{part}.weight": rng.normal(size=shape).astype(np.float32)
        for part, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "text.safetensors")
    (tmp_path / "prompts.txt").write_text("red circle\n")
    model, lora = str(folders("sd15")), f"{tmp_path / 'text.safetensors'}:0.5"
    assert main(["lora", "merge", model, lora, "--out", str(tmp_path / "merged")]) == 0
    prompts = "--prompts", str(tmp_path / "prompts.txt")
    commands = {
        "lora": [model, "--lora", lora],
        "merged": [str(tmp_path / "merged")],
        "plain": [model],
    }
    for name, command in commands.items():
        out = "--out", str(tmp_path / name / "out")
        assert main(["embed", "--model", *command, *prompts, *out]) == 0
    texts = {name: np.load(tmp_path / name / "out" / "text.npy") for name in commands}
    manifests = {n: (tmp_path / n / "out" / "manifest.json").read_text() for n in commands}
    np.testing.assert_array_equal(texts["lora"], texts["merged"])
    assert manifests["lora"] == manifests["merged"] != manifests["plain"]
    assert np.abs(texts["lora"] - texts["plain"]).max() > 1e-2


def test_a_lora_without_text_encoders_is_refused(folders, tmp_path, capsys):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{stem}.lora_down.weight": (2, 24), f"{stem}.lora_up.weight": (24, 2)}
    tensors = {key: np.ones(shape, np.float32) for key, shape in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "prompts.txt").write_text("red circle\n")
    flags = "--lora", str(tmp_path / "a.safetensors"), "--prompts", str(tmp_path / "prompts.txt")
    out = tmp_path / "out"
    assert main(["embed", "--model", str(folders("sd15")), *flags, "--out", str(out)]) == 2
    assert "found no adapters of a text encoder" in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", families.MAKERS)
def test_a_run_has_the_batches_that_its_encoders_would_make(folders, family, tmp_path):
    folder, prompts = folders(family), tmp_path / "prompts.txt"
    prompts.write_text("red circle\na blue square above a circle\ngreen\n")
    length = families.LENGTH.get(family, 77)  # as CLIP takes them
    flags = ("--length", str(length), "--batch", "2")
    command = ["embed", "--model", str(folder), "--prompts", str(prompts), *flags]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    pipeline, params = load_pipeline(folder)
    config = default_config()
    config.teacher, config.data.length = str(folder), length
    batches = []
    for data in ({"prompts": str(prompts)}, {"embeddings": str(tmp_path / "out")}):
        config.data.update({"prompts": "", "embeddings": ""} | data)
        source, null = open_data(config, pipeline)
        networks = params | {"null": null}
        batches.append(make_batch(pipeline, networks, source.batch(0, 3), make_key(3), 0))
    ours, ahead = ([jax.device_get(part) for part in (b.cond, b.null)] for b in batches)
    for a, b in zip(*map(jax.tree.leaves, (ours, ahead)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(a).max(), 1e-3))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(ours)) > 1e-2
