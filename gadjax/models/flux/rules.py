"""Sharding rules of FLUX.1's parameters over the mesh axes "fsdp" and "tensor"."""

from jax.sharding import PartitionSpec as P

# The residual streams are replicated over "tensor", and so is their modulation. Each dimension
# named is a multiple of 1024 at the published width of 3072.
RULES: tuple[tuple[str, P], ...] = (
    (r"/(bias|scale)$", P()),
    (r"_blocks/(attn|attn_context)/to_[qkv]/kernel$", P(None, "fsdp", "tensor")),
    (r"_blocks/(attn|attn_context)/to_out/kernel$", P(None, "tensor", "fsdp")),
    (r"_blocks/(ff|ff_context)/(linear_1|proj_mlp)/kernel$", P(None, "fsdp", "tensor")),
    (r"_blocks/(ff|ff_context)/(linear_2|proj_out)/kernel$", P(None, "tensor", "fsdp")),
    (r"_blocks/norm(1|1_context)?/linear/kernel$", P(None, "fsdp", None)),
    (r"^time_text_embed/\w+_embedder/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^time_text_embed/\w+_embedder/linear_2/kernel$", P("tensor", "fsdp")),
    (r"^x_embedder/kernel$", P(None, "fsdp")),
    (r"^(context_embedder|norm_out/linear|proj_out)/kernel$", P("fsdp", None)),
)
