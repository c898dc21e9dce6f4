"""Names of PixArt's modules in the original release."""

from collections.abc import Collection

from gadjax.models.keymap import Original
from gadjax.models.pixart.net import Config

OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_block.1": "adaln_single.linear",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def original(names: Collection[str], config: Config) -> dict[str, Original]:
    """Original modules with the modules in diffusers that their rows are.

    Args:
      names: of the modules in diffusers.
      config: the network's options.
    """
    table = {ours: Original((name,)) for ours, name in OUTER.items()}
    for number in range(config.num_layers):
        for ours, parts in BLOCK.items():
            modules = tuple(f"transformer_blocks.{number}.{part}" for part in parts)
            table[f"blocks.{number}.{ours}"] = Original(modules)
    return table
