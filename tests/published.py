"""Published repositories as folders of configurations, with small tokenizers in place of theirs.

Enough for an abstract pipeline or a plan. Nothing is downloaded.
"""

import functools
import json
from pathlib import Path

import families

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
TOKENIZERS = {
    "CLIPTokenizer": functools.partial(families.clip_tokenizer, "!"),
    "T5Tokenizer": lambda: families.t5(16)[0],
    "GemmaTokenizer": lambda: families.gemma(20)[0],
    "Qwen2Tokenizer": families.qwen2_tokenizer,
}


@functools.cache
def tokenizer(class_name: str):
    return TOKENIZERS[class_name.removesuffix("Fast")]()


def write_folder(name: str, parent: Path, **changes: dict) -> Path:
    """Write the repository's folder below `parent`; changes: PART={key: value} of a config."""
    folder = parent / name
    for path, content in PUBLISHED[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        content = content | changes.get(Path(path).parent.name, {})
        (folder / path).write_text(json.dumps(content))
    for part, value in PUBLISHED[name]["model_index.json"].items():
        if part.startswith("tokenizer"):
            tokenizer(value[1]).save_pretrained(folder / part)
    return folder
