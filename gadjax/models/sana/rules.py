"""Sharding rules of Sana's parameters over the mesh axes "fsdp" and "tensor"."""

from jax.sharding import PartitionSpec as P

# The widths 1152 and 2240 and all hidden ones divide by 32. No rules for leaves of
# fewer than 65,536 elements: norms' weights and the biases of the width.
RULES: tuple[tuple[str, P], ...] = (
    (r"^blocks/attn[12]/to_(q|k|v)/kernel$", P(None, "fsdp", "tensor")),
    (r"^blocks/attn[12]/to_out/kernel$", P(None, "tensor", "fsdp")),
    (r"^blocks/ff/conv_inverted/kernel$", P(None, None, None, "fsdp", "tensor")),
    (r"^blocks/ff/conv_depth/kernel$", P(None, None, None, None, "fsdp")),
    (r"^blocks/ff/conv_point/kernel$", P(None, None, None, "tensor", "fsdp")),
    (r"^blocks/ff/conv_(inverted|depth)/bias$", P(None, "fsdp")),
    (r"^blocks/scale_shift_table$", P(None, None, "fsdp")),
    (r"^time_embed/linear/kernel$", P("fsdp", "tensor")),
    (r"^time_embed/.*_embedder/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^time_embed/.*_embedder/linear_2/kernel$", P("tensor", "fsdp")),
    (r"^caption_projection/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^caption_projection/linear_2/kernel$", P("tensor", "fsdp")),
    (r"^patch_embed/kernel$", P(None, None, None, "fsdp")),
    (r"^proj_out/kernel$", P("fsdp", None)),
)
