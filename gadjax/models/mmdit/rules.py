"""Sharding rules of MMDiT's parameters, and the parameters that are not trained."""

from jax.sharding import PartitionSpec as P

# The table of position embeddings is part of the file and was never trained.
FROZEN: tuple[str, ...] = (r"^pos_embed/pos_embed$",)

STACK = r"^(dual_)?blocks/"
COLUMNS = r"(attn|attn_context|attn2)/to_[qkv]/kernel$"
ROWS = r"(attn|attn_context|attn2)/to_out/kernel$"

# The residual streams are replicated over "tensor", and so is their modulation.
# Each dimension named is a multiple of 128 at the published widths of 1536 and 2432. A "tensor"
# axis of more than two does not divide the 38 heads of the latter.
RULES: tuple[tuple[str, P], ...] = (
    (r"/(bias|scale)$", P()),
    (STACK + COLUMNS, P(None, "fsdp", "tensor")),
    (STACK + ROWS, P(None, "tensor", "fsdp")),
    (STACK + r"(ff|ff_context)/linear_1/kernel$", P(None, "fsdp", "tensor")),
    (STACK + r"(ff|ff_context)/linear_2/kernel$", P(None, "tensor", "fsdp")),
    (STACK + r"norm1(_context)?/linear/kernel$", P(None, "fsdp", None)),
    (r"^last_block/" + COLUMNS, P("fsdp", "tensor")),
    (r"^last_block/" + ROWS, P("tensor", "fsdp")),
    (r"^last_block/ff/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^last_block/ff/linear_2/kernel$", P("tensor", "fsdp")),
    (r"^last_block/norm1(_context)?/linear/kernel$", P("fsdp", None)),
    (r"^time_text_embed/\w+_embedder/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^time_text_embed/\w+_embedder/linear_2/kernel$", P("tensor", "fsdp")),
    (r"^context_embedder/kernel$", P("fsdp", None)),
    (r"^norm_out/linear/kernel$", P("fsdp", None)),
    (r"^proj_out/kernel$", P("fsdp", None)),
    (r"^pos_embed/proj/kernel$", P(None, None, None, "fsdp")),
    (r"^pos_embed/pos_embed$", P(None, None, "fsdp")),
)
