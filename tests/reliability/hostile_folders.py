"""Weight folders for fuzz.py: a valid one, and the reader of gadjax that commands use for it."""

import json
import shutil
import sys
import tempfile
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
from one_input import Target

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))  # for a script; pytest has it there

from gadjax.formats.diffusers_folder import read_pipeline  # noqa: E402
from gadjax.formats.fingerprints import text_fingerprint  # noqa: E402
from gadjax.formats.lora_header import DIFFUSERS_WEIGHTS, SAMPLING  # noqa: E402
from gadjax.formats.lora_info import lora_lines  # noqa: E402
from gadjax.formats.lora_names import kohya_name, layers_of  # noqa: E402
from gadjax.formats.lora_writer import KEYS, Pair, write_diffusers, write_peft  # noqa: E402
from gadjax.formats.orbax_folder import open_folder, write_gadjax_folder  # noqa: E402
from gadjax.formats.safetensors_file import write_safetensors  # noqa: E402
from gadjax.formats.sampling_config import SamplingConfig, read_sampling, read_world  # noqa: E402
from gadjax.formats.scheduler_config import student_scheduler_config  # noqa: E402
from gadjax.formats.schedulers import sampler_from_config  # noqa: E402
from gadjax.formats.weights import open_weights, write_weights  # noqa: E402
from gadjax.io.untrusted import read_json  # noqa: E402
from gadjax.models.registry import read_network  # noqa: E402
from gadjax.models.text.tokenizer import load_tokenizer  # noqa: E402
from gadjax.pipelines.adapted import merge_loras  # noqa: E402
from gadjax.pipelines.pipeline import (  # noqa: E402
    abstract_pipeline,
    load_pipeline,
    make_pipeline,
)
from gadjax.training.config import default_config  # noqa: E402
from gadjax.training.lora_start import read_adapters  # noqa: E402

PROMPTS = ["a red circle above", ""]
CLASSES = {  # class -> family and part that has it
    "UNet2DConditionModel": ("sd15", "unet"),
    "PixArtTransformer2DModel": ("pixart", "transformer"),
    "SanaTransformer2DModel": ("sana_sprint", "transformer"),
    "SD3Transformer2DModel": ("sd35", "transformer"),
    "FluxTransformer2DModel": ("flux_dev", "transformer"),
    "Flux2Transformer2DModel": ("flux2_klein", "transformer"),
    "ZImageTransformer2DModel": ("z_image", "transformer"),
    "Lumina2Transformer2DModel": ("lumina2", "transformer"),
    "CLIPTextModel": ("sd15", "text_encoder"),
    "CLIPTextModelWithProjection": ("sd3", "text_encoder"),
    "T5EncoderModel": ("sd3", "text_encoder_3"),
    "Gemma2Model": ("sana", "text_encoder"),
    "Qwen3Model": ("z_image", "text_encoder"),
    "AutoencoderKL": ("sd3", "vae"),
    "AutoencoderDC": ("sana", "vae"),
    "AutoencoderKLFlux2": ("flux2_klein", "vae"),
}
SCHEDULERS = ("sd15", "sd2_v", "sdxl", "sana", "sana_sprint", "sd3", "pixart")


def make_family(family: str, folder: Path) -> None:
    shutil.copytree(_family(family), folder, dirs_exist_ok=True)


def _family(family: str) -> Path:
    """Its folder, made once for all processes: diffusers takes long to import."""
    makers = b"".join((TESTS / name).read_bytes() for name in ("families.py", "tiny_run.py"))
    kept = Path(tempfile.gettempdir(), f"gadjax-families-{zlib.crc32(makers):08x}")
    if not (kept / family).exists():
        kept.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=kept))
        if family == "pixart":
            from tiny_run import write_pipeline

            write_pipeline(made)
        else:
            import families

            families.make(family, made)
        made.rename(kept / family)
    return kept / family


def make_parts(parts: dict[str, tuple[str, str]], folder: Path) -> None:
    """parts: path in the folder -> (family, path in its folder)."""
    for name, (family, path) in parts.items():
        source = _family(family) / path
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)


def make_weights(folder: Path, **options) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (7, 3, 2, 2), "b.weight": (5, 7), "b.bias": (5,), "scale": (), "e": (0,)}
    tensors = {key: np.float32(rng.standard_normal(shape)) for key, shape in shapes.items()}
    write_weights(folder, "diffusion_pytorch_model", tensors.items(), **options)


def make_pickle(folder: Path) -> None:
    import torch

    tensors = {"a": torch.arange(60.0).reshape(5, 12), "b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")


def read_weights(folder: Path, **options) -> None:
    for _, value in open_weights(folder, **options):
        value.sum()


def read_config(class_name: str, folder: Path) -> None:
    path = folder / "config.json"
    read_network(path, class_name, read_json(path))


def read_schedulers(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        config = read_json(path)
        sampler = sampler_from_config(config)
        times = sampler.times(4)
        if path.stem != "sana_sprint":
            student_scheduler_config(config, times[:-1].tolist(), "PixArtAlphaPipeline")


def make_vocabulary(folder: Path) -> None:
    """CLIP's older files."""
    import families

    tokenizer = families.clip_tokenizer("!")
    held = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(held["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in held["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"a": "b.c"}, **special}))


def make_sentencepiece(folder: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle above a blue square", "two green dogs"] * 5),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 0}')


def read_tokenizer(class_name: str, folder: Path) -> None:
    load_tokenizer(folder, class_name)(PROMPTS, 8)


def make_gadjax_folder(folder: Path) -> None:
    source = _family("pixart")
    write_gadjax_folder(read_pipeline(source), folder, text_fingerprint(source))


def make_lora(folder: Path) -> None:
    """A file of kohya's names, one of diffusers' with metadata, and a folder of PEFT."""
    pipeline, rng = _folder("sd15"), np.random.default_rng(0)
    layers = layers_of(pipeline.components["unet"])
    pairs = {}
    for name in [name for name in sorted(layers) if ".attn2." in name or "proj_in" in name][:6]:
        shape = layers[name].shape
        a, b = (2, *shape[1:]), (shape[0], 2, *(1 for _ in shape[2:]))
        pairs[name] = Pair(*(rng.normal(size=s).astype(np.float32) for s in (a, b)))
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"attn2.to_q": 8}}
    metadata = {
        "lora_adapter_metadata": json.dumps(settings),
        SAMPLING: json.dumps({"steps": 2, "timesteps": [900, 400], "guidance": 1.0}),
    }
    for keys in KEYS:
        (folder / keys).mkdir()
        write_diffusers(folder / keys, "unet", pairs, keys=keys, metadata=metadata)
    (folder / "peft").mkdir()
    write_peft(folder / "peft", pairs)
    make_alphas(folder, pairs)


def make_alphas(folder: Path, pairs: dict[str, Pair]) -> None:
    """A file of kohya's with an alpha a module."""
    tensors = {}
    for number, (name, (a, b)) in enumerate(pairs.items()):
        stem = kohya_name(name)
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        tensors[f"{stem}.alpha"] = np.array(1.0 + number, np.float16 if number % 2 else np.float32)
    (folder / "alphas").mkdir()
    write_safetensors(folder / "alphas" / DIFFUSERS_WEIGHTS, tensors)


def make_xlabs(folder: Path) -> None:
    """A file of x-labs' names for FLUX.1."""
    layers = layers_of(_folder("flux_dev").components["transformer"])
    width = layers["transformer_blocks.0.attn.to_q"].shape[0]
    inputs = layers["single_transformer_blocks.0.proj_out"].shape[1]
    rng, tensors = np.random.default_rng(0), {}
    for stem, rows, columns in (
        ("double_blocks.0.processor.qkv_lora1", 3 * width, width),
        ("double_blocks.1.processor.proj_lora2", width, width),
        ("single_blocks.0.processor.qkv_lora", 3 * width, width),
        ("single_blocks.1.processor.proj_lora", width, inputs),
    ):
        tensors[f"{stem}.down.weight"] = rng.normal(size=(2, columns)).astype(np.float32)
        tensors[f"{stem}.up.weight"] = rng.normal(size=(rows, 2)).astype(np.float32)
    (folder / "xlabs").mkdir()
    write_safetensors(folder / "xlabs" / DIFFUSERS_WEIGHTS, tensors)


def make_loras(folder: Path) -> None:
    make_lora(folder)
    make_xlabs(folder)


LORAS = {name: "sd15" for name in (*KEYS, "peft", "alphas")} | {"xlabs": "flux_dev"}


def _changed(folder: Path) -> list[str]:
    """Names of the LoRAs of which a file is not the valid one; of all where every file is."""
    return [name for name in LORAS if _bytes(folder / name) != _valid_loras()[name]] or list(LORAS)


def _bytes(folder: Path) -> dict[str, bytes | None]:
    """Content of the files in a folder; None for what is no regular file."""
    paths = list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    regular = {path: path.is_file() and not path.is_symlink() for path in paths}
    return {path.name: path.read_bytes() if yes else None for path, yes in regular.items()}


@cache
def _valid_loras() -> dict[str, dict[str, bytes | None]]:
    with tempfile.TemporaryDirectory() as made:
        make_loras(Path(made))
        return {name: _bytes(Path(made, name)) for name in LORAS}


def read_loras(folder: Path) -> None:
    """As `gadjax sample --lora` does."""
    for name in _changed(folder):
        pipeline = _folder(LORAS[name])
        params = {name: part.params for name, part in pipeline.components.items()}
        merge_loras(pipeline, params, [(folder / name, 0.5)])


def read_lora_lines(folder: Path) -> None:
    """As `gadjax lora info` does, of files whose pipeline is not there."""
    for name in _changed(folder):
        lines = lora_lines(folder / name)
        assert all(line.isprintable() for line in lines), lines


def read_starts(folder: Path) -> None:
    """As `gadjax train --config.student.init=LORA` does, and as `gadjax plan` before it."""
    config = default_config()
    config.student.lora.update(rank=2, targets="attn2|attn(_context)?/|proj_(in|out)")
    for name in _changed(folder):
        config.student.init = str(folder / name)
        for abstract in (True, False):
            read_adapters(config, "student", _pipeline(LORAS[name]), abstract)


@cache
def _folder(family: str):
    return read_pipeline(_family(family))


@cache
def _pipeline(family: str):
    return make_pipeline(_folder(family))


def make_recipe(folder: Path) -> None:
    recipe = {"steps": 2, "timesteps": [900, 400], "guidance": 1.5, "length": 8, "world": "shapes"}
    (folder / "gadjax.json").write_text(json.dumps(recipe | {"scale": 2.0, "eta": 0.3}))


def read_recipe(folder: Path) -> None:
    read_sampling(folder, SamplingConfig())
    read_world(folder)


def read_everything(folder: Path) -> None:
    """As the commands do."""
    open_folder(folder, components=())
    text_fingerprint(folder)
    pipeline, _ = load_pipeline(folder)
    sampling = read_sampling(folder, pipeline.sampling)
    pipeline.tokens(PROMPTS, sampling.length)


def read_outline(folder: Path) -> None:
    """As `gadjax plan` does."""
    pipeline, _ = abstract_pipeline(folder)
    pipeline.tokens(PROMPTS, read_sampling(folder, pipeline.sampling).length)


def _json(family: str, part: str, name: str) -> dict[str, tuple[str, str]]:
    return {name: (family, f"{part}/{name}")}


TARGETS = [
    Target("weights", make_weights, read_weights),
    Target("shards", partial(make_weights, max_shard_bytes=150), read_weights),
    Target("pickle", make_pickle, partial(read_weights, allow_pickle=True)),
    Target("recipe", make_recipe, read_recipe),
    Target("lora", make_loras, read_loras),
    Target("lora-info", make_loras, read_lora_lines),
    Target("lora-start", make_loras, read_starts),
    *(
        Target(
            f"config-{name}",
            partial(make_parts, _json(*place, "config.json")),
            partial(read_config, name),
        )
        for name, place in CLASSES.items()
    ),
    Target(
        "scheduler",
        partial(
            make_parts,
            {f"{f}.json": (f, "scheduler/scheduler_config.json") for f in SCHEDULERS},
        ),
        read_schedulers,
    ),
    *(
        Target(
            f"tokenizer-{name}",
            partial(make_parts, {".": (family, part)}),
            partial(read_tokenizer, class_name),
        )
        for name, family, part, class_name in (
            ("t5", "pixart", "tokenizer", "T5Tokenizer"),
            ("clip", "sd15", "tokenizer", "CLIPTokenizer"),
            ("gemma", "sana", "tokenizer", "GemmaTokenizer"),
            ("qwen", "z_image", "tokenizer", "Qwen2Tokenizer"),
        )
    ),
    Target("tokenizer-vocabulary", make_vocabulary, partial(read_tokenizer, "CLIPTokenizer")),
    Target("tokenizer-sentencepiece", make_sentencepiece, partial(read_tokenizer, "T5Tokenizer")),
    *(
        Target(f"pipeline-{family}", partial(make_family, family), read_everything)
        for family in (
            *("pixart", "sdxl", "sana", "sd3", "flux_dev", "z_image", "lumina2"),
            "flux2_klein",
        )
    ),
    *(
        Target(f"outline-{family}", partial(make_family, family), read_outline)
        for family in ("pixart", "sd3", "flux_dev")
    ),
    Target("own", make_gadjax_folder, read_everything),
]
