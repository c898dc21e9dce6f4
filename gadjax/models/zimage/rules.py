"""Sharding rules of Z-Image's parameters over the mesh axes "fsdp" and "tensor"."""

from jax.sharding import PartitionSpec as P

STACK = r"^(layers|noise_refiner|context_refiner)/"

# The widths 2560, 3840 and 10240 are multiples of 256; 30 heads divide by 2 alone.
RULES: tuple[tuple[str, P], ...] = (
    (r"/norm_[qk]/scale$", P()),
    (STACK + r"attn/to_[qkv]/kernel$", P(None, "fsdp", "tensor")),
    (STACK + r"attn/to_out/kernel$", P(None, "tensor", "fsdp")),
    (STACK + r"ff/w[13]/kernel$", P(None, "fsdp", "tensor")),
    (STACK + r"ff/w2/kernel$", P(None, "tensor", "fsdp")),
    (STACK + r"\w+_norm[12]/scale$", P(None, "fsdp")),
    (STACK + r"adaLN_modulation/kernel$", P(None, None, "fsdp")),
    (STACK + r"adaLN_modulation/bias$", P(None, "fsdp")),
    (r"^x_embedder/kernel$", P(None, "fsdp")),
    (r"^cap_embedder/1/kernel$", P("fsdp", None)),
    (r"^t_embedder/linear_1/kernel$", P("fsdp", "tensor")),
    (r"^t_embedder/linear_2/kernel$", P("tensor", "fsdp")),
    (r"^final_layer/linear/kernel$", P("fsdp", None)),
    (r"^final_layer/adaLN_modulation/kernel$", P(None, "fsdp")),
)
