"""SigLIP as a scorer of prompt agreement, with the tokenizers of its two versions."""

import json
import string

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from test_extractors import pictures
from tokenizers.processors import TemplateProcessing
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from gadjax.errors import InputError
from gadjax.features.scorers import load_scorer

PROMPTS = ["A red Circle", "blue, green!", "a small cat " * 5, "a red circle"]
LENGTH = 16  # of the text tower, less than the third prompt has


def gemma_tokenizer():
    """SigLIP 2's: Gemma's, which closes a text with <eos> and does not begin it with <bos>."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {token: i for i, token in enumerate([*pieces, "▁", *string.ascii_lowercase])}
    merges = [("r", "e"), ("re", "d"), ("c", "a"), ("ca", "t")]
    vocab |= {"".join(pair): len(vocab) + i for i, pair in enumerate(merges)}
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=merges, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.model_input_names = ["input_ids"]  # as published
    return tokenizer


def sentencepiece_tokenizer(folder):
    """SigLIP's own: a unigram model of sentencepiece, without punctuation."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "blue and green", "a small cat"] * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return transformers.SiglipTokenizer(str(folder / "spiece.model"))


def make_folder(folder, tokenizer):
    torch.manual_seed(0)
    text = transformers.SiglipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=LENGTH,
        projection_size=32,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
    )
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=2)
    for part in (model.eval(), processor, tokenizer):
        part.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("kind", ["SigLIP", "SigLIP 2"])
def test_scores_are_cosines_by_transformers(kind, tmp_path):
    made = gemma_tokenizer() if kind == "SigLIP 2" else sentencepiece_tokenizer(tmp_path)
    model, processor = make_folder(tmp_path, made)
    images = pictures(len(PROMPTS))
    texts = [prompt.lower() for prompt in PROMPTS]
    tokens = made(
        texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(
            input_ids=tokens["input_ids"],
            **processor(list(images), return_tensors="pt"),
        )
    scorer = load_scorer("siglip-small", tmp_path)
    scores = scorer(scorer.extractor(images), PROMPTS)
    expected = (out.text_embeds * out.image_embeds).sum(-1).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scorer.truncated == {PROMPTS[2]} and np.ptp(expected) > 0.02
    # Transformers' own logits are those with scale and bias.
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    logits = np.diagonal(out.logits_per_image.detach().numpy())
    np.testing.assert_allclose(scale * scores + bias, logits, atol=1e-4)


def test_other_folders_are_refused(tmp_path):
    make_folder(tmp_path, gemma_tokenizer())
    with pytest.raises(InputError, match="found a siglip; expected the folder of a CLIPModel"):
        load_scorer("clipscore", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changed, message in (
        ({"model_type": "siglip2"}, "NaFlex"),
        (
            {"text_config": config["text_config"] | {"projection_size": 20}},
            "projection_size: found 20; expected 32",
        ),
    ):
        path.write_text(json.dumps(config | changed))
        with pytest.raises(InputError, match=message):
            load_scorer("siglip", tmp_path)
    path.write_text(json.dumps(config))
    tokenizer = tmp_path / "tokenizer_config.json"
    settings = json.loads(tokenizer.read_text()) | {"tokenizer_class": "BertTokenizer"}
    tokenizer.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="tokenizer_class: found 'BertTokenizer'"):
        load_scorer("siglip", tmp_path)
