"""Sharding rules of FLUX.2-klein's parameters over the mesh axes "fsdp" and "tensor"."""

from jax.sharding import PartitionSpec as P

# The residual streams are replicated over "tensor", and so is their modulation. Each dimension
# named is a multiple of 256. A "tensor" axis splits a single block's fused projection across its
# parts: their activations are exchanged between its devices.
RULES: tuple[tuple[str, P], ...] = (
    (r"/scale$", P()),
    (r"^double_blocks/(attn|attn_context)/to_[qkv]/kernel$", P(None, "fsdp", "tensor")),
    (r"^double_blocks/(ff|ff_context)/linear_in/kernel$", P(None, "fsdp", "tensor")),
    (r"^double_blocks/(ff|ff_context)/linear_out/kernel$", P(None, "tensor", "fsdp")),
    (r"^single_blocks/attn/to_qkv_mlp_proj/kernel$", P(None, "fsdp", "tensor")),
    (r"_blocks/(attn|attn_context)/to_out/kernel$", P(None, "tensor", "fsdp")),
    (r"_modulation(_img|_txt)?/linear/kernel$", P("fsdp", None)),
    (r"^time_guidance_embed/\w+/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^time_guidance_embed/\w+/linear_2/kernel$", P("tensor", "fsdp")),
    (r"^x_embedder/kernel$", P(None, "fsdp")),
    (r"^(context_embedder|norm_out/linear|proj_out)/kernel$", P("fsdp", None)),
)
