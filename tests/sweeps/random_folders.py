"""Folders as several versions of diffusers and transformers leave them, drawn at random."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from random_configs import class_of
from safetensors.torch import load_file, save_file
from sweeping import Choice

VERSIONS = ("0.2.2", "0.6.0", "0.8.0", "0.18.0.dev0", "0.22.0.dev0", "0.30.3", "0.42.0", None)
TRANSFORMERS = ("4.19.2", "4.25.0.dev0", "4.41.2", "5.0.0", None)
# What older versions wrote beside the options.
OLD_KEYS = {
    "return_dict": True,
    "torchscript": False,
    "problem_type": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "output_attentions": False,
    "task_specific_params": None,
    "transformers_weights": None,
}
ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Move every parameter and every buffer that is saved."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))


def save(model, folder: Path, pick: Choice, generator: torch.Generator) -> tuple[str | None, bool]:
    """Write a model whole or in shards, in one precision or another, plain or as a variant; at
    times over what an earlier save has left.

    Returns: the variant, and whether there is nothing but it.
    """
    if earlier := pick.chance(0.1):
        model.save_pretrained(folder, max_shard_size=pick("4KB", "1GB"))
        randomise(model, generator)
    options: dict[str, Any] = {"max_shard_size": pick("1GB", "1GB", "1GB", "4KB", "20KB")}
    if variant := pick(*[None] * 4, "fp16"):
        options["variant"] = variant
    if variant or pick.chance(0.15):
        model = model.to(pick(torch.float16, torch.bfloat16))
    model.save_pretrained(folder, **options)
    return variant, not earlier


def defaults_of(name: str) -> dict[str, Any]:
    kind = class_of(name)
    parameters = inspect.signature(getattr(kind, "config_class", kind).__init__).parameters
    return {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def edit(path: Path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2))


def age(name: str, folder: Path, pick: Choice) -> None:
    """Change config.json and the weights' keys as other versions would have written them."""
    of_transformers = hasattr(class_of(name), "config_class")

    def change(config: dict[str, Any]) -> None:
        drop_defaults(name, config, pick)
        for key in pick.some(["unused_option", "another_one"], 0.1):
            config[key] = pick(None, None, None, 3)
        if pick.chance(0.5):
            config["_name_or_path"] = pick("", "/home/somebody/model", "some/repository")
        (change_transformers if of_transformers else change_diffusers)(name, config, pick)

    edit(folder / "config.json", change)
    for path in folder.glob("*.safetensors"):
        if not list(folder.glob("*.index*.json")):
            rename_keys(name, path, pick)


def drop_defaults(name: str, config: dict[str, Any], pick: Choice) -> None:
    """Leave out redundant keys: some, or all, or none."""
    share = pick(0.0, 0.3, 1.0)
    defaults = defaults_of(name)
    for key in list(config):
        if key in defaults and plain(config[key]) == plain(defaults[key]) and pick.chance(share):
            del config[key]


def plain(value: Any) -> Any:
    return list(map(plain, value)) if isinstance(value, list | tuple) else value


def change_diffusers(name: str, config: dict[str, Any], pick: Choice) -> None:
    config.pop("_diffusers_version", None)
    if version := pick(*VERSIONS):
        config["_diffusers_version"] = version
    if name == "Transformer2DModel":
        config["_class_name"] = name
        config.setdefault("norm_type", "ada_norm_single")
        for key, value in (("num_vector_embeds", None), ("double_self_attention", False)):
            if pick.chance(0.5):
                config[key] = value
        for key in pick.some(["only_cross_attention", "use_linear_projection"]):
            config[key] = False
    elif pick.chance(0.1):
        config.pop("_class_name", None)
    if pick.chance(0.15):
        options = [key for key in config if key[0] != "_"]
        config["_use_default_values"] = pick.some(options, 0.1)


def change_transformers(name: str, config: dict[str, Any], pick: Choice) -> None:
    config.pop("transformers_version", None)
    if version := pick(*TRANSFORMERS):
        config["transformers_version"] = version
    if pick.chance(0.5):
        config["torch_dtype"] = config.pop("dtype", "float32")
    for key in pick.some(list(OLD_KEYS), 0.2):
        config[key] = OLD_KEYS[key]
    for key in pick.some(["architectures", "model_type"], 0.15):
        config.pop(key, None)
    if name == "T5EncoderModel":
        for key in pick.some(["dense_act_fn", "is_gated_act", "scale_decoder_outputs"]):
            config.pop(key, None)
        if pick.chance(0.3):
            config["tie_word_embeddings"] = pick(True, False)
        if pick.chance(0.2):
            config["n_positions"] = 512
    if name in ("Gemma2Model", "Qwen3Model"):
        rope = config.get("rope_parameters")
        if rope and rope["rope_type"] == "default" and pick.chance(0.4):
            del config["rope_parameters"]
            config["rope_theta"] = rope["rope_theta"]
            if pick.chance(0.3):
                config["rope_scaling"] = None
    if name == "Gemma2Model":
        if pick.chance(0.3):
            config["hidden_act"] = "gelu_pytorch_tanh"
        if pick.chance(0.2):
            config["cache_implementation"] = "hybrid"
    if name.startswith("CLIP") and pick.chance(0.05):  # of the whole CLIP
        text = dict(config)
        config.clear()
        config.update(model_type="clip", architectures=["CLIPModel"], text_config=text)


def rename_keys(name: str, path: Path, pick: Choice) -> None:
    """Spell the keys of a whole file as other versions do."""
    held = load_file(path)
    tensors = dict(held)
    if name == "AutoencoderKL" and pick.chance(0.3):
        for new, old in ATTENTION.items():
            tensors = {
                re.sub(
                    rf"(mid_block\.attentions\.\d+)\.{re.escape(new)}\.", rf"\1.{old}.", key
                ): value
                for key, value in tensors.items()
            }
    if name == "CLIPTextModel" and pick.chance(0.4):
        prefixed = any(key.startswith("text_model.") for key in tensors)
        tensors = {
            key.removeprefix("text_model.") if prefixed else f"text_model.{key}": value
            for key, value in tensors.items()
        }
    if name.startswith("CLIP") and pick.chance(0.3):
        prefix = "text_model." if any(key.startswith("text_model.") for key in tensors) else ""
        count = next(v for k, v in tensors.items() if "position_embedding" in k).shape[0]
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(count)[None]
    if name == "T5EncoderModel" and pick.chance(0.4):
        table = tensors["shared.weight"]
        if pick.chance(0.5):
            del tensors["shared.weight"]
        tensors["encoder.embed_tokens.weight"] = table.clone()
    if tensors.keys() != held.keys():
        save_file(tensors, path, metadata={"format": "pt"})
