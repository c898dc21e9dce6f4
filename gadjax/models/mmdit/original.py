"""Names of MMDiT's modules in the original releases of Stable Diffusion 3 and 3.5."""

from collections.abc import Collection

from gadjax.models.keymap import Original
from gadjax.models.mmdit.config import Config

OUTER = {
    "pos_embed": "pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}


def original(names: Collection[str], config: Config) -> dict[str, Original]:
    """Original modules with the modules in diffusers that their rows are.

    Args:
      names: of the modules in diffusers.
      config: the network's options.
    """
    table = {ours: Original((name,)) for ours, name in OUTER.items()}
    # Shift before scale there, after it in diffusers; so too in the text's part of the last block.
    table["final_layer.adaLN_modulation.1"] = Original(("norm_out.linear",), swapped=True)
    for number in range(config.num_layers):
        for ours, parts in BLOCK.items():
            last = number == config.num_layers - 1 and parts == ("norm1_context.linear",)
            modules = tuple(f"transformer_blocks.{number}.{part}" for part in parts)
            table[f"joint_blocks.{number}.{ours}"] = Original(modules, swapped=last)
    return {ours: entry for ours, entry in table.items() if names >= set(entry.modules)}
