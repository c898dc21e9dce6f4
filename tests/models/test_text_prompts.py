"""Prompt embeddings that depend on the files of tokenizers and CLIP, as in diffusers' pipelines."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import edit, refused
from transformers import CLIPTextModel, CLIPTokenizer

from gadjax.pipelines.pipeline import load_pipeline

PROMPTS = ["a red circle above the blue square", ""]


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders("sd15"), tmp_path / "sd15")


def ours(folder, prompts=PROMPTS, length=None):
    pipeline, params = load_pipeline(folder)
    tokens = pipeline.tokens(prompts, length or pipeline.prompts.length)
    return np.asarray(pipeline.encode_text(params, *tokens).text)


def theirs(folder, prompts=PROMPTS, **options):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        embeds = pipeline.encode_prompt(
            list(prompts),
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **options,
        )
    return embeds[0].numpy()


def agree(embeds, reference):
    assert embeds.shape == reference.shape
    np.testing.assert_allclose(embeds, reference, atol=1e-5 * np.abs(reference).max())


def test_clip_ignores_padding_with_use_attention_mask(folder):
    plain = ours(folder)
    edit(folder / "text_encoder" / "config.json", use_attention_mask=True)
    agree(ours(folder), theirs(folder))
    assert np.abs(ours(folder) - plain).max() > 1e-2
    edit(folder / "text_encoder" / "config.json", use_attention_mask="yes")
    refused(lambda: ours(folder), "use_attention_mask: found 'yes'; expected true or false")


@pytest.mark.parametrize(
    "family", ["sd15", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sdxl", "sd3"))]
)
def test_length_is_the_tokenizers(folders, family, tmp_path):
    folder = shutil.copytree(folders(family), tmp_path / "copy")
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        edit(path, model_max_length=20)
    several = {"prompt_2": None, "prompt_3": None}
    options = {"max_sequence_length": 9, **several} if family == "sd3" else {}
    agree(ours(folder, length=options.get("max_sequence_length")), theirs(folder, **options))
    path = folder / "tokenizer" / "tokenizer_config.json"
    edit(path, model_max_length=78)
    refused(lambda: ours(folder), path.parent, "model_max_length: found 78; expected", "77")
    path.write_text(
        json.dumps(
            {k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}
        )
    )
    refused(lambda: ours(folder), path.parent, "model_max_length: found none")
    if family == "sdxl":
        edit(path, model_max_length=30)
        refused(lambda: ours(folder), "tokenizer_2", "model_max_length: found 20; expected 30")


@pytest.mark.parametrize("family", ["sd15", "pixart", "sana"])
def test_padding_side_is_the_tokenizers(folders, family, tiny_pipeline, tmp_path):
    """Except for SANA, whose pipeline pads on the right in any case."""
    source = tiny_pipeline if family == "pixart" else folders(family)
    folder = shutil.copytree(source, tmp_path / "copy")
    edit(folder / "tokenizer" / "tokenizer_config.json", padding_side="left")
    options = {"max_sequence_length": 12, "clean_caption": False} if family != "sd15" else {}
    if family == "sana":
        from gadjax.models.sana.prompts import INSTRUCTION

        options["complex_human_instruction"] = INSTRUCTION.split("\n")
    agree(ours(folder, length=options.get("max_sequence_length")), theirs(folder, **options))


@pytest.mark.parametrize("side", ["right", "left"])
def test_z_image_reads_a_chat_before_qwens_last_block(folders, side, tmp_path):
    """A prompt's tokens come first in the end; more of them than the length are cut off."""
    folder = shutil.copytree(folders("z_image"), tmp_path / "copy")
    edit(folder / "tokenizer" / "tokenizer_config.json", padding_side=side)
    edit(folder / "model_index.json", text_encoder=["transformers", "Qwen3ForCausalLM"])
    prompts = ["a red circle above the blue square", "", " {Above} \n  a circle, " * 3]
    pipeline, params = load_pipeline(folder)
    tokens = pipeline.tokens([*prompts[:1], None, *prompts[2:]], 40)
    cond = pipeline.encode_text(params, *tokens)
    reference = diffusers.DiffusionPipeline.from_pretrained(folders("z_image"))
    reference.tokenizer.padding_side = side
    with torch.no_grad():
        expected, _ = reference.encode_prompt(
            list(prompts), device="cpu", do_classifier_free_guidance=False, max_sequence_length=40
        )
    lengths = [len(embeds) for embeds in expected]
    assert lengths[1] < lengths[0] < lengths[2] == 40
    mask = np.arange(40) < np.array(lengths)[:, None]
    np.testing.assert_array_equal(cond.mask, mask)
    for row, embeds in zip(np.asarray(cond.text), expected, strict=True):
        agree(row[: len(embeds)], embeds.numpy())


@pytest.mark.slow
def test_klein_reads_three_states_of_a_chat_and_their_padding(folders, tmp_path):
    folder = shutil.copytree(folders("flux2_klein"), tmp_path / "copy")
    prompts = ["a red circle above the blue square", "", " {Above} \n  a circle, " * 3]
    pipeline, params = load_pipeline(folder)
    ids, mask = pipeline.tokens([*prompts[:1], None, *prompts[2:]], 44)
    assert mask[0].sum() < mask[2].sum() == 44
    cond = pipeline.encode_text(params, ids, mask)
    reference = diffusers.DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        expected, _ = reference.encode_prompt(prompts, device="cpu", max_sequence_length=44)
    agree(np.asarray(cond.text), expected.numpy())
    assert np.asarray(cond.mask).all()
    last = np.asarray(cond.text)[:, -1]  # padding of the first two
    assert np.abs(last[0] - last[1]).max() > 1e-3 * np.abs(last).max()
    edit(folder / "tokenizer" / "tokenizer_config.json", padding_side="left")
    refused(lambda: load_pipeline(folder), "padding_side: found 'left'; expected 'right'")


def test_a_chat_template_of_another_text_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders("z_image"), tmp_path / "copy")
    path = folder / "tokenizer" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "</s>"))
    refused(lambda: ours(folder), "tokenizer: found a chat template that gives '<|im_start|>user")


def test_a_learned_concept_of_several_vectors(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    prompts = ["a red <cat> and a <dog>", "<cat>_1 alone", "circle"]
    agree(ours(folder, prompts), theirs(folder, prompts))
    ids, _ = load_pipeline(folder)[0].tokens(prompts, 77)
    assert (ids[0] >= len(tokenizer) - 4).sum() == 4 and (ids[1] >= len(tokenizer) - 4).sum() == 1
