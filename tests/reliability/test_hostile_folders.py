"""Weight folders from strangers: nothing hangs, fills the memory, leads out or is run."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from checkpoints import STEM, edit, refused
from fuzz import fuzz
from hostile_folders import TARGETS

from gadjax.errors import InputError
from gadjax.formats.diffusers_folder import check_pipeline
from gadjax.formats.diffusers_writer import write_pipeline
from gadjax.formats.fingerprints import text_fingerprint
from gadjax.formats.orbax_folder import open_folder
from gadjax.formats.schedulers import sampler_from_config
from gadjax.io.untrusted import check_no_escape, read_json
from gadjax.models.registry import read_network
from gadjax.models.text.tokenizer import build_word_tokenizer, load_tokenizer
from gadjax.pipelines.pipeline import abstract_pipeline

pytestmark = pytest.mark.usefixtures("hurry")
CHEAP = ("weights", "shards", "recipe", "lora", "lora-info")
MORE = max(60, int(os.environ.get("GADJAX_SWEEP", 0)))  # inputs of a target in the slow tier


def linked(path: Path, target) -> Path:
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    "name", ["vae/config.json", f"vae/{STEM}.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_link_that_leads_out(tiny_pipeline, tmp_path, name):
    source = shutil.copytree(tiny_pipeline, tmp_path / "source")
    outside = tmp_path / "outside"
    shutil.copyfile(source / name, outside)
    path = linked(source / name, outside)
    refused(lambda: check_pipeline(source), path, f"a link to {outside}")
    linked(path, Path("..", "..", "outside"))
    refused(lambda: check_pipeline(source), path, f"a link to {outside}")
    linked(path, Path("..", "inside"))
    shutil.copyfile(outside, source / "inside")
    check_pipeline(source)


def test_other_things_in_a_folder(tiny_pipeline, tmp_path):
    def damaged(name, change, *words):
        source = shutil.copytree(tiny_pipeline, tmp_path / name)
        change(source)
        refused(lambda: check_pipeline(source), *words)

    damaged("a", lambda s: (s / "LICENSE").symlink_to("/etc/passwd"), "LICENSE", "/etc/passwd")
    damaged("b", lambda s: os.mkfifo(s / "tokenizer" / "pipe"), "pipe", "no regular file")
    damaged("c", lambda s: (s / "vae" / "loop").symlink_to(s), "loop", "a link to a folder")
    damaged("d", lambda s: (s / "vae" / "a").symlink_to("a"), "symbolic links")
    outside = shutil.copytree(tiny_pipeline / "vae", tmp_path / "vae")
    damaged("e", lambda s: linked(s / "vae", outside), "vae", "a link to")


def test_the_hubs_cache_is_read(tiny_pipeline, tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    shutil.copytree(tiny_pipeline, snapshot)
    blobs.mkdir()
    for i, path in enumerate(p for p in sorted(snapshot.rglob("*")) if p.is_file()):
        path.rename(blobs / str(i))
        path.symlink_to(os.path.relpath(blobs / str(i), path.parent))
    written = write_pipeline(check_pipeline(snapshot), tmp_path / "written", {})
    assert not any(path.is_symlink() for path in written.rglob("*"))
    assert text_fingerprint(snapshot) == text_fingerprint(tiny_pipeline)
    load_tokenizer(snapshot / "tokenizer")
    other = tmp_path / "models--other" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    linked(snapshot / "vae" / "config.json", other)
    refused(lambda: check_pipeline(snapshot), "config.json", f"a link to {other}")


@pytest.fixture
def words(tmp_path):
    build_word_tokenizer(["red", "green"]).save_pretrained(tmp_path / "pipeline" / "tokenizer")
    return tmp_path / "pipeline" / "tokenizer"


def test_a_tokenizers_code_is_neither_run_nor_asked_for(words, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (words / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Words: pass\n")
    code = {"AutoTokenizer": ["code.Words", "code.Words"]}
    edit(words / "tokenizer_config.json", auto_map=code, tokenizer_class="Words")
    ids, _ = load_tokenizer(words)(["red"], 4)
    assert ids[0, 0] == 3 and not (tmp_path / "ran").exists()


def test_a_tokenizers_settings_name_no_files(words, tmp_path):
    config = words / "tokenizer_config.json"
    clean = config.read_text()
    for key, value in (
        ("fast_tokenizer_files", ["../../other/tokenizer.4.0.json"]),
        ("vocab", "/etc/passwd"),
        ("init_inputs", ["/etc/passwd"]),
    ):
        edit(config, **{key: value})
        refused(lambda: load_tokenizer(words), "tokenizer_config.json", f"found {key};")  # noqa: B023
        config.write_text(clean)
    edit(config, added_tokens_decoder={str(10**12): {"content": "x"}})
    refused(lambda: load_tokenizer(words), "added_tokens_decoder", 10**12)
    config.write_text(clean)
    (words / "special_tokens_map.json").write_text('{"vocab_file": "/etc/passwd"}')
    refused(lambda: load_tokenizer(words), "special_tokens_map.json", "found vocab_file;")


def test_a_panic_is_refused_and_an_interrupt_is_not(words, monkeypatch):
    import transformers

    class PanicException(BaseException):
        pass

    for error, raised in ((PanicException("a\nb"), InputError), (KeyboardInterrupt(),) * 2):
        monkeypatch.setattr(
            transformers.T5Tokenizer,
            "from_pretrained",
            lambda *_, e=error, **__: (_ for _ in ()).throw(e),
        )
        with pytest.raises(raised if isinstance(raised, type) else KeyboardInterrupt):
            load_tokenizer(words)


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_layers", 10**6),
        ("num_layers", -1),
        ("num_layers", True),
        ("sample_size", 10**6),
        ("num_attention_heads", 10**9),
        ("norm_eps", float("nan")),
        ("norm_eps", 10**400),
        ("caption_channels", "20"),
        ("attention_head_dim", [12]),
        ("attention_bias", "yes"),
        ("caption_channels", 1 << 22),
    ],
)
def test_a_network_that_cannot_be(tiny_pipeline, key, value):
    path = tiny_pipeline / "transformer" / "config.json"
    config = read_json(path) | {key: value}
    if value == 1 << 22:  # allowed for itself
        config |= {"num_attention_heads": 1 << 20}
    refused(lambda: read_network(path, "PixArtTransformer2DModel", config), path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_train_timesteps", 10**9),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10.5),
        ("beta_start", float("nan")),
        ("beta_end", 2),
        ("steps_offset", float("inf")),
        ("steps_offset", 10**400),
        ("solver_order", [2]),
        ("_class_name", {}),
        ("prediction_type", "x" * 10**5),
    ],
)
def test_a_scheduler_that_cannot_be(tiny_pipeline, key, value):
    config = read_json(tiny_pipeline / "scheduler" / "scheduler_config.json") | {key: value}
    refused(lambda: sampler_from_config(config), key)


def test_parts_without_end(tmp_path):
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "up").symlink_to(".")
    refused(lambda: check_no_escape(deep, tmp_path), "up", "a link to a folder")


def test_names_in_a_gadjax_folder_stay_inside(tiny_pipeline, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(tiny_pipeline, folder)
    for name in ("..", "a/b", "/etc"):
        manifest = {"version": 1, "text": "", "networks": {name: {"fingerprint": "0"}}}
        (folder / "gadjax_folder.json").write_text(json.dumps(manifest))
        refused(lambda: open_folder(folder), "gadjax_folder.json", "no networks")


@pytest.mark.parametrize("entry", [["transformers", 1.5], ["transformers"], "T5Tokenizer", 7])
def test_a_tokenizer_of_no_class(tiny_pipeline, tmp_path, entry):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    index = read_json(folder / "model_index.json") | {"tokenizer": entry}
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(lambda: abstract_pipeline(folder), "tokenizer")


@pytest.mark.parametrize("target", [t for t in TARGETS if t.name in CHEAP], ids=lambda t: t.name)
def test_mutants(target, tmp_path):
    tally = fuzz(target, 60, 1, tmp_path)
    assert not tally.findings and sum(tally.kinds.values()) == 60 and tally.kinds["refused"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_more_mutants(target, tmp_path):
    signal.alarm(0)
    assert not fuzz(target, MORE, 2, tmp_path).findings
