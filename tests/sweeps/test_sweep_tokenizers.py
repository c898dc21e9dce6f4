"""Tokens of random prompts by random tokenizer folders, against what diffusers' pipelines make."""

import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import sentencepiece
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from sweeping import Case, Choice, Outputs, sweep

from gadjax.models.text.prompts import TextComponents
from gadjax.models.text.tokenizer import FILES, build_word_tokenizer, preprocess

pytestmark = pytest.mark.slow
transformers.utils.logging.set_verbosity_error()

# What may be named beside the files: keys of tokenizer_config.json, and what a length is of.
WORDS = {
    "model_max_length",
    "extra_ids",
    "vocab_size",
    "tokenizer",
    "added_tokens_decoder",
    "spiece.model",
}
TEXTS = (
    "a red circle above the blue square",
    "Ein ROTER Kreis, 3 Stück!",
    "a photograph of an old lighthouse on a rocky shore at dawn",
    "two small dogs run along the beach while a boat passes by",
    "赤い丸と青い四角",
    "красный круг над синим квадратом",
    "دائرة حمراء",
    "a 🟥 circle 👩‍👩‍👧 and e\u0301 ﬁne ½",
    "tabs\tand\nlines\u2028 and \u00a0spaces\u3000",
    "it's they'll I'd WE'VE don't",
    "x" * 50,
    "",
    "   ",
    "[PAD] <s> </s> <pad> <unk> <bos> <eos> <|endoftext|> <|startoftext|> <extra_id_0>",
)
LETTERS = [
    chr(c) for low, high in ((32, 127), (160, 600), (0x4E00, 0x4E20)) for c in range(low, high)
]
LETTERS += ["\u0301", "\u200d", "\ufeff", "😀", "\t", "\n", "▁", "İ", "ß", "\x07"]
ADDED = ("<cat>", "<cat>_1", "<cat>_2", "<dog>", "sks", "Circle", "<extra>", "two words", "é")
# From models trained on few words.
CORPUS = [text for text in TEXTS if text.strip()] * 5


@pytest.mark.parametrize("name", FILES)
def test_tokenizers(name, tmp_path):
    sweep(name, partial(draw, name), tmp_path, len(FILES))


def draw(name: str, rng: np.random.Generator, root: Path) -> Case:
    pick = Choice(rng)
    folder = root / "tokenizer"
    writers = {"CLIP": write_clip, "T5To": write_t5, "Gemm": write_gemma, "Qwen": write_qwen}
    writers[name[:4]](folder, pick)
    rewrite(folder, name, pick)
    written = name + pick("", "Fast")
    prompts = [random_prompt(pick) for _ in range(6)]
    length = pick(3, 8, 20, 77, 120)
    loaded = getattr(transformers, written).from_pretrained(folder, local_files_only=True)
    if name == "CLIPTokenizer":
        length = loaded.model_max_length
    settings = {path.name: path.read_text()[:1500] for path in folder.glob("*config.json")}
    pipeline = {"CLIPTokenizer": pick("StableDiffusionPipeline", "StableDiffusion3Pipeline")}

    def ours() -> Outputs:
        encoder = SimpleNamespace(vocab_size=len(loaded), max_position_embeddings=512)
        index = {"tokenizer": ["transformers", written], "_class_name": pipeline.get(name)}
        parts = TextComponents(root, index, {}, {"text_encoder": encoder})
        learned = pipeline.get(name) == "StableDiffusionPipeline"
        tokenizer = parts.tokenizer(clean=name == "T5Tokenizer", textual_inversion=learned)
        if name == "CLIPTokenizer":
            length = parts.clip_length(tokenizer, "text_encoder")
        else:
            length = asked
        # SANA puts prompts in lower case before its instruction.
        texts = preprocess(prompts) if name == "GemmaTokenizer" else prompts
        return dict(zip(("ids", "mask"), tokenizer(texts, length), strict=True))

    asked = length
    return Case(
        {"class": written, "prompts": prompts, "length": length, **settings, **pipeline},
        frozenset({*WORDS, *(path.name for path in folder.iterdir()), *FILES[name]}),
        lambda: theirs(loaded, name, prompts, length, pipeline.get(name)),
        ours,
        tolerance=0.0,
    )


def theirs(tokenizer, name: str, prompts: list[str], length: int, pipeline: str | None) -> Outputs:
    """As the pipelines of diffusers call them."""
    if pipeline == "StableDiffusionPipeline":
        prompts = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, tokenizer)
    elif name in ("T5Tokenizer", "GemmaTokenizer"):
        prompts = [text.lower().strip() for text in prompts]
    if name == "GemmaTokenizer":
        tokenizer.padding_side = "right"
    out = tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="np",
    )
    return {"ids": out["input_ids"], "mask": out["attention_mask"]}


def random_prompt(pick: Choice) -> str:
    words = [pick(*TEXTS) for _ in range(pick(1, 1, 2))]
    words += pick.some(list(ADDED), 0.1)
    if pick.chance(0.4):
        words.append("".join(pick(*LETTERS) for _ in range(pick(1, 4, 20))))
    return pick(" ", "", "  ").join(words[i] for i in pick.rng.permutation(len(words)))


def random_settings(tokenizer, pick: Choice) -> None:
    """Change a tokenizer as its users do before they save it."""
    if pick.chance(0.4):
        tokenizer.add_tokens(pick.some(list(ADDED)))
    if pick.chance(0.2):
        tokenizer.add_special_tokens({"additional_special_tokens": pick.some(list(ADDED))})
    if pick.chance(0.3):
        token = transformers.AddedToken(
            pick(*ADDED),
            lstrip=pick(True, False),
            rstrip=pick(True, False),
            single_word=pick(True, False),
            normalized=pick(True, False),
        )
        tokenizer.add_tokens([token])
    tokenizer.padding_side = pick("right", "right", "left")
    if pick.chance(0.2):
        tokenizer.truncation_side = "left"
    tokenizer.model_max_length = pick(77, 77, 8, 20, 512, 10**30)


def write_clip(folder: Path, pick: Choice) -> None:
    write_pairs(families.clip_tokenizer(pick("<|endoftext|>", "!")), folder, pick)


def write_qwen(folder: Path, pick: Choice) -> None:
    write_pairs(families.qwen2_tokenizer(), folder, pick)


def write_pairs(tokenizer, folder: Path, pick: Choice) -> None:
    """A byte pair encoding, in one file or in two."""
    vocab, merges = tokenizer.get_vocab(), merges_of(tokenizer)
    random_settings(tokenizer, pick)
    tokenizer.save_pretrained(folder)
    if not pick.chance(0.5):
        return
    # As versions before 5 leave it: a vocabulary, merges, and the added tokens beside them.
    extra = {token: i for token, i in tokenizer.get_vocab().items() if token not in vocab}
    if pick.chance(0.7):
        (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    if extra:
        (folder / "added_tokens.json").write_text(json.dumps(extra))


@cache
def spiece(kind: str, size: int, folder: Path, special: tuple[int, ...]) -> bytes:
    prefix = folder / f"{kind}-{size}"
    pad, eos, unk, bos = special
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        pad_id=pad,
        eos_id=eos,
        unk_id=unk,
        bos_id=bos,
        byte_fallback=kind == "bpe",
        num_threads=1,
        minloglevel=2,
    )
    return prefix.with_name(f"{prefix.name}.model").read_bytes()


def write_t5(folder: Path, pick: Choice) -> None:
    if pick.chance(0.3):
        tokenizer = build_word_tokenizer(["red", "green", "blue", "circle", "square", "above"])
    else:
        folder.mkdir()
        special = pick(*[(0, 1, 2, -1)] * 9, (3, 2, 0, 1))
        data = spiece("unigram", pick(120, 160), folder.parent, special)
        (folder / "spiece.model").write_bytes(data)
        if pick.chance(0.4):  # as versions before 5 leave it
            settings = {"model_max_length": pick(512, 77), "extra_ids": pick(100, 0, 3)}
            settings |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
            if pick.chance(0.3):
                settings["legacy"] = pick(True, False)
            if pick.chance(0.3):
                settings["padding_side"] = pick("right", "left")
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            return
        tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    random_settings(tokenizer, pick)
    tokenizer.save_pretrained(folder)


def write_gemma(folder: Path, pick: Choice) -> None:
    if pick.chance(0.5):
        tokenizer = families.gemma(20)[0]
    else:
        folder.mkdir()
        data = spiece("bpe", pick(420, 460), folder.parent, (0, 1, 3, 2))
        (folder / "tokenizer.model").write_bytes(data)
        settings: dict[str, Any] = {"add_bos_token": True, "add_eos_token": pick(False, True)}
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        settings["unk_token"] = "<unk>"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if pick.chance(0.5):
            return
        tokenizer = transformers.GemmaTokenizer.from_pretrained(folder)
    random_settings(tokenizer, pick)
    tokenizer.save_pretrained(folder)


def merges_of(tokenizer) -> list[tuple[str, str]]:
    held = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in held]


def rewrite(folder: Path, name: str, pick: Choice) -> None:
    """Change the settings as other versions write them."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        held = json.loads(path.read_text())
        if pick.chance(0.3):
            held["name_or_path"] = "somebody/model"
        if pick.chance(0.2):
            held["special_tokens_map_file"] = "/home/somebody/special_tokens_map.json"
        if pick.chance(0.3):
            held["tokenizer_class"] = pick(name, f"{name}Fast")
        if pick.chance(0.2):
            held["clean_up_tokenization_spaces"] = pick(True, False)
        if pick.chance(0.2):
            held |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
        if pick.chance(0.15):
            held.pop("model_max_length", None)
        if pick.chance(0.15):
            held.pop("padding_side", None)
        for key in pick.some(["bos_token", "eos_token", "pad_token", "unk_token"], 0.15):
            if isinstance(held.get(key), str):
                held[key] = as_added(held[key], pick)
        path.write_text(json.dumps(held))
        if pick.chance(0.3):
            tokens = {k: v for k, v in held.items() if k.endswith("_token") and v is not None}
            tokens = {k: v for k, v in tokens.items() if isinstance(v, str | dict)}
            (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
        if pick.chance(0.1):
            path.unlink()


def as_added(content: str, pick: Choice) -> dict[str, Any]:
    keys = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": content, "normalized": pick(True, False), **keys}
