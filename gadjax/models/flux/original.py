"""Names of FLUX.1's modules in the original release."""

from collections.abc import Collection, Mapping
from typing import Any

from gadjax.models.flux.config import Config
from gadjax.models.keymap import Original

OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}


def original(names: Collection[str], config: Config) -> dict[str, Original]:
    """Original modules with the modules in diffusers that their rows are.

    Args:
      names: of the modules in diffusers.
      config: the network's options.
    """
    return original_modules(names, config, OUTER, DOUBLE, SINGLE)


def original_modules(
    names: Collection[str],
    config: Any,
    outer: Mapping[str, str],
    double: Mapping[str, tuple[str, ...]],
    single: Mapping[str, tuple[str, ...]],
) -> dict[str, Original]:
    """Original modules of a network of double and single blocks, those that it has.

    Args:
      names: of the modules in diffusers.
      config: with the numbers of both kinds of blocks.
      outer: module outside of blocks in the original -> in diffusers.
      double, single: module of a block in the original -> its rows in diffusers.
    """
    table = {theirs: Original((name,)) for theirs, name in outer.items()}
    # Shift before scale there, after it in diffusers.
    table["final_layer.adaLN_modulation.1"] = Original(("norm_out.linear",), swapped=True)
    stacks = (
        ("double_blocks", "transformer_blocks", config.num_layers, double),
        ("single_blocks", "single_transformer_blocks", config.num_single_layers, single),
    )
    for theirs, ours, count, parts in stacks:
        for number in range(count):
            for name, modules in parts.items():
                rows = tuple(f"{ours}.{number}.{module}" for module in modules)
                table[f"{theirs}.{number}.{name}"] = Original(rows)
    return {name: entry for name, entry in table.items() if names >= set(entry.modules)}
