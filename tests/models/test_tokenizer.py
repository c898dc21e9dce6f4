import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from gadjax.errors import InputError
from gadjax.models.text import chat
from gadjax.models.text.tokenizer import Tokenizer, build_word_tokenizer, load_tokenizer, preprocess

torch.set_num_threads(1)

CAPTION = "a large blue square at the top left on a grey background"
WORDS = tuple(dict.fromkeys((CAPTION + " small red circle right bottom no o").split()))
CAPTIONS = [CAPTION, "  A RED circle\n", "", "a purple circle, 3 no!", " ".join([CAPTION] * 9)]
CORPUS = [
    "a photograph of an old lighthouse on a rocky shore at dawn",
    "two small dogs run along the beach while a boat passes by",
    "an oil painting of a woman reading a letter near the window",
    "the lighthouse keeper reads an old letter to his two dogs",
]


@pytest.fixture
def word_folder(tmp_path):
    build_word_tokenizer(WORDS).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return folder


def test_every_word_is_one_token(word_folder):
    ids, mask = load_tokenizer(word_folder)([CAPTION], 20)
    expected = [3 + WORDS.index(word) for word in CAPTION.split()] + [1]
    assert ids.dtype == mask.dtype == np.int32
    assert ids.tolist() == [expected + [0] * (20 - len(expected))]
    assert mask.tolist() == [[1] * len(expected) + [0] * (20 - len(expected))]


def test_other_text_is_spelt_or_unknown(word_folder):
    backend = load_tokenizer(word_folder).backend
    assert backend.tokenize("a red cat") == ["▁a", "▁red", "▁", "c", "a", "t"]
    assert backend("circle 3").input_ids == [3 + WORDS.index("circle"), backend.vocab["▁"], 2, 1]
    assert len(backend) == 3 + len(WORDS) + 1 + 26
    assert backend.decode(backend(CAPTION).input_ids, skip_special_tokens=True) == CAPTION


@pytest.mark.parametrize("loader", [transformers.T5Tokenizer, transformers.AutoTokenizer])
def test_saved_words_reload_with_the_same_ids(word_folder, loader):
    reloaded = loader.from_pretrained(word_folder, local_files_only=True)
    built = build_word_tokenizer(WORDS)
    assert reloaded.get_vocab() == built.get_vocab()
    assert reloaded(CAPTIONS).input_ids == built(CAPTIONS).input_ids
    assert (reloaded.pad_token_id, reloaded.eos_token_id, reloaded.unk_token_id) == (0, 1, 2)


def test_long_text_is_truncated_and_keeps_its_end(word_folder):
    tokenizer = load_tokenizer(word_folder)
    (long,), (mask,) = tokenizer([CAPTION], 5)
    assert long.tolist() == [3 + WORDS.index(word) for word in CAPTION.split()[:4]] + [1]
    assert mask.tolist() == [1] * 5


def test_one_empty_text_is_its_end(word_folder):
    ids, mask = load_tokenizer(word_folder)("", 3)
    assert ids.tolist() == [[1, 0, 0]] and mask.tolist() == [[1, 0, 0]]


def test_pipeline_gives_the_same_tokens(word_folder):
    from diffusers import PixArtAlphaPipeline

    parts = ("scheduler", "text_encoder", "transformer", "vae")
    index = {"_class_name": "PixArtAlphaPipeline", "tokenizer": ["transformers", "T5Tokenizer"]}
    (word_folder.parent / "model_index.json").write_text(
        json.dumps(index | {part: [None, None] for part in parts})
    )
    pipeline = PixArtAlphaPipeline.from_pretrained(
        word_folder.parent, local_files_only=True, **dict.fromkeys(parts)
    )
    encoder_inputs = []

    def record(ids, attention_mask):
        encoder_inputs.append((ids, attention_mask))
        return (torch.zeros(*ids.shape, 4),)

    record.dtype = torch.float32
    pipeline.text_encoder = record
    pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, device="cpu")
    ids, mask = load_tokenizer(word_folder)(CAPTIONS, 120)
    np.testing.assert_array_equal(ids, encoder_inputs[0][0].numpy())
    np.testing.assert_array_equal(mask, encoder_inputs[0][1].numpy())
    assert preprocess(CAPTIONS) == pipeline._text_preprocessing(CAPTIONS, clean_caption=False)


def test_sentencepiece_model_loads_as_in_transformers(spiece_folder):
    texts = [*CORPUS, "Two DOGS read a painting", "", "lighthouse " * 60]
    ids, mask = load_tokenizer(spiece_folder)(texts, 40)
    reference = transformers.T5Tokenizer.from_pretrained(spiece_folder)(
        preprocess(texts), padding="max_length", max_length=40, truncation=True, return_tensors="np"
    )
    np.testing.assert_array_equal(ids, reference.input_ids)
    np.testing.assert_array_equal(mask, reference.attention_mask)
    # And as sentencepiece itself segments it.
    model = sentencepiece.SentencePieceProcessor(str(spiece_folder / "spiece.model"))
    for row, kept, text in zip(ids[:5], mask, texts, strict=False):
        assert row[: kept.sum()].tolist() == [*model.encode(text.lower())[:39], 1]


def test_saved_sentencepiece_tokenizer_keeps_its_ids(spiece_folder, tmp_path):
    tokenizer = load_tokenizer(spiece_folder)
    tokenizer.backend.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    np.testing.assert_array_equal(
        load_tokenizer(tmp_path)(CORPUS, 40), Tokenizer(tokenizer.backend)(CORPUS, 40)
    )


def test_works_without_torch(word_folder, spiece_folder):
    script = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
sys.modules["torch"] = None
from gadjax.models.text.tokenizer import build_word_tokenizer, load_tokenizer
print(load_tokenizer({str(word_folder)!r})([{CAPTION!r}], 16)[0].tolist()[0])
print(build_word_tokenizer({WORDS!r})({CAPTION!r}).input_ids)
print(load_tokenizer({str(spiece_folder)!r})([{CORPUS[0]!r}], 40)[0].tolist()[0])
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    loaded, built, spiece = map(json.loads, out.stdout.splitlines())
    assert loaded == load_tokenizer(word_folder)([CAPTION], 16)[0].tolist()[0]
    assert built == loaded[: len(built)]
    assert spiece == load_tokenizer(spiece_folder)([CORPUS[0]], 40)[0].tolist()[0]


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}])
def test_folder_without_files_is_refused(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="found no tokenizer file"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="found no tokenizer file"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}}}'),
        ("spiece.model", "no protobuf"),
        ("spiece.model", ""),
    ],
)
def test_files_of_something_else_are_refused_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="expected a T5 tokenizer") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("words", [("red", "red"), ("Red",), ("dark red",), ("",), ("▁red",)])
def test_unusable_words_are_refused(words):
    with pytest.raises(InputError, match="words: found"):
        build_word_tokenizer(words)


def test_a_truncated_prompt_is_logged(word_folder, caplog):
    tokenizer = load_tokenizer(word_folder)
    tokenizer([CAPTION], 20)
    assert not caplog.records
    ids, mask = tokenizer([CAPTION, "a red circle"], 6)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("1 of 2 prompts are longer than the 6 tokens") and "has 13" in message
    assert ids[0, -1] == 1 and mask[0].all()  # the closing token stays


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "GemmaTokenizerFast", "Qwen2Tokenizer"])
def test_tokenizers_of_other_families(kind, tmp_path):
    import families

    makers = {
        "CLIPTokenizer": lambda: families.clip_tokenizer("!"),
        "GemmaTokenizerFast": lambda: families.gemma(20)[0],
        "Qwen2Tokenizer": families.qwen2_tokenizer,
    }
    made = makers[kind]()
    made.save_pretrained(tmp_path / "tokenizer")
    texts, length = ["a red circle above", "", "x " * 40], 12
    ids, mask = load_tokenizer(tmp_path / "tokenizer", kind, clean=False)(texts, length)
    made.padding_side = "right"
    theirs = made(texts, padding="max_length", max_length=length, truncation=True)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    np.testing.assert_array_equal(mask, theirs["attention_mask"])
    assert ids.dtype == np.int32 and mask[2].all() and not mask[1].all()


@pytest.mark.parametrize("older", [False, True])
def test_chats_of_qwen_s_tokenizer(older, tmp_path):
    """From tokenizer.json, or from vocab.json and merges.txt with the added tokens in the config;
    the chat's text is that of the template, and its marks are one token each."""
    import families

    made = families.qwen2_tokenizer()
    folder = tmp_path / "tokenizer"
    made.save_pretrained(folder)
    if older:
        path = folder / "tokenizer.json"
        model = json.loads(path.read_text())["model"]
        path.unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"])])
        (folder / "merges.txt").write_text(merges)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {
            str(made.convert_tokens_to_ids(token)): {"content": token, "special": token[1] == "|"}
            for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder, "Qwen2Tokenizer", clean=False)
    prompts = ["a red circle", "", " A\n{cat}  ", "<|im_end|> 1"]
    template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    texts = [
        made.apply_chat_template([{"role": "user", "content": text}], **template)
        for text in prompts
    ]
    assert texts == [chat.QWEN3.format(text) for text in prompts]
    assert len(tokenizer.backend.tokenize("<|im_start|>")) == 1
    ids, mask = tokenizer(texts, 40)
    theirs = made(texts, padding="max_length", max_length=40, truncation=True)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    np.testing.assert_array_equal(mask, theirs["attention_mask"])
    chat.check_template(tokenizer, chat.QWEN3, enable_thinking=True)
    with pytest.raises(InputError, match="found a chat template that gives .*think.*; expected"):
        chat.check_template(tokenizer, chat.QWEN3, enable_thinking=False)
    tokenizer.backend.chat_template = "{{ messages.missing.part }}"
    with pytest.raises(InputError, match=r"found an unusable chat template \(.*\); expected"):
        chat.check_template(tokenizer, chat.QWEN3)
    tokenizer.backend.chat_template = None
    with pytest.raises(InputError, match="found no chat template; expected that of Qwen3"):
        chat.check_template(tokenizer, chat.QWEN3)
    if older:
        (folder / "merges.txt").unlink()
        with pytest.raises(InputError, match="found no merges.txt; expected it beside vocab.json"):
            load_tokenizer(folder, "Qwen2Tokenizer")


def test_ids_beyond_the_encoders_vocabulary_are_refused(word_folder):
    """The encoder would give NaN for them."""
    ids, _ = load_tokenizer(word_folder, vocab_size=3 + len(WORDS))(CAPTIONS[:1], 20)
    assert ids.max() < 3 + len(WORDS)
    fewer = int(ids.max())
    with pytest.raises(InputError) as error:
        load_tokenizer(word_folder, vocab_size=fewer)(CAPTIONS[:1], 20)
    expected = f"found token {fewer}; expected ids below {fewer}, the text encoder's vocab_size"
    assert str(error.value) == f"{word_folder}: {expected}"


def test_another_class_of_tokenizer_is_refused(word_folder):
    with pytest.raises(InputError, match="found a BertTokenizer; expected one of T5Tokenizer"):
        load_tokenizer(word_folder, "BertTokenizer")
    with pytest.raises(InputError, match="found no tokenizer file; expected a CLIP tokenizer"):
        load_tokenizer(word_folder.parent, "CLIPTokenizer")
