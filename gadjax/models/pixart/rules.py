"""How PixArt's parameters are split over the devices of the axes "fsdp" and "tensor"."""

from jax.sharding import PartitionSpec as P

# The dimension that fsdp cuts is the one with the most factors of two: at width 1152 up to 128
# devices, or 64 beside two of "tensor".
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
