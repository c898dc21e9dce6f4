"""Tokenizers: load those of a diffusers folder, or build one from a list of words.

They are transformers' tokenizers (which need no torch), as in diffusers' pipelines. T5's and
SigLIP's are unigram models (Kudo, arXiv:1804.10959), CLIP's, Gemma's and Qwen's are byte pair
encodings.
"""

import logging
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gadjax.errors import InputError, short_repr
from gadjax.io.untrusted import MIB, check_no_escape, is_macos_metadata, open_file, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5Tokenizer

# Class in model_index.json, without Fast -> files one of which must be there.
FILES = {
    "T5Tokenizer": ("tokenizer.json", "spiece.model"),
    "CLIPTokenizer": ("tokenizer.json", "vocab.json"),
    "GemmaTokenizer": ("tokenizer.json", "tokenizer.model"),
    "Qwen2Tokenizer": ("tokenizer.json", "vocab.json"),
    "SiglipTokenizer": ("spiece.model",),
}
KNOWN_FILES = {name for names in FILES.values() for name in names} | {"merges.txt"}
WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack")  # of a model whose tokenizer is beside it
SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2: T5Tokenizer takes id 2 as the unknown one
SPACE = "▁"
MAX_EXTRA_IDS = 1000  # of T5; published ones have 100
MAX_FILE_BYTES = 256 * MIB  # the largest published ones have some 30 MiB
# Settings by which transformers would open other files, or build the class from other objects.
REFUSED_SETTINGS = ("vocab", "merges", "fast_tokenizer_files", "init_inputs", "tokenizer_object")
PANIC = "PanicException"
TRIAL_TEXTS = ("a red circle", "", "Ä 1<\u2028>")
log = logging.getLogger(__name__)


def preprocess(texts: str | Sequence[str]) -> list[str]:
    """Lower-case and strip prompts: the pipeline's preprocessing with clean_caption=False.

    PixArtAlphaPipeline.__call__ defaults to clean_caption=True, which also strips markup and needs
    bs4 and ftfy; if one of them is missing it warns and preprocesses as this function. For equal
    tokens call it with clean_caption=False.
    """
    return [text.lower().strip() for text in ([texts] if isinstance(texts, str) else texts)]


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer of one text encoder: `tokenizer(texts, length) -> (ids_BL, mask_BL)`, both int32.

    B texts of L = `length` tokens. Short texts are padded (mask 0) on the side that the files name.
    Long ones are truncated, which is logged; the tokens that close a text are kept.

    Attributes:
      backend: transformers' tokenizer.
      clean: whether texts are preprocessed first, see `preprocess`.
      vocab_size: of the text encoder; None for any. A call raises InputError for an id beyond it.
      textual_inversion: whether a learned concept of several vectors is expanded, `<cat>` to
        `<cat> <cat>_1`, as diffusers' TextualInversionLoaderMixin does.
    """

    backend: "PreTrainedTokenizerBase"
    clean: bool = True
    vocab_size: int | None = None
    textual_inversion: bool = False

    @cached_property
    def concepts(self) -> dict[str, str]:
        """Learned concepts: first token -> tokens of all vectors; those of several vectors only."""
        added, concepts = set(self.backend.added_tokens_encoder), {}
        for token in sorted(added):
            numbered = (f"{token}_{i}" for i in count(1))
            if further := list(takewhile(added.__contains__, numbered)):
                concepts[token] = " ".join([token, *further])
        return concepts

    def _expand_concepts(self, text: str) -> str:
        if candidates := [token for token in self.concepts if token in text]:
            tokens = set(self.backend.tokenize(text))
            for token in candidates:
                text = text.replace(token, self.concepts[token]) if token in tokens else text
        return text

    def __call__(self, texts: str | Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        texts = preprocess(texts) if self.clean else texts
        texts = list(map(self._expand_concepts, texts)) if self.textual_inversion else texts
        untruncated = self.backend(texts, truncation=False)["input_ids"]
        long = [len(ids) for ids in untruncated if len(ids) > length]
        if long:
            log.warning(
                "%d of %d prompts are longer than the %d tokens that are read (the longest has "
                "%d): they were truncated",
                *(len(long), len(texts), length, max(long)),
            )
        # SigLIP's files leave the mask out.
        out = self.backend(
            texts,
            truncation=True,
            padding="max_length",
            max_length=length,
            return_attention_mask=True,
        )
        ids_BL = np.asarray(out["input_ids"], np.int32)
        if self.vocab_size is not None and ids_BL.max(initial=0) >= self.vocab_size:
            raise InputError(
                f"{self.backend.name_or_path}: found token {ids_BL.max()}; expected ids below "
                f"{self.vocab_size}, the text encoder's vocab_size"
            )
        return ids_BL, np.asarray(out["attention_mask"], np.int32)


def load_tokenizer(
    folder: str | Path,
    class_name: str = "T5Tokenizer",
    *,
    clean: bool = True,
    vocab_size: int | None = None,
    textual_inversion: bool = False,
) -> Tokenizer:
    """Load a tokenizer from a local folder; nothing is downloaded.

    Args:
      folder: with the tokenizer's files.
      class_name: as in model_index.json.
      clean, vocab_size, textual_inversion: see `Tokenizer`.

    Raises: InputError for another class, a folder without its files, or with files that are not
      such a tokenizer's.
    """
    folder, kind = Path(folder), class_name.removesuffix("Fast")
    if kind not in FILES:
        raise InputError(f"{folder}: found a {class_name}; expected one of {', '.join(FILES)}")
    expected = f"expected a {kind.removesuffix('Tokenizer')} tokenizer ({' or '.join(FILES[kind])})"
    # Without them transformers would invent a vocabulary of special tokens.
    if not any((folder / name).is_file() for name in FILES[kind]):
        raise InputError(f"{folder}: found no tokenizer file; {expected}")
    merges = (folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file()
    if kind == "Qwen2Tokenizer" and not merges:  # it would spell all words in bytes
        raise InputError(f"{folder}: found no merges.txt; expected it beside vocab.json")

    import transformers

    with _refusing(folder, expected):
        _check_files(folder)
        loader = getattr(transformers, kind)
        backend = loader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    if kind == "GemmaTokenizer":  # SanaPipeline sets it, whatever the files have
        backend.padding_side = "right"
    # transformers makes a tokenizer even from an empty or foreign vocabulary.
    if kind == "T5Tokenizer":
        if (ids := backend.convert_tokens_to_ids(list(SPECIAL))) != [0, 1, 2]:
            raise InputError(f"{folder}: found ids {ids} for {', '.join(SPECIAL)}; {expected}")
    elif backend.pad_token_id is None or len(backend) < 3:
        raise InputError(f"{folder}: found {len(backend)} tokens and no padding; {expected}")
    with _refusing(folder, expected):  # some faults show only in a call
        ids, _ = Tokenizer(backend, clean)(TRIAL_TEXTS, 64)
        if ids.min() < 0:
            raise ValueError(f"id {ids.min()}")
    return Tokenizer(backend, clean, vocab_size, textual_inversion)


@contextmanager
def _refusing(folder: Path, expected: str) -> Iterator[None]:
    """Turn errors of tokenizers into InputError: any Exception, and a panic of the Rust library."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: found unreadable files ({reason}); {expected}") from error


def _check_files(folder: Path) -> None:
    """Check untrusted tokenizer files before transformers opens them.

    Settings other than tokens are passed to the tokenizer's class as they are in the file.

    Raises: InputError for files that would crash transformers, or make it open other files.
    """
    check_no_escape(folder, folder.parent)
    for path in folder.iterdir():
        if path.suffix in WEIGHTS:
            continue
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: found more than {MAX_FILE_BYTES} bytes; expected a tokenizer's file"
            )
        if path.name in KNOWN_FILES:
            with open_file(path, "a tokenizer's file"):
                pass  # raises for a Git LFS pointer
        if path.suffix == ".json" and not is_macos_metadata(path.name):
            _check_settings(path, read_json(path, MAX_FILE_BYTES))


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if path.name == "tokenizer_config.json":
        wrong = [key for key in REFUSED_SETTINGS if settings.get(key)]
        extra = settings.get("extra_ids", 0)  # transformers makes as many tokens
        if type(extra) is not int or not 0 <= extra <= MAX_EXTRA_IDS:
            raise InputError(
                f"{path}: found extra_ids {short_repr(extra)}; expected an integer, at most "
                f"{MAX_EXTRA_IDS}"
            )
    elif path.name == "special_tokens_map.json":
        wrong = [key for key in settings if not key.endswith(("_token", "_tokens"))]
    else:
        return
    if wrong:
        raise InputError(f"{path}: found {wrong[0]}; expected settings that name no files")
    added = settings.get("added_tokens_decoder")
    for number in added if isinstance(added, dict) else ():
        # transformers makes tokens up to the largest id.
        if not re.fullmatch(r"\d{1,7}", number):
            raise InputError(f"{path}, added_tokens_decoder: found {number}; expected ids")


def build_word_tokenizer(words: Sequence[str]) -> "T5Tokenizer":
    """Build a T5 tokenizer with one token for each of `words`: word i has id 3 + i.

    The words are followed by a bare space and the letters a to z, far less likely, so that any
    other lower-case text is spelt; other characters are <unk>. There are no <extra_id_*>.

    Raises: InputError for a word that is repeated, or that preprocessing or splitting at white
    space would change.
    """
    for word in words:
        if not word or word != word.lower() or word.split() != [word] or SPACE in word:
            raise InputError(f"words: found {word!r}; expected a lower-case word without spaces")
    if len(set(words)) != len(words):
        repeated = next(word for word in words if list(words).count(word) > 1)
        raise InputError(f"words: found {repeated!r} more than once; expected distinct words")

    from transformers import T5Tokenizer

    # Log probabilities: a word must beat every way to spell it.
    return T5Tokenizer(
        vocab=[
            *((token, 0.0) for token in SPECIAL),
            *((SPACE + word, -1.0) for word in words),
            (SPACE, -10.0),
            *((letter, -10.0) for letter in string.ascii_lowercase),
        ],
        extra_ids=0,
    )
