"""Sharding rules of PixArt's parameters over the mesh axes "fsdp" and "tensor"."""

from jax.sharding import PartitionSpec as P

# "fsdp" shards the dimension with the most factors of two: at width 1152 over up to 128 devices,
# or 64 with a "tensor" axis of 2.
RULES: tuple[tuple[str, P], ...] = (
    (r"bias$", P()),
    (r"^blocks/attn[12]/to_(q|k|v)/kernel$", P(None, "fsdp", "tensor")),
    (r"^blocks/attn[12]/to_out/kernel$", P(None, "tensor", "fsdp")),
    (r"^blocks/ff/linear_1/kernel$", P(None, "fsdp", "tensor")),
    (r"^blocks/ff/linear_2/kernel$", P(None, "tensor", "fsdp")),
    (r"^blocks/scale_shift_table$", P(None, None, "fsdp")),
    (r"^adaln_single/linear/kernel$", P(None, "fsdp")),
    (r"^adaln_single/emb/\w+_embedder/linear_[12]/kernel$", P("fsdp", None)),
    (r"^caption_projection/linear_[12]/kernel$", P("fsdp", None)),
    (r"^pos_embed/proj/kernel$", P(None, None, None, "fsdp")),
    (r"^proj_out/kernel$", P("fsdp", None)),
    (r"^scale_shift_table$", P(None, "fsdp")),
)
