"""How PixArt's parameters are split over the devices of the "fsdp" axis."""

from jax.sharding import PartitionSpec as P

# The axis named is the one with the most factors of two: at width 1152 up to 128 devices.
RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)bias$", P()),
    (r"^blocks/attn[12]/to_(q|k|v|out)/kernel$", P(None, "fsdp", None)),
    (r"^blocks/ff/linear_1/kernel$", P(None, None, "fsdp")),
    (r"^blocks/ff/linear_2/kernel$", P(None, "fsdp", None)),
    (r"^blocks/scale_shift_table$", P(None, None, "fsdp")),
    (r"^adaln_single/linear/kernel$", P(None, "fsdp")),
    (r"^adaln_single/emb/\w+_embedder/linear_[12]/kernel$", P("fsdp", None)),
    (r"^caption_projection/linear_[12]/kernel$", P("fsdp", None)),
    (r"^pos_embed/proj/kernel$", P(None, None, None, "fsdp")),
    (r"^proj_out/kernel$", P("fsdp", None)),
    (r"^scale_shift_table$", P(None, "fsdp")),
)
