"""Embeddings are those of transformers, and are refused where another encoder is used."""

import shutil

import numpy as np
import pytest
from checkpoints import edit, refused

from gadjax.convert.text import text_fingerprint
from gadjax.data.embeddings import open_embeddings
from gadjax.pipeline import load_pipeline
from gadjax.training.config import default_config
from gadjax.training.setup import open_data

LENGTH = 8


def test_embeddings_are_those_of_transformers(torch_pipeline, tiny_pipeline, tmp_path, gadjax):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    texts = ["Red circle", "a blue square above a circle", "green"]
    prompts.write_text("\n".join(texts))
    flags = ("--length", LENGTH, "--batch", 2)
    said = gadjax("embed", "--model", tiny_pipeline, "--prompts", prompts, "--out", out, *flags)
    assert "3 prompts of 8 tokens" in said
    found = open_embeddings(out)
    assert found.prompts == tuple(texts)
    found.check(text_fingerprint(tiny_pipeline), LENGTH)
    for text, ours, mask in zip(
        [*texts, ""],
        [*found.text_NLD, found.null[0]],
        [*found.mask_NL, found.null[1]],
        strict=True,
    ):
        theirs, their_mask, _, _ = torch_pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
        np.testing.assert_array_equal(mask, their_mask[0].numpy())
        error = np.abs(ours - theirs[0].detach().numpy()).max()
        assert error <= 1e-5 * theirs.abs().max()


def test_training_takes_only_its_own_embeddings(tiny_pipeline, prompts, tmp_path, gadjax):
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
