"""Feature networks, preprocessing, caches, prompt lists of outside scripts and their numbers for
fuzz.py: valid ones, and the readers that commands use for them."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from one_input import Target

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))  # for a script; pytest has it there

from gadjax.evaluation.external import read_external  # noqa: E402
from gadjax.evaluation.layouts import open_layout  # noqa: E402
from gadjax.features import shapes as bundled  # noqa: E402
from gadjax.features.cache import FeatureCache  # noqa: E402
from gadjax.features.open import open_extractor  # noqa: E402
from gadjax.formats.safetensors_file import write_safetensors  # noqa: E402
from gadjax.formats.state_dict import expected_shapes  # noqa: E402
from gadjax.models.module import functional  # noqa: E402
from gadjax.models.vision.config import read_vision_config  # noqa: E402
from gadjax.models.vision.keymap import vision_keymap  # noqa: E402
from gadjax.models.vision.vit import build  # noqa: E402

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
SMALL |= {"image_size": 8, "intermediate_size": 8}
CONFIGS = {
    "clip": {"model_type": "clip", "vision_config": SMALL, "projection_dim": 4},
    "siglip": {"model_type": "siglip", "vision_config": SMALL},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, "use_swiglu_ffn": True} | SMALL,
    "dinov3": {"model_type": "dinov3_vit", "num_register_tokens": 1, "use_gated_mlp": True} | SMALL,
}
STYLES = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}}
PROMPTS = ["a red circle", "two cats", "ein blaues Viereck"]


def make_network(kind: str, folder: Path) -> None:
    config = read_vision_config(CONFIGS[kind])
    shapes = expected_shapes(functional(build(config)).abstract, vision_keymap(config))
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.standard_normal(shape).astype(np.float32) for key, (_, _, shape) in shapes.items()
    }
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    recipe = STYLES | {"crop_size": {"height": 8, "width": 8}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))


def make_bundled(folder: Path) -> None:
    config = bundled.Config(8, (2, 3), 4, 5)
    bundled.save_features(folder, config, bundled.network(config).init(jax.random.key(0)))


def read_network(folder: Path) -> None:
    extractor = open_extractor("x", folder)
    prepared = extractor.recipe(np.zeros((12, 10, 3), np.uint8))
    assert prepared.dtype == np.float32 and prepared.shape[2] == 3
    assert str(extractor).isprintable()


def make_cache(folder: Path) -> None:
    cache = FeatureCache(folder, "aa", 4)
    images = np.zeros((3, 2, 2, 3), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None]
    cache(images, lambda part: np.ones((len(part), 4), np.float32))
    cache.write()


def read_cache(folder: Path) -> None:
    cache = FeatureCache(folder, "aa", 4)
    assert all(value.shape == (4,) and np.isfinite(value).all() for value in cache.rows.values())


def make_external(folder: Path) -> None:
    result = {"metric": "GenEval", "version": "16f1681", "row": "student", "value": 0.5, "n": 4}
    results = [result, result | {"row": "teacher", "low": 0.1, "high": 0.9}]
    results.append(result | {"metric": "HPSv3", "per_prompt": [1, 2.5, 3]})
    (folder / "external.json").write_text(json.dumps({"results": results}))


def read_numbers(folder: Path) -> None:
    for result in read_external(folder / "external.json", 3):
        assert f"{result['metric']} {result['version']} {result['row']}".isprintable()


def make_layout_prompts(name: str, folder: Path) -> None:
    more = {
        "geneval": {"tag": "single_object", "include": [{"class": "cat", "count": 1}]},
        "hpsv2": {"style": "photo"},
    }
    lines = []
    for number, text in enumerate(PROMPTS):
        record = {"prompt": text} | more.get(name, {"id": f"item{number}"})
        lines.append(json.dumps(record) + "\n")
    (folder / "p.jsonl").write_text("".join(lines))


def read_layout(name: str, folder: Path) -> None:
    per_prompt = {"dpg": 4, "hpsv2": 1}.get(name, 2)
    layout = open_layout(name, folder / "p.jsonl", per_prompt)
    paths = [layout.names(p, n) for p in range(len(layout.prompts)) for n in range(per_prompt)]
    for path in [*paths, *layout.files]:
        assert not Path(path).is_absolute() and ".." not in Path(path).parts
        assert all(len(part.encode()) <= 255 for part in Path(path).parts)
    assert len(set(paths)) == len(paths) // layout.grid


TARGETS = [
    *(Target(f"vision-{kind}", partial(make_network, kind), read_network) for kind in CONFIGS),
    Target("vision-bundled", make_bundled, read_network),
    Target("feature-cache", make_cache, read_cache),
    Target("external", make_external, read_numbers),
    *(
        Target(f"layout-{name}", partial(make_layout_prompts, name), partial(read_layout, name))
        for name in ("geneval", "t2i-compbench", "dpg", "hpsv2", "pairs")
    ),
]
